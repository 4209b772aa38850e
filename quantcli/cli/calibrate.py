"""quantcli calibrate: one measurement of a model's activations that serves every calibrated method."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantcli.cli import options
from quantcli.cli.console import Console, count
from quantcli.cli.results import Progress


def command(
    source: options.Source,
    output: Annotated[Path, typer.Option("--output", "-o", help="The statistics file to write (.safetensors).")],
    dataset: options.Dataset = None,
    samples: options.Samples = 128,
    seq_len: options.SeqLen = 2048,
    histograms: Annotated[
        bool, typer.Option("--histograms", help="Also store histograms, which some settings of input_range need.")
    ] = False,
    imatrix: Annotated[Path | None, typer.Option(help="Also write llama.cpp's importance matrix, a GGUF file, for llama-quantize.")] = None,
    hessian: Annotated[bool, typer.Option("--hessian/--no-hessian", help="Store H, which gptq and awq need; large.")] = True,
    moe: options.Moe = None,
    device: options.Device = "auto",
    threads: options.Threads = None,
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
    fresh: options.Fresh = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Run text through a model and store statistics of the inputs of its linears."""
    from quantcli import api

    console = Console(json, quiet, verbose)
    with Progress(console, "embedding the text") as progress:
        result = api.calibrate(
            source,
            output,
            data=dataset or (),
            samples=samples,
            seq_len=seq_len,
            hessian=hessian,
            histograms=histograms,
            imatrix=imatrix,
            moe=moe or "routed",
            device=options.device_of(console, device, threads),
            seed=seed,
            overwrite=overwrite,
            fresh=fresh,
            on_event=progress,
        )
    files = [str(path) for path in (result.stats, result.imatrix) if path is not None]
    done = f"{result.taps} taps measured on {count(result.n_tokens)} tokens in {result.seconds:.1f} s"
    known = [f"perplexity of the text {result.text_check.perplexity:.1f}"] if result.text_check is not None else []
    console.result(result.to_dict(), [*files, done, *known])
