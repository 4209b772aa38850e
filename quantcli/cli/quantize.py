"""quantcli quantize: a checkpoint and a recipe become a quantized model."""

from __future__ import annotations

import re
import resource
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantcli.cli import options
from quantcli.cli.console import Console, size
from quantcli.errors import RecipeError

if TYPE_CHECKING:
    from quantcli.checkpoint import Checkpoint
    from quantcli.pipeline import Calibrated, Finished, LayerDone
    from quantcli.plan import Plan
    from quantcli.recipe import Recipe

Flag = bool | None


def command(
    source: options.Source,
    output: options.Output = None,
    method: Annotated[str | None, typer.Option(help="rtn or gptq: picks that method's usual recipe.")] = None,
    recipe: Annotated[str | None, typer.Option(help="A recipe by name, or a YAML file.")] = None,
    type_: Annotated[str | None, typer.Option("--type", help="GGUF file type, e.g. Q4_K_M; implies --format gguf.")] = None,
    bits: Annotated[int | None, typer.Option(help="Bits of a code.")] = None,
    group_size: Annotated[int | None, typer.Option(help="Inputs that share a scale; -1 for a whole row.")] = None,
    sym: Annotated[Flag, typer.Option("--sym/--asym", help="Without or with zero points.")] = None,
    desc_act: Annotated[Flag, typer.Option("--desc-act/--no-desc-act", help="Group columns in solving order (writes g_idx).")] = None,
    damp_percent: Annotated[float | None, typer.Option(help="GPTQ damping, a share of the mean of diag(H): 0.01.")] = None,
    true_sequential: Annotated[bool, typer.Option("--true-sequential", help="Measure each tap behind coded ones.")] = False,
    format_: Annotated[str | None, typer.Option("--format", help="Output format: hf, gptq or gguf.")] = None,
    rule: options.Rules = None,
    skip: options.Skips = None,
    stats: Annotated[Path | None, typer.Option(help="Statistics from quantcli calibrate, instead of a dataset.")] = None,
    dataset: options.Dataset = None,
    samples: options.Samples = None,
    seq_len: options.SeqLen = None,
    pre_tokenizer: Annotated[str | None, typer.Option(help="llama.cpp's name of the pre-tokenizer, for GGUF.")] = None,
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
    chosen = choose_recipe(method, recipe, type_)
    chosen = set_scheme(chosen, bits=bits, group_size=group_size, sym=sym, desc_act=desc_act)
    if damp_percent is not None:
        chosen = chosen.with_pass("gptq", damp_ratio=damp_percent)
    chosen = set_rules(chosen, rule or [], skip or [])
    calibration = replace(
        chosen.calibration,
        samples=samples or chosen.calibration.samples,
        seq_len=seq_len or chosen.calibration.seq_len,
        datasets=tuple(dataset or chosen.calibration.datasets),
    )
    format_options = dict(chosen.format_options)
    if pre_tokenizer is not None:
        format_options["pre_tokenizer"] = pre_tokenizer
    chosen = replace(
        chosen,
        format=format_ or chosen.format,
        calibration=calibration,
        true_sequential=true_sequential or chosen.true_sequential,
        seed=seed,
        format_options=format_options,
    )
    console = Console(json, quiet, verbose)
    execute(console, source, output, chosen, stats=stats, device=device, threads=threads, overwrite=overwrite, dry_run=dry_run)


def choose_recipe(method: str | None, recipe: str | None, type_: str | None) -> Recipe:
    """The recipe that the three ways to name one agree on."""
    from quantcli import recipe as recipes

    if recipe is not None and (method is not None or type_ is not None):
        raise RecipeError("--recipe already says the method and the type; give either --recipe or --method and --type")
    if recipe is not None:
        return recipes.load(recipe)
    if type_ is None:
        return recipes.default_for(method or "gptq")
    chosen = recipes.load(type_)
    if chosen.mix is None:
        raise RecipeError(f"--type names a GGUF file type such as Q4_K_M, not '{type_}'")
    if method in (None, "rtn"):
        return chosen
    passes = recipes.default_for(method).passes
    return replace(chosen, name=f"{chosen.mix}-{method}", passes=passes)


def set_scheme(recipe: Recipe, **overrides: Any) -> Recipe:
    """The recipe with the scheme options that were given on the command line."""
    given = {key: value for key, value in overrides.items() if value is not None}
    return recipe.with_scheme(**given) if given else recipe


def set_rules(recipe: Recipe, rules: list[str], skips: list[str]) -> Recipe:
    """Rules of the command line go before those of the recipe, skips before rules."""
    from quantcli.recipe import KEEP, Rule

    pairs = [(pattern, KEEP) for pattern in skips] + [options.split_pair(text, "--rule") for text in rules]
    return replace(recipe, rules=(*(Rule.parse(*pair) for pair in pairs), *recipe.rules))


def default_output(source: Checkpoint, recipe: Recipe) -> Path:
    """``<model>-<recipe>`` in the current folder; ``<model>-Q4_K_M.gguf`` for GGUF."""
    model = re.sub(r"@.*$", "", source.source).rstrip("/").rsplit("/", 1)[-1]
    if model in ("", ".", ".."):
        model = source.path.resolve().name
    model = model.removesuffix(".gguf")
    if recipe.format == "gguf":
        return Path(f"{model}-{recipe.name.upper() if recipe.name.upper() == recipe.mix else recipe.name}.gguf")
    return Path(f"{model}-{recipe.name}")


def execute(
    console: Console,
    source: str,
    output: Path | None,
    recipe: Recipe,
    *,
    stats: Path | None = None,
    device: str = "auto",
    threads: int | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> None:
    """Run a recipe and render what comes of it; ``quantize`` and ``export`` share it."""
    from quantcli import pipeline
    from quantcli.checkpoint import Checkpoint
    from quantcli.writer import check_replaceable

    started = time.perf_counter()
    torch_device = options.set_up_device(device, threads)
    layers: list[LayerDone] = []
    plan: Plan | None = None
    finished: Finished | None = None
    with Checkpoint.open(source) as checkpoint:
        target = output or default_output(checkpoint, recipe)
        if not dry_run:
            check_replaceable(target.resolve(), overwrite=overwrite, folder=recipe.format != "gguf")
        calibrate = partial(load_calibration, console, checkpoint, recipe, stats)
        events = pipeline.quantize(
            checkpoint, target, recipe, calibrate=calibrate, device=torch_device, overwrite=overwrite, dry_run=dry_run
        )
        with console.progress(f"{recipe.name}: starting") as progress:
            for event in events:
                if isinstance(event, pipeline.Planned):
                    plan = event.plan
                elif isinstance(event, pipeline.LayerDone):
                    layers.append(event)
                    progress.step(event.index, event.n_layers, layer_line(event))
                else:
                    finished = event
    assert plan is not None
    report_notes(console, plan, layers)
    data = summarize(plan, target, layers, finished, time.perf_counter() - started)
    console.result(data, render_plan(console, plan) if finished is None else render_result(data))


def load_calibration(console: Console, checkpoint: Checkpoint, recipe: Recipe, stats: Path | None) -> Calibrated:
    """Statistics from a file, or token windows from the recipe's texts."""
    from quantcli import calibrate
    from quantcli.forward import tokenizer
    from quantcli.pipeline import Calibrated

    if stats is not None:
        loaded = calibrate.load_stats(stats)
        return Calibrated(dataset_sha256=loaded.dataset_sha256, stats=loaded)
    wanted = recipe.calibration
    windows = calibrate.windows_of(wanted.datasets, tokenizer(checkpoint), wanted.samples, wanted.seq_len, recipe.seed, note=console.note)
    return Calibrated(dataset_sha256=calibrate.sha256(windows), windows=windows)


def layer_line(event: LayerDone) -> str:
    error = "" if event.relative_error is None else f"  error {event.relative_error:.2e}"
    return f"{event.name}  {event.bpw:.2f} bpw{error}  {event.seconds:.1f} s"


def report_notes(console: Console, plan: Plan, layers: list[LayerDone]) -> None:
    for layer in layers:
        for report in layer.tensors:
            for note in report.notes:
                console.warn(f"{report.name}: {note}")
    for tensor in plan.tensors:
        if not tensor.outputs:
            console.warn(f"{tensor.name}: dropped, the {plan.recipe.format} format has no place for it")


def summarize(plan: Plan, target: Path, layers: list[LayerDone], finished: Finished | None, seconds: float) -> dict[str, Any]:
    """The JSON keys of quantize and export; a dry run has the plan's figures only."""
    data: dict[str, Any] = {
        "output": str(target),
        "format": plan.recipe.format,
        "recipe": plan.recipe.name,
        "n_bytes": plan.n_bytes,
        "bpw": plan.bpw,
        "tensors": plan.census(),
        "dry_run": finished is None,
    }
    if finished is None:
        return data
    return {
        **data,
        "seconds": seconds,
        "peak_ram_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "lossless": finished.lossless,
        "layers": [{"name": e.name, "relative_error": e.relative_error, "bpw": e.bpw, "seconds": e.seconds} for e in layers],
    }


def render_plan(console: Console, plan: Plan) -> list[str]:
    rows = []
    for tensor in plan.tensors:
        kind = "dropped" if not tensor.outputs else str(tensor.scheme or tensor.source.dtype.lower())
        rows.append([tensor.name, kind, "x".join(map(str, tensor.source.shape)), str(sum(s.nbytes for s in tensor.outputs))])
    total = f"{size(plan.n_bytes)}, {plan.bpw:.3f} bits per weight; nothing was written"
    return [*console.table(["tensor", "becomes", "shape", "bytes"], rows), "", total]


def render_result(data: dict[str, Any]) -> list[str]:
    census = ", ".join(f"{n} {word}" for word, n in data["tensors"].items() if n)
    errors = [layer["relative_error"] for layer in data["layers"] if layer["relative_error"] is not None]
    error = f", mean relative error {sum(errors) / len(errors):.2e}" if errors else ""
    return [
        f"{data['output']}",
        f"{size(data['n_bytes'])}, {data['bpw']:.3f} bits per weight{error}",
        f"tensors: {census}",
        f"{data['seconds']:.1f} s, peak memory {size(data['peak_ram_bytes'])}",
    ]
