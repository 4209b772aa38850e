"""quantcli quantize: a checkpoint and a recipe become a quantized model."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantcli import heap
from quantcli.cli import options
from quantcli.cli.calibrate import report_familiarity
from quantcli.cli.console import Console, size
from quantcli.cli.recipes import check_imatrix, choose_recipe, set_cache, set_calibration, set_rules, set_scheme
from quantcli.errors import RecipeError

if TYPE_CHECKING:
    from quantcli.calibration.data import Data
    from quantcli.checkpoint.checkpoint import Checkpoint
    from quantcli.planning.plan import Plan, PlannedLayer
    from quantcli.recipe import Recipe
    from quantcli.walk.events import Finished, LayerDone, Planned

Flag = bool | None


def command(
    source: options.Source,
    output: options.Output = None,
    method: Annotated[str | None, typer.Option(help="gptq, awq, nf4, fp8, …: picks that method's usual recipe.")] = None,
    recipe: Annotated[str | None, typer.Option(help="A recipe by name, or a YAML file.")] = None,
    type_: Annotated[str | None, typer.Option("--type", help="GGUF file type, e.g. Q4_K_M; implies --format gguf.")] = None,
    bits: Annotated[int | None, typer.Option(help="Bits of a code.")] = None,
    group_size: Annotated[int | None, typer.Option(help="Inputs that share a scale; -1 for a whole row.")] = None,
    sym: Annotated[Flag, typer.Option("--sym/--asym", help="Without or with zero points.")] = None,
    desc_act: Annotated[Flag, typer.Option("--desc-act/--no-desc-act", help="Group columns in solving order (writes g_idx).")] = None,
    damp_percent: Annotated[float | None, typer.Option(help="GPTQ damping, a share of the mean of diag(H): 0.01.")] = None,
    true_sequential: Annotated[bool, typer.Option("--true-sequential", help="Measure each tap behind coded ones.")] = False,
    format_: Annotated[str | None, typer.Option("--format", help="gptq, awq, compressed-tensors, bitsandbytes, fp8 or gguf.")] = None,
    kv_cache: Annotated[str | None, typer.Option(help="Scales for a quantized key-value cache: fp8, int8, fp8-head, int8-head.")] = None,
    rule: options.Rules = None,
    skip: options.Skips = None,
    stats: Annotated[Path | None, typer.Option(help="Statistics from quantcli calibrate, instead of a dataset.")] = None,
    imatrix: options.Imatrix = None,
    dataset: options.Dataset = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Windows of text: 128.")] = None,
    seq_len: Annotated[int | None, typer.Option(min=2, help="Tokens in a window: 2048.")] = None,
    moe: options.Moe = None,
    pre_tokenizer: options.PreTokenizer = None,
    device: options.Device = "auto",
    threads: options.Threads = None,
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
    dry_run: options.DryRun = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Quantize a model with a method or a recipe."""
    console = Console(json, quiet, verbose)
    chosen = choose_recipe(method, recipe, type_, format_)
    chosen = set_scheme(chosen, bits=bits, group_size=group_size, sym=sym, desc_act=desc_act)
    if damp_percent is not None:
        chosen = chosen.with_pass("gptq", damp_ratio=damp_percent)
    chosen = set_cache(chosen, kv_cache)
    chosen = set_rules(chosen, rule or [], skip or [])
    chosen = replace(chosen, true_sequential=true_sequential or chosen.true_sequential, seed=seed)
    if pre_tokenizer is not None:
        chosen = replace(chosen, format_options={**chosen.format_options, "pre_tokenizer": pre_tokenizer})
    check_imatrix(chosen, imatrix, stats)
    if stats is not None and chosen.format == "gguf" and not chosen.needs:  # whose rounding they weigh, like an importance matrix
        imatrix, stats = stats, None
    chosen = set_calibration(console, chosen, stats, dataset=dataset, samples=samples, seq_len=seq_len)
    options.check_moe(moe)
    chosen = replace(chosen, calibration=replace(chosen.calibration, moe=moe or chosen.calibration.moe))
    execute(
        console, source, output, chosen, stats=stats, imatrix=imatrix, device=device, threads=threads, overwrite=overwrite, dry_run=dry_run
    )


def default_output(source: Checkpoint, recipe: Recipe) -> Path:
    """``<model>-<recipe>`` in the current folder; ``<model>-Q4_K_M.gguf`` for GGUF."""
    path = Path(source.source).expanduser()
    model = path.resolve().name if path.exists() else source.source.partition("@")[0].rpartition("/")[2]
    if recipe.format == "gguf":
        kind = recipe.name if recipe.codes == "keep" else recipe.mix or recipe.name
        return Path(f"{model.removesuffix('.gguf')}-{kind}.gguf")
    return Path(f"{model}-{recipe.name}")


def execute(
    console: Console,
    source: str,
    output: Path | None,
    recipe: Recipe | Callable[[Checkpoint], Recipe],
    *,
    stats: Path | None = None,
    imatrix: Path | None = None,
    device: str = "auto",
    threads: int | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> None:
    """Run a recipe, or the one that fits the source, and render what comes of it; ``quantize`` and ``export`` share it."""
    from quantcli.formats import open_checkpoint
    from quantcli.formats.gguf.imatrix import importance
    from quantcli.walk import events, pipeline

    started = time.perf_counter()
    torch_device = options.set_up_device(console, device, threads)
    layers: list[LayerDone] = []
    plan: Plan | None = None
    finished: Finished | None = None
    with open_checkpoint(source) as checkpoint:
        if callable(recipe):
            recipe = recipe(checkpoint)
        target = output or default_output(checkpoint, recipe)
        data = partial(load_calibration, console, checkpoint, recipe, stats) if imatrix is None else importance.read(imatrix)
        walk = pipeline.quantize(checkpoint, target, recipe, data=data, device=torch_device, overwrite=overwrite, dry_run=dry_run)
        with closing(walk), console.progress(f"{recipe.name}: starting") as progress:
            for event in walk:
                if isinstance(event, events.Planned):
                    plan = event.plan
                    report_plan(console, checkpoint, event)
                    if not dry_run and "split_max_size" not in recipe.format_options:  # whose files the writer checks
                        check_target(target, overwrite=overwrite, folder=recipe.format != "gguf")
                elif isinstance(event, events.LayerDone):
                    layers.append(event)
                    progress.step(event.index, event.n_layers, layer_line(event))
                    report_layer(console, event)
                else:
                    finished = event
        if finished is not None and finished.familiarity is not None:
            report_familiarity(console, finished.familiarity)
    assert plan is not None
    if finished is not None and "split_max_size" in recipe.format_options:
        target = target.with_name(finished.output.name)  # the first of several files
    data = summarize(plan, target, layers, finished, time.perf_counter() - started)
    console.result(data, render_plan(console, plan) if finished is None else render_result(data))


def check_target(target: Path, *, overwrite: bool, folder: bool) -> None:
    """Raise before hours of work what the writer would raise after them, and keep ``--overwrite`` from other people's files."""
    from quantcli import formats
    from quantcli.output.disk import check_replaceable

    check_replaceable(Path(os.path.realpath(target)), overwrite=overwrite, folder=folder)
    if target.is_file() and not formats.of("gguf").detect(target, None):
        raise RecipeError(f"{target}: is no GGUF file, so --overwrite will not replace it; choose another -o")


def load_calibration(console: Console, checkpoint: Checkpoint, recipe: Recipe, stats: Path | None) -> Data:
    """Statistics from a file, or token windows from the recipe's texts."""
    from quantcli.calibration.data import Windows
    from quantcli.forward import tokenizer
    from quantcli.statistics.stats_file import StatsFile
    from quantcli.text import texts

    if stats is not None:
        loaded = StatsFile(stats)
        loaded.check_source(checkpoint, warn=console.warn)
        return loaded
    wanted = recipe.calibration
    options.check_context(console, checkpoint, wanted.seq_len)
    windows = texts.windows_of(wanted.datasets, tokenizer(checkpoint), wanted.samples, wanted.seq_len, recipe.seed, note=console.note)
    return Windows(windows)


def layer_line(event: LayerDone) -> str:
    error = "" if event.relative_error is None else f"  error {event.relative_error:.2e}"
    return f"{event.name}  {event.bpw:.2f} bpw{error}  {event.seconds:.1f} s"


def report_plan(console: Console, checkpoint: Checkpoint, event: Planned) -> None:
    """What a user should know before the work begins."""
    plan = event.plan
    if any(t.is_recoded for t in plan.tensors):
        console.warn(f"{checkpoint.source} is quantized already, and its error stays; better start from the original weights")
    for note in (*checkpoint.notes, *event.notes):
        console.note(note)
    for tensor in plan.tensors:
        if not tensor.outputs:
            console.warn(f"{tensor.name}: dropped: {plan.why_dropped(tensor)}")


def report_layer(console: Console, event: LayerDone) -> None:
    """Its tensors' errors, where detail is wanted, and their notes; of notes that differ by numbers only, as a hundred experts' do, one."""
    alike: dict[str, list[str]] = {}
    for report in event.tensors:
        if report.relative_error:
            console.detail(f"{report.name}  error {report.relative_error:.2e}")
        for note in report.notes:
            alike.setdefault(re.sub(r"\d+", "#", note), []).append(f"{report.name}: {note}")
    for first, *others in alike.values():
        console.warn(f"{first}; likewise {len(others)} more of {event.name}" if others else first)
        for other in others:
            console.detail(other)


def summarize(plan: Plan, target: Path, layers: list[LayerDone], finished: Finished | None, seconds: float) -> dict[str, Any]:
    """The JSON keys of quantize and export; of a dry run those that a plan can know, the others null."""
    done = finished is not None
    known = finished.familiarity if finished is not None else None
    walked = [{"name": e.name, "relative_error": e.relative_error, "bpw": e.bpw, "seconds": e.seconds} for e in layers]
    planned = [{"name": layer.name, "relative_error": None, "bpw": planned_bpw(layer), "seconds": None} for layer in plan.layers]
    return {
        "output": str(target),
        "format": plan.recipe.format,
        "recipe": plan.recipe.name,
        "n_bytes": plan.n_bytes,
        "bpw": plan.bpw,
        "tensors": plan.census(),
        "dry_run": not done,
        "seconds": seconds,
        "peak_ram_bytes": heap.peak_bytes(),
        "lossless": finished.lossless if finished is not None else None,
        "dataset_sha256": finished.dataset_sha256 if finished is not None else None,
        "calibrated_by": finished.calibrated_by if finished is not None else None,
        "calibration_perplexity": known.perplexity if known is not None else None,
        "layers": walked if done else planned,
    }


def planned_bpw(layer: PlannedLayer) -> float:
    n_bytes = sum(spec.nbytes for tensor in layer.tensors for spec in tensor.outputs)
    return 8 * n_bytes / max(1, sum(tensor.source.n_elements for tensor in layer.tensors))


def render_plan(console: Console, plan: Plan) -> list[str]:
    rows = []
    for tensor in plan.tensors:
        kind = "dropped" if not tensor.outputs else str(tensor.scheme or tensor.outputs[0].dtype.lower())
        rows.append([tensor.name, kind, "x".join(map(str, tensor.source.shape)), str(sum(s.nbytes for s in tensor.outputs))])
    total = f"{size(plan.n_bytes)}, {plan.bpw:.3f}bpw; nothing was written"
    return [*console.table(["tensor", "becomes", "shape", "bytes"], rows), "", total]


def render_result(data: dict[str, Any]) -> list[str]:
    census = ", ".join(f"{n} {word}" for word, n in data["tensors"].items() if n)
    errors = [layer["relative_error"] for layer in data["layers"] if layer["relative_error"] is not None]
    error = f", mean relative error {sum(errors) / len(errors):.2e}" if errors else ""
    return [
        f"{data['output']}",
        f"{size(data['n_bytes'])}, {data['bpw']:.3f}bpw{error}",
        f"tensors: {census}{', lossless' if data['lossless'] else ''}",
        f"{data['seconds']:.1f} s, peak memory {size(data['peak_ram_bytes'])}",
        *([f"calibrated by {how} of text {data['dataset_sha256'][:12]}"] if (how := data["calibrated_by"]) else []),
        *([f"perplexity of the calibration text {perplexity:.1f}"] if (perplexity := data["calibration_perplexity"]) else []),
    ]
