"""quantcli calibrate: one measurement of a model's activations that serves every calibrated method."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantcli.cli import options
from quantcli.cli.console import Console, count

if TYPE_CHECKING:
    from quantcli.calibration.calibrate import LayerMeasured
    from quantcli.calibration.text_check import Familiarity
    from quantcli.checkpoint.checkpoint import Checkpoint
    from quantcli.statistics.stats_file import StatsFile


def command(
    source: options.Source,
    output: Annotated[Path, typer.Option("--output", "-o", help="The statistics file to write (.safetensors).")],
    dataset: options.Dataset = None,
    samples: options.Samples = 128,
    seq_len: options.SeqLen = 2048,
    histograms: Annotated[bool, typer.Option("--histograms", help="Count magnitudes too, which a recipe's input_range needs.")] = False,
    imatrix: Annotated[Path | None, typer.Option(help="Also write llama.cpp's importance matrix, a GGUF file, for llama-quantize.")] = None,
    hessian: Annotated[bool, typer.Option("--hessian/--no-hessian", help="Gather H, which gptq needs; the file is tiny without.")] = True,
    moe: options.Moe = None,
    device: options.Device = "auto",
    threads: options.Threads = None,
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Run text through a model and keep what its linears read."""
    from quantcli.calibration import calibrate
    from quantcli.formats import open_checkpoint
    from quantcli.formats.gguf.model.naming import architecture
    from quantcli.forward import tokenizer
    from quantcli.statistics.stats_file import StatsFile
    from quantcli.text import texts

    console = Console(json, quiet, verbose)
    started = time.perf_counter()
    options.check_moe(moe)
    torch_device = options.set_up_device(console, device, threads)
    check_outputs(output, imatrix, overwrite=overwrite)
    with open_checkpoint(source) as checkpoint:
        options.check_context(console, checkpoint, seq_len)
        if imatrix is not None:
            architecture(checkpoint.config)  # names are GGUF's: what has none fails before the work
        windows = texts.windows_of(dataset or [], tokenizer(checkpoint), samples, seq_len, seed, note=console.note)
        events = calibrate.calibrate(
            checkpoint,
            windows,
            output,
            hessian=hessian,
            histograms=histograms,
            head=True,
            moe=moe or "routed",
            device=torch_device,
            overwrite=overwrite,
        )
        n_taps, known = measure(console, events)
        if imatrix is not None:
            write_imatrix(console, imatrix, StatsFile(output), checkpoint, dataset or [], overwrite=overwrite)
    report_familiarity(console, known)
    data = {
        "stats": str(output),
        "imatrix": None if imatrix is None else str(imatrix),
        "n_samples": windows.shape[0],
        "n_tokens": windows.numel(),
        "taps": n_taps,
        "dataset_sha256": texts.sha256(windows),
        "calibration_perplexity": known.perplexity,
        "seconds": time.perf_counter() - started,
    }
    files = [str(path) for path in (output, imatrix) if path is not None]
    done = f"{n_taps} taps measured on {count(windows.numel())} tokens in {data['seconds']:.1f} s"
    console.result(data, [*files, done, f"perplexity of the text {known.perplexity:.1f}"])


def check_outputs(output: Path, imatrix: Path | None, *, overwrite: bool) -> None:
    """Raise before the work where a file cannot be put. ``overwrite`` replaces statistics, never another file such as a model's shard."""
    from quantcli.output.disk import check_replaceable
    from quantcli.statistics.stats_file import StatsFile

    for path in (output, imatrix):
        if path is not None:
            check_replaceable(Path(os.path.realpath(path)), overwrite=overwrite, folder=False)
    if output.is_file():
        StatsFile(output)


def measure(console: Console, events: Iterable[LayerMeasured | Familiarity]) -> tuple[int, Familiarity]:
    """Walk the ``events`` of a calibration; how many taps were measured, and how well the model knows the text."""
    from quantcli.calibration.text_check import Familiarity

    n_taps, known = 0, None
    with console.progress("embedding the text") as progress:
        for event in events:
            if isinstance(event, Familiarity):
                known = event
            else:
                n_taps += event.n_taps
                progress.step(event.index, event.n_layers, f"{event.name}  {event.n_taps} taps  {event.seconds:.1f} s")
    assert known is not None
    return n_taps, known


def write_imatrix(console: Console, path: Path, stats: StatsFile, checkpoint: Checkpoint, datasets: list[str], *, overwrite: bool) -> None:
    """The statistics as llama-imatrix would have written them. ``datasets``: the words by which the user named the text."""
    from quantcli.formats.gguf.imatrix import file, importance
    from quantcli.formats.gguf.model.naming import gguf_names
    from quantcli.planning.arrange import arrange
    from quantcli.recipe import PassSpec, Recipe

    arranged = arrange(checkpoint, Recipe("imatrix", "gguf", (PassSpec("rtn"),)), run=True)
    names = gguf_names(arranged.source.specs, checkpoint.config)
    measured = importance.measured(stats, arranged.taps, names)
    for target in importance.unmeasured(measured, names, arranged.source.specs):
        console.warn(f"{path}: no entry for {target}, whose input was not measured")
    file.write(
        path,
        measured,
        datasets=datasets,
        n_chunks=int(stats.metadata["n_samples"]),
        chunk_size=int(stats.metadata["seq_len"]),
        said=importance.text_fields(importance.dataset_of(stats)),
        overwrite=overwrite,
    )


def report_familiarity(console: Console, known: Familiarity) -> None:
    """Warn of a text that the model does not know."""
    if not known.is_low:
        return
    if known.perplexity != known.perplexity:
        console.warn("the model's logits on the calibration text have NaN; check the checkpoint with quantcli eval")
    else:
        console.warn(
            f"the calibration text has perplexity {known.perplexity:.0f} for this model, and {known.counted:.0f} by a count of its tokens: "
            "it is no text that the model has learned; check --dataset, or the checkpoint"
        )
