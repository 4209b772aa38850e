"""quantcli quantize: a checkpoint and a recipe become a quantized model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from quantcli.cli import options
from quantcli.cli.console import Console
from quantcli.cli.results import Progress, render_result

Flag = bool | None


def command(
    source: options.Source,
    output: options.Output = None,
    method: Annotated[str | None, typer.Option(help="gptq, awq, nf4, fp8, …: the default recipe of that method.")] = None,
    recipe: Annotated[str | None, typer.Option(help="A recipe by name, or a YAML file.")] = None,
    type_: Annotated[str | None, typer.Option("--type", help="GGUF file type, e.g. Q4_K_M; implies --format gguf.")] = None,
    bits: Annotated[int | None, typer.Option(help="Bits per weight: 2 to 8; 5, 6 and 7 in compressed-tensors alone.")] = None,
    group_size: Annotated[int | None, typer.Option(help="Weights of a row that share a scale; -1 for the whole row.")] = None,
    sym: Annotated[Flag, typer.Option("--sym/--asym", help="Symmetric, or with zero points.")] = None,
    desc_act: Annotated[Flag, typer.Option("--desc-act/--no-desc-act", help="Group columns in solving order (writes g_idx).")] = None,
    damp_percent: Annotated[float | None, typer.Option(help="GPTQ damping as a fraction of the mean of diag(H). Default: 0.01.")] = None,
    true_sequential: Annotated[
        bool,
        typer.Option("--true-sequential", help="Measure each linear behind the ones already quantized."),
    ] = False,
    format_: Annotated[str | None, typer.Option("--format", help="gptq, awq, compressed-tensors, bitsandbytes, fp8 or gguf.")] = None,
    kv_cache: Annotated[
        str | None, typer.Option(help="Store scales for a quantized key-value cache: fp8, int8, fp8-head or int8-head.")
    ] = None,
    rule: options.Rules = None,
    skip: options.Skips = None,
    stats: Annotated[Path | None, typer.Option(help="Statistics file from quantcli calibrate, instead of a dataset.")] = None,
    imatrix: options.Imatrix = None,
    dataset: options.Dataset = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Number of text windows to calibrate on. Default: 128.")] = None,
    seq_len: Annotated[int | None, typer.Option(min=2, help="Tokens per window. Default: 2048.")] = None,
    moe: options.Moe = None,
    pre_tokenizer: options.PreTokenizer = None,
    device: options.Device = "auto",
    threads: options.Threads = None,
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
    fresh: options.Fresh = False,
    dry_run: options.DryRun = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Quantize a model with a method or a recipe."""
    from quantcli import api
    from quantcli.planning import selection

    console = Console(json, quiet, verbose)
    chosen = selection.choose(method, recipe, type_, format_)
    given = {"bits": bits, "group_size": group_size, "sym": sym, "desc_act": desc_act}
    if given := {key: value for key, value in given.items() if value is not None}:
        chosen = chosen.with_scheme(**given)
    if damp_percent is not None:
        chosen = chosen.with_pass("gptq", damp_ratio=damp_percent)
    chosen = selection.with_cache(chosen, kv_cache)
    chosen = selection.with_rules(chosen, [options.split_pair(text, "--rule") for text in rule or []], skip or [])
    chosen = replace(chosen, true_sequential=true_sequential or chosen.true_sequential, seed=seed)
    if pre_tokenizer is not None:
        chosen = replace(chosen, format_options={**chosen.format_options, "pre_tokenizer": pre_tokenizer})
    options.check_data(console, chosen, stats=stats, imatrix=imatrix, dataset=dataset, samples=samples, seq_len=seq_len)
    chosen = selection.with_text(chosen, datasets=dataset or (), samples=samples, seq_len=seq_len, moe=moe)
    with Progress(console, f"{chosen.name}: starting") as progress:
        result = api.quantize(
            source,
            output,
            chosen,
            data=options.read_data(stats, imatrix),
            device=options.device_of(console, device, threads),
            overwrite=overwrite,
            fresh=fresh,
            dry_run=dry_run,
            on_event=progress,
        )
    console.result(result.to_dict(), render_result(console, result))
