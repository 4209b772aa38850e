"""quantcli export: a checkpoint in another format, without calibration."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from quantcli.cli import options
from quantcli.cli.console import Console
from quantcli.cli.quantize import execute, gguf_types, load_type


def command(
    source: Annotated[str | None, typer.Argument(metavar="SOURCE", help=f"{options.SOURCE_HELP} This folder when left out.")] = None,
    type_: Annotated[str | None, typer.Argument(metavar="TYPE", help="GGUF file type, e.g. Q4_K_M.")] = None,
    format_: Annotated[str, typer.Option("--format", help="Output format: gguf.")] = "gguf",
    output: options.Output = None,
    pure: Annotated[bool, typer.Option("--pure", help="One type for every matrix, no mix.")] = False,
    tensor_type: Annotated[list[str] | None, typer.Option(metavar="REGEX=TYPE", help="Type of the tensors that REGEX finds.")] = None,
    output_tensor_type: Annotated[str | None, typer.Option(help="Type of the output matrix.")] = None,
    token_embedding_type: Annotated[str | None, typer.Option(help="Type of the token embedding.")] = None,
    leave_output_tensor: Annotated[bool, typer.Option("--leave-output-tensor", help="Do not quantize the output matrix.")] = False,
    pre_tokenizer: options.PreTokenizer = None,
    device: options.Device = "auto",
    threads: options.Threads = None,
    overwrite: options.Overwrite = False,
    dry_run: options.DryRun = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Convert a model to a GGUF file of a type, straight from its shards, a quantized folder or another GGUF file."""
    if format_ != "gguf":
        raise options.wrong("--format", f"export writes gguf, not '{format_}'; quantcli quantize writes gptq")
    where, file_type = split_arguments(source, type_)
    recipe = load_type(file_type, "TYPE")
    given: dict[str, object] = {
        "pure": pure,
        "tensor_type": tuple("=".join(options.split_pair(text, "--tensor-type")) for text in tensor_type or ()),
        "output_tensor_type": output_tensor_type,
        "token_embedding_type": token_embedding_type,
        "leave_output_tensor": leave_output_tensor,
        "pre_tokenizer": pre_tokenizer,
    }
    recipe = replace(recipe, format_options={key: value for key, value in given.items() if value})
    console = Console(json, quiet, verbose)
    execute(console, where, output, recipe, device=device, threads=threads, overwrite=overwrite, dry_run=dry_run)


def split_arguments(source: str | None, type_: str | None) -> tuple[str, str]:
    """SOURCE and TYPE: a lone argument that names a GGUF type and no path is TYPE, and SOURCE is the current folder."""
    if type_ is not None:
        return source or ".", type_
    if source is None or Path(source).exists() or "/" in source:
        raise options.wrong("TYPE", f"a GGUF file type is missing; there are: {', '.join(gguf_types())}")
    return ".", source
