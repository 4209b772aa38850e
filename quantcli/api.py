"""The library: quantize, export, calibrate, evaluate, inspect and plan as functions, with the defaults and errors of the command line."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from quantcli import formats, heap, ops
from quantcli import recipe as recipes
from quantcli.calibration import calibrate as calibration
from quantcli.calibration.calibrate import LayerMeasured, Stands
from quantcli.calibration.data import Data, Windows
from quantcli.calibration.text_check import TextCheck
from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.errors import KernelError, OptionError
from quantcli.formats import open_checkpoint
from quantcli.formats.gguf.imatrix.imatrix import Imatrix as ImportanceMatrix
from quantcli.formats.gguf.model.naming import architecture
from quantcli.forward import tokenizer
from quantcli.planning import inspection, selection, source_check
from quantcli.planning.plan import Plan
from quantcli.recipe import Recipe
from quantcli.statistics.stats_file import StatsFile
from quantcli.tensors import Scheme
from quantcli.text import texts
from quantcli.text.documents import Rows
from quantcli.walk import evaluate as evaluation
from quantcli.walk import pipeline
from quantcli.walk.encoder import LOST
from quantcli.walk.evaluate import LayerWalked, Scores
from quantcli.walk.events import Finished, LayerDone, Note, Planned
from quantcli.walk.inputs import Source, Text, check, eval_windows, is_text, learn, named, opened
from quantcli.walk.notices import (
    OnEvent,
    Witness,
    announce,
    note_to,
    tell_activations,
    tell_head,
    warn_of_few_tokens,
    warn_of_overlap,
    warn_of_text,
    windows_within,
)
from quantcli.walk.targets import check_statistics_target, check_target, write_imatrix

__all__ = ["Calibration", "ImportanceMatrix", "Plan", "Recipe", "Result", "Scheme", "Scores", "StatsFile", "Windows"]
__all__ += ["calibrate", "evaluate", "export", "inspect", "open", "plan", "quantize", "use_device"]


@dataclass(frozen=True, slots=True)
class Result:
    """What came of :func:`quantize` or :func:`export`.

    ``path``: the output, of several files the first; ``plan``: what was to be written; ``layers``: each with its error and time;
    ``lossless``: whether every value of the source is kept; ``seconds``, ``peak_ram_bytes``: of the run; ``finished``: how the text
    calibrated it. ``lossless`` and ``finished`` are None after a dry run. ``warnings``: all that were told; ``rows``: of the datasets read.
    """

    path: Path
    plan: Plan
    layers: tuple[LayerDone, ...]
    lossless: bool | None
    seconds: float
    peak_ram_bytes: int
    finished: Finished | None = None
    warnings: tuple[str, ...] = ()
    rows: tuple[Rows, ...] = ()

    @property
    def noted(self) -> dict[str, list[str]]:
        """What happened to single tensors that a user should know: fall-backs, what was lost."""
        return {report.name: list(report.notes) for layer in self.layers for report in layer.tensors if report.notes}

    @property
    def lost(self) -> dict[str, float]:
        """Tensors of which little is left → their relative error."""
        return {r.name: r.loss for layer in self.layers for r in layer.tensors if r.loss >= LOST}

    def to_dict(self) -> dict[str, Any]:
        """The JSON keys of ``quantize`` and ``export``; of a dry run those that a plan can know, the others null."""
        plan, finished = self.plan, self.finished
        known = finished.text_check if finished is not None else None
        errors = ("relative_error", "held_out_error")
        walked = [
            {"name": e.name, "relative_error": e.relative_error, "held_out_error": e.held_out_error, "bpw": e.bpw, "seconds": e.seconds}
            for e in self.layers
        ]
        planned = [{"name": layer.name, **dict.fromkeys(errors), "bpw": layer.bpw, "seconds": None} for layer in plan.layers]
        return {
            "output": str(self.path),
            "format": plan.recipe.format,
            "recipe": plan.recipe.name,
            "n_bytes": plan.n_bytes,
            "bpw": plan.bpw,
            "tensors": plan.census(),
            "coverage": plan.coverage,
            "warnings": list(self.warnings),
            "notes": self.noted,
            "lost": self.lost,
            "rows": [rows.to_dict() for rows in self.rows],
            "dry_run": finished is None,
            "seconds": self.seconds,
            "peak_ram_bytes": self.peak_ram_bytes,
            "lossless": self.lossless,
            "dataset_sha256": finished.dataset_sha256 if finished is not None else None,
            "calibrated_by": finished.calibrated_by if finished is not None else None,
            "calibration_perplexity": known.perplexity if known is not None else None,
            "layers": planned if finished is None else walked,
        }


@dataclass(frozen=True, slots=True)
class Calibration:
    """What came of :func:`calibrate`. ``stats``: the file; ``imatrix``: llama.cpp's, where one was asked for; ``taps``: how many inputs
    were measured; ``text_check``: how well the model knows the text, None of one that predicts no text; ``tokens_per_input``: of each
    tap; ``warnings``: all that were told; ``rows``: of the datasets read."""

    stats: Path
    imatrix: Path | None
    n_samples: int
    n_tokens: int
    taps: int
    dataset_sha256: str
    text_check: TextCheck | None
    seconds: float
    tokens_per_input: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    rows: tuple[Rows, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The JSON keys of ``calibrate``."""
        return {
            "stats": str(self.stats),
            "imatrix": None if self.imatrix is None else str(self.imatrix),
            "n_samples": self.n_samples,
            "n_tokens": self.n_tokens,
            "taps": self.taps,
            "dataset_sha256": self.dataset_sha256,
            "calibration_perplexity": None if self.text_check is None else self.text_check.perplexity,
            "tokens_per_input": dict(self.tokens_per_input),
            "warnings": list(self.warnings),
            "rows": [rows.to_dict() for rows in self.rows],
            "seconds": self.seconds,
        }


def open(source: str | os.PathLike[str]) -> Checkpoint:
    """The checkpoint at ``source``, a context manager: ``specs``, ``schemes``, ``read(name)``. Headers are read, no weights.

    Raises :class:`CheckpointError` for what is missing, damaged or unsafe, :class:`UnsupportedError` for a dialect nobody here reads.
    """
    return open_checkpoint(os.fspath(source))


def inspect(
    source: Source, *, tensors: bool = False, memory: bool = False, context: int = 4096, stats: str | os.PathLike[str] | None = None
) -> dict[str, Any]:
    """What ``source`` holds, by the JSON keys of ``quantcli inspect``; ``tensors``, ``memory`` and ``stats`` add theirs."""
    with opened(source) as checkpoint:
        data = inspection.describe(checkpoint)
        data["notes"] += [finding.text for finding in source_check.look(checkpoint)]
        if tensors:
            data["tensors"] = inspection.list_tensors(checkpoint)
        if memory:
            data["memory"] = inspection.estimate(checkpoint, context)
        if stats is not None:
            measured = StatsFile(Path(stats))
            measured.check_source(checkpoint, warn=data["notes"].append)
            data["stats"] = inspection.describe_stats(measured)
        return data


def plan(source: Source, recipe: str | Recipe, *, data: Text | Data | None = None) -> Plan:
    """What :func:`quantize` would write: every tensor, scheme and byte. Reads no weight, writes nothing."""
    return quantize(source, recipe=recipe, data=data, device="cpu", dry_run=True).plan


def quantize(
    source: Source,
    output: str | os.PathLike[str] | None = None,
    recipe: str | Recipe | Callable[[Checkpoint], Recipe] = "gptq-int4",
    *,
    data: Text | Data | None = None,
    device: str = "auto",
    threads: int | None = None,
    overwrite: bool = False,
    fresh: bool = False,
    dry_run: bool = False,
    on_event: OnEvent | None = None,
) -> Result:
    """Write ``source`` to ``output`` as ``recipe`` says: one by name, a YAML file's path, or a :class:`Recipe`.

    ``output``: a folder, or a file for GGUF; ``<model>-<recipe>`` in the current folder when left out. ``data``: text to calibrate on, or
    a :class:`StatsFile`, or an :class:`ImportanceMatrix`; the default text where the recipe needs some and nothing is given. ``device``:
    auto, cpu, cuda or cuda:N. ``overwrite`` replaces a finished output. ``on_event`` is called with the events of the run as they come.

    A run that was stopped leaves ``<output>.part``; the same call goes on behind its last finished layer, and ends with the same bytes.
    ``fresh`` drops that work.

    Raises the errors of :mod:`quantcli.errors`; nothing stands at ``output`` unless the run ends well.
    """
    tell, started = Witness(on_event), time.perf_counter()
    torch_device = use_device(device, threads)
    layers: list[LayerDone] = []
    made: Plan | None = None
    finished: Finished | None = None
    with opened(source) as checkpoint:
        chosen = recipe if isinstance(recipe, Recipe) else recipe(checkpoint) if callable(recipe) else recipes.load(recipe)
        check(checkpoint, tell, takes_config=chosen.is_calibrated or not formats.of(chosen.format).has_own_names)
        if data is not None and is_text(data):
            chosen, data = selection.with_text(chosen, datasets=named(data)), None
        target = selection.default_output(checkpoint, chosen) if output is None else Path(output)
        is_split = "split_max_size" in chosen.format_options  # whose files the writer alone knows
        learned = learn(checkpoint, chosen, data, tell)
        walk = pipeline.quantize(
            checkpoint, target, chosen, data=learned, device=torch_device, overwrite=overwrite, fresh=fresh, dry_run=dry_run
        )
        with closing(walk):
            for event in walk:
                tell(event)
                if isinstance(event, Planned):
                    made = event.plan
                    announce(checkpoint, event, tell)
                    if not dry_run and not is_split:
                        check_target(target, overwrite=overwrite, folder=chosen.format != "gguf")
                elif isinstance(event, LayerDone):
                    layers.append(event)
                elif isinstance(event, Finished):
                    finished = event
                    for warning in event.warnings:
                        note_to(tell, warning, is_warning=True)
        if finished is not None and finished.text_check is not None:
            warn_of_text(finished.text_check, tell)
    assert made is not None
    if finished is not None and is_split:
        target = target.with_name(finished.output.name)  # the first of several files
    lossless = None if finished is None else finished.lossless
    seconds, told = time.perf_counter() - started, (tuple(tell.warnings), tuple(tell.rows))
    return Result(target, made, tuple(layers), lossless, seconds, heap.peak_bytes(), finished, *told)


def export(
    source: Source,
    output: str | os.PathLike[str] | None = None,
    type: str | None = None,
    *,
    format: str = "gguf",
    data: Data | None = None,
    options: Mapping[str, Any] | None = None,
    device: str = "auto",
    threads: int | None = None,
    overwrite: bool = False,
    fresh: bool = False,
    dry_run: bool = False,
    on_event: OnEvent | None = None,
) -> Result:
    """Convert ``source`` to ``format`` without calibration; codes of a quantized source stay as they are where the target holds them.

    ``type``: a GGUF file type (Q4_K_M) or a scheme (int4-g128-sym); the first that keeps the source's codes when left out. ``data``: an
    :class:`ImportanceMatrix` or :class:`StatsFile` by which GGUF's types are rounded; ``options``: of the format (llama-quantize's names).
    """
    format = selection.writable(format)
    given = None if type is None else selection.of_type(format, type)

    def choose(checkpoint: Checkpoint) -> Recipe:
        return replace(given or selection.that_keeps(checkpoint, format), format_options=dict(options or {}))

    return quantize(
        source,
        output,
        choose,
        data=data,
        device=device,
        threads=threads,
        overwrite=overwrite,
        fresh=fresh,
        dry_run=dry_run,
        on_event=on_event,
    )


def calibrate(
    source: Source,
    output: str | os.PathLike[str],
    *,
    data: Text = (),
    samples: int = 128,
    seq_len: int = 2048,
    hessian: bool = True,
    histograms: bool = False,
    imatrix: str | os.PathLike[str] | None = None,
    moe: str = "routed",
    device: str = "auto",
    threads: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
    fresh: bool = False,
    on_event: OnEvent | None = None,
) -> Calibration:
    """Run text through ``source`` and write what its linears read to ``output``, a file of statistics that serves every method.

    ``hessian``: gather H, which gptq and awq need; ``histograms``: count magnitudes, which a recipe's ``input_range`` may need;
    ``imatrix``: also write llama.cpp's importance matrix there; ``moe``: "routed" or "all" tokens for each expert.
    """
    tell, started = Witness(on_event), time.perf_counter()
    if moe not in recipes.MOE:
        raise OptionError("moe", f"expected {' or '.join(recipes.MOE)}, not '{moe}'")
    torch_device, target = use_device(device, threads), Path(output)
    matrix = None if imatrix is None else Path(imatrix)
    check_statistics_target(target, matrix, overwrite=overwrite)
    n_taps, known = 0, None
    with opened(source) as checkpoint:
        check(checkpoint, tell)
        seq_len = windows_within(checkpoint, seq_len, tell)
        tell_head(checkpoint, tell)
        if matrix is not None:
            architecture(checkpoint.config)  # names are GGUF's: what has none fails before the work
        note = partial(note_to, tell)
        ids = texts.windows_of(named(data), tokenizer(checkpoint), samples, seq_len, seed, note=note, read=tell.read)
        walk = calibration.calibrate(
            checkpoint,
            ids,
            target,
            hessian=hessian,
            histograms=histograms,
            head=True,
            moe=moe,
            device=torch_device,
            overwrite=overwrite,
            fresh=fresh,
        )
        for event in walk:
            tell(event)
            if isinstance(event, TextCheck):
                known = event
            elif isinstance(event, Stands):
                for text in event.notes:
                    note_to(tell, text, is_warning=True)
            elif isinstance(event, LayerMeasured):
                n_taps += event.n_taps
        if matrix is not None:
            write_imatrix(matrix, StatsFile(target), checkpoint, named(data), overwrite=overwrite, tell=tell)
    if known is not None:
        warn_of_text(known, tell)
    per_input = warn_of_few_tokens(StatsFile(target), tell)
    seconds, told = time.perf_counter() - started, (tuple(tell.warnings), tuple(tell.rows))
    return Calibration(target, matrix, ids.shape[0], ids.numel(), n_taps, texts.sha256(ids), known, seconds, per_input, *told)


def evaluate(
    source: Source,
    *,
    baseline: Source | None = None,
    data: Text = (),
    samples: int = 64,
    seq_len: int = 512,
    activations: bool = True,
    device: str = "auto",
    threads: int | None = None,
    on_event: OnEvent | None = None,
) -> Scores:
    """Perplexity of ``source``, and with ``baseline``, the model it was made from, KL divergence and top-1 agreement.

    ``activations``: round the inputs of quantized linears as their engine does. The scores have ``n_bytes`` and ``bpw``, too.
    """
    tell = Witness(on_event)
    torch_device = use_device(device, threads)
    scores: Scores | None = None
    with ExitStack() as stack:
        checkpoint = stack.enter_context(opened(source))
        original = None if baseline is None else stack.enter_context(opened(baseline))
        for model in (checkpoint, *([original] if original is not None else [])):
            check(model, tell)
            tell_head(model, tell)
        tell_activations(checkpoint, activations, tell)
        ids = eval_windows(original or checkpoint, data, samples, seq_len, tell)
        warn_of_overlap(checkpoint, ids, tell)
        for event in evaluation.evaluate(checkpoint, ids, baseline=original, device=torch_device, activations=activations):
            if isinstance(event, LayerWalked):
                tell(event)
            else:
                scores = event
        n_bytes = sum(spec.nbytes for spec in checkpoint.specs.values())
        n_params = sum(spec.n_elements for spec in (original or checkpoint).specs.values())
    assert scores is not None
    if left := scores.not_simulated:
        tell(Note(f"the inputs of {len(left)} matrices are taken as they are, where the engine rounds them; the first is {left[0]}", True))
    return replace(scores, n_bytes=n_bytes, bpw=8 * n_bytes / n_params)


def use_device(device: str = "auto", threads: int | None = None) -> str:
    """The torch device that ``device`` means (auto, cpu, cuda, cuda:N), with ``threads`` set for torch and for our kernels."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise OptionError("device", f"expected auto, cpu, cuda or cuda:N, not '{device}'")
    if threads is not None:
        ops.set_threads(threads)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda"):
        index = int(device.partition(":")[2] or 0)
        if index >= torch.cuda.device_count():
            raise KernelError(f"--device {device}: this machine has {torch.cuda.device_count()} CUDA devices; use --device cpu")
    return device
