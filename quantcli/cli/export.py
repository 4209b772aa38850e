"""quantcli export: a checkpoint in another format, without calibration; codes are kept where the new grid can hold them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantcli.cli import options
from quantcli.cli.console import Console
from quantcli.cli.quantize import execute
from quantcli.cli.recipes import check_format, gguf_types, load_type

if TYPE_CHECKING:
    from quantcli.checkpoint.checkpoint import Checkpoint
    from quantcli.recipe import Recipe

DENSE_TYPES = {"bfloat16": "BF16", "float32": "F32"}
"""config.json's dtypes → the GGUF type that holds them; float16 and what says nothing is F16."""


def command(
    source: Annotated[str | None, typer.Argument(metavar="SOURCE", help=f"{options.SOURCE_HELP} This folder when left out.")] = None,
    type_: Annotated[str | None, typer.Argument(metavar="TYPE", help="GGUF file type (Q4_K_M) or a scheme (int4-g128-sym).")] = None,
    format_: Annotated[str, typer.Option("--format", help="Output format: gguf, gptq, awq, compressed-tensors, …")] = "gguf",
    output: options.Output = None,
    pure: Annotated[bool, typer.Option("--pure", help="One type for every matrix, no mix.")] = False,
    tensor_type: Annotated[list[str] | None, typer.Option(metavar="REGEX=TYPE", help="Type of the tensors that REGEX finds.")] = None,
    output_tensor_type: Annotated[str | None, typer.Option(help="Type of the output matrix.")] = None,
    token_embedding_type: Annotated[str | None, typer.Option(help="Type of the token embedding.")] = None,
    leave_output_tensor: Annotated[bool, typer.Option("--leave-output-tensor", help="Do not quantize the output matrix.")] = False,
    imatrix: options.Imatrix = None,
    prune_layers: Annotated[str | None, typer.Option(metavar="N,N,…", help="Leave these layers out, counted from 0.")] = None,
    override_kv: Annotated[
        list[str] | None, typer.Option(metavar="KEY=TYPE:VALUE", help="Set metadata; TYPE is int, float, bool or str.")
    ] = None,
    split_max_size: Annotated[
        str | None, typer.Option(metavar="300M|2G|16GiB", help="Cut the output into files of at most this much tensor data.")
    ] = None,
    pre_tokenizer: options.PreTokenizer = None,
    device: options.Device = "auto",
    threads: options.Threads = None,
    overwrite: options.Overwrite = False,
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
    format_ = check_format(format_)
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
    if imatrix is not None and format_ != "gguf":
        raise options.wrong("--imatrix", f"belongs to --format gguf, not to {format_}")
    if format_options and format_ != "gguf":
        raise options.wrong("--" + next(iter(format_options)).replace("_", "-"), f"belongs to --format gguf, not to {format_}")
    given_type = None if type_ is None else recipe_of_type(format_, type_)

    def choose(checkpoint: Checkpoint) -> Recipe:
        return replace(given_type or recipe_that_keeps(checkpoint, format_), format_options=format_options)

    console = Console(json, quiet, verbose)
    execute(console, where, output, choose, imatrix=imatrix, device=device, threads=threads, overwrite=overwrite, dry_run=dry_run)


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


def recipe_of_type(format_: str, type_: str) -> Recipe:
    """Every matrix in the type that was asked for."""
    from quantcli.recipe import PassSpec, Recipe
    from quantcli.tensors import Scheme

    if format_ == "gguf":
        return replace(load_type(type_, "TYPE"), codes="reuse")
    scheme = Scheme.parse(type_)
    return Recipe(f"{format_}-{scheme}", format_, (PassSpec("rtn"),), scheme=scheme, codes="reuse")


def recipe_that_keeps(checkpoint: Checkpoint, format_: str) -> Recipe:
    """The source's codes wherever the format can hold them, and the format's usual scheme where it cannot."""
    from quantcli import formats
    from quantcli.recipe import PassSpec, Recipe
    from quantcli.tensors import Scheme

    recipe = Recipe(format_, format_, (PassSpec("rtn"),), codes="keep")
    if format_ != "gguf":
        usual = formats.of(format_).usual_scheme
        return replace(recipe, scheme=None if usual is None else Scheme.parse(usual))
    if checkpoint.kind == "gguf":
        return replace(recipe, name="copy")
    if not checkpoint.schemes:
        raise options.wrong("TYPE", f"a GGUF file type is missing; there are: {', '.join(gguf_types())}")
    config = checkpoint.config
    dense = DENSE_TYPES.get(str(config.get("dtype") or config.get("torch_dtype")), "F16")
    return replace(recipe, name=commonest_type(checkpoint, replace(recipe, mix=dense)), mix=dense)


def commonest_type(checkpoint: Checkpoint, recipe: Recipe) -> str:
    """The GGUF type that most of a quantized source's weights take: it names the output."""
    from quantcli.formats.gguf.file.container import ggml_type_of
    from quantcli.planning.schemes import kept_schemes

    n_weights: Counter[str] = Counter()
    for name, scheme in kept_schemes(checkpoint, recipe, {}).items():
        n_weights[ggml_type_of(scheme.qtype)] += checkpoint.specs[name].n_elements
    return n_weights.most_common(1)[0][0]
