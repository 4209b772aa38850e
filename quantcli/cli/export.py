"""quantcli export: a checkpoint in another format, without calibration; codes are kept where the new grid can hold them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantcli.cli import options
from quantcli.cli.console import Console
from quantcli.cli.results import Progress, render_result


def command(
    source: Annotated[str | None, typer.Argument(metavar="SOURCE", help=f"{options.SOURCE_HELP} This folder when left out.")] = None,
    type_: Annotated[str | None, typer.Argument(metavar="TYPE", help="GGUF file type (Q4_K_M) or a scheme (int4-g128-sym).")] = None,
    format_: Annotated[str, typer.Option("--format", help="Output format: gguf, gptq, awq, compressed-tensors, …")] = "gguf",
    output: options.Output = None,
    pure: Annotated[bool, typer.Option("--pure", help="Use one type for every matrix, no mix.")] = False,
    tensor_type: Annotated[list[str] | None, typer.Option(metavar="REGEX=TYPE", help="Type of the tensors that REGEX matches.")] = None,
    output_tensor_type: Annotated[str | None, typer.Option(help="Type of the output matrix.")] = None,
    token_embedding_type: Annotated[str | None, typer.Option(help="Type of the token embedding.")] = None,
    leave_output_tensor: Annotated[bool, typer.Option("--leave-output-tensor", help="Do not quantize the output matrix.")] = False,
    imatrix: options.Imatrix = None,
    prune_layers: Annotated[str | None, typer.Option(metavar="N,N,…", help="Leave out these layers, counted from 0.")] = None,
    override_kv: Annotated[
        list[str] | None, typer.Option(metavar="KEY=TYPE:VALUE", help="Set metadata; TYPE is int, float, bool or str.")
    ] = None,
    split_max_size: Annotated[
        str | None, typer.Option(metavar="300M|2G|16GiB", help="Split the output into files of at most this much tensor data.")
    ] = None,
    pre_tokenizer: options.PreTokenizer = None,
    device: options.Device = "auto",
    threads: options.Threads = None,
    overwrite: options.Overwrite = False,
    fresh: options.Fresh = False,
    dry_run: options.DryRun = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Convert a model to another format: from its shards, a quantized folder or a GGUF file.

    Codes of a quantized source stay as they are where the target's grid holds them (GPTQ to AWQ or Q4_0, say); the rest is decoded and
    rounded anew. The result says which: "lossless", and an error for each layer. Without TYPE the first type is taken that keeps the codes,
    and a GGUF file is copied: to cut it up, or to join its parts.
    """
    from quantcli import api
    from quantcli.planning import selection

    console = Console(json, quiet, verbose)
    format_ = selection.writable(format_)
    where, type_ = split_arguments(source, type_)
    given: dict[str, object] = {
        "pure": pure,
        "tensor_type": tuple("=".join(options.split_pair(text, "--tensor-type")) for text in tensor_type or ()),
        "output_tensor_type": output_tensor_type,
        "token_embedding_type": token_embedding_type,
        "leave_output_tensor": leave_output_tensor,
        "prune_layers": layer_numbers(prune_layers or ""),
        "override_kv": tuple(override_kv or ()),
        "split_max_size": split_max_size,
        "pre_tokenizer": pre_tokenizer,
    }
    format_options = {key: value for key, value in given.items() if value}
    idle = [*format_options, *(["imatrix"] if imatrix is not None else [])]
    if idle and format_ != "gguf":
        raise options.wrong("--" + idle[0].replace("_", "-"), f"belongs to --format gguf, not to {format_}")
    with Progress(console, "starting") as progress:
        result = api.export(
            where,
            output,
            type_,
            format=format_,
            data=options.read_data(None, imatrix),
            options=format_options,
            device=options.device_of(console, device, threads),
            overwrite=overwrite,
            fresh=fresh,
            dry_run=dry_run,
            on_event=progress,
        )
    console.result(result.to_dict(), render_result(console, result))


def layer_numbers(text: str) -> tuple[int, ...]:
    """The numbers in ``text``, each once and in order."""
    words = [word.strip() for word in text.split(",")] if text else []
    if not all(word.isdecimal() for word in words):
        raise options.wrong("--prune-layers", f"expected numbers of layers with commas between, not '{text}'")
    return tuple(sorted(set(map(int, words))))


def split_arguments(source: str | None, type_: str | None) -> tuple[str, str | None]:
    """SOURCE and TYPE: a lone argument that can be no path and no Hub id is TYPE, and SOURCE is the current folder."""
    if type_ is not None or source is None or Path(source).exists() or "/" in source:
        return source or ".", type_
    return ".", source
