"""The loop of `calibrate`: runs token windows through a model layer by layer and writes statistics of each tap to a file.

Memory: one layer, the H of its taps, and the hidden states of all windows (n_tokens · hidden · 4 bytes, 2 in bfloat16).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from quantcli.calibration import resume, text_check
from quantcli.calibration.measuring import DIAGONALS, EVERYTHING, measure, measure_and_advance, measure_head, shares
from quantcli.calibration.resume import Resume, Resumed
from quantcli.calibration.text_check import TextCheck
from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.readahead import reading_ahead
from quantcli.checkpoint.shards import file_layout
from quantcli.forward import Forward, HiddenStates, run_dtype
from quantcli.output.journal import Run
from quantcli.output.writer import Writer
from quantcli.planning.arrange import open_forward
from quantcli.statistics.stats_file import put_stats, stats_metadata, stats_specs
from quantcli.tensors import HEAD
from quantcli.text import texts

MOE = "moe"
"""The key of the file's metadata that tells which tokens experts were measured on; only models that have experts have it."""


@dataclass(frozen=True, slots=True)
class LayerMeasured:
    """One layer's taps are in the stats file."""

    name: str
    index: int
    n_layers: int
    n_taps: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Stands:
    """The file has its name, and something behind that failed: ``notes``."""

    notes: tuple[str, ...]


def calibrate(
    checkpoint: Checkpoint,
    ids: Tensor,
    target: Path,
    *,
    hessian: bool = True,
    histograms: bool = False,
    head: bool = False,
    moe: str = "routed",
    device: str = "cpu",
    overwrite: bool = False,
    fresh: bool = False,
) -> Iterator[Resumed | LayerMeasured | TextCheck | Stands]:
    """Measure every tap of ``checkpoint``, its caches' too, on token windows ``ids`` [n, T] and write the statistics to ``target``.

    With ``head`` also what the output embedding reads, where the model predicts tokens by one. ``moe`` "routed": an expert is measured on
    the tokens routed to it; "all": on every token. The last event of a model that predicts text tells how well it knows this one. The
    file stands under its name only after it. A run that was stopped is continued by the same call; ``fresh`` starts over.
    """
    needs = (EVERYTHING if hessian else DIAGONALS) | ({"histogram"} if histograms else set())
    dtype = run_dtype(checkpoint.specs.values(), device)
    forward = open_forward(checkpoint, dtype=dtype, device=device, all_tokens=moe == "all")
    head = head and forward.predicts
    specs = stats_specs(tap_widths(forward, head=head), hessian=hessian, histograms=histograms)
    caches = {tap: width for cache in forward.caches for tap, width in cache.widths.items()}
    specs += stats_specs(caches, hessian=False, histograms=histograms)
    wanted = {"windows": texts.sha256(ids), "statistics": sorted(needs), "moe": moe}
    run = Run(resume.identity(checkpoint, device, **wanted), fresh)
    with Writer(target, overwrite=overwrite, folder=False, run=run) as writer:
        experts = {MOE: moe} if forward.has_experts else {}
        writer.declare([file_layout(target.name, specs, stats_metadata(checkpoint, ids) | experts)])
        n_layers, finished = len(forward.layers) + head, Resume(writer)
        yield from earlier(finished, n_layers)
        n_done = len(finished.steps)
        states = HiddenStates.enter(forward, ids, finished.states().get("states"))
        left = forward.layers[n_done:]
        for i, name in enumerate(reading_ahead(left, left, forward.checkpoint.locations()), n_done):
            started = time.perf_counter()
            with forward.layer(i) as layer:
                *first, last = shares(sorted(layer.tap_widths), layer.tap_widths, needs) or [[]]
                for taps in first:
                    put_stats(writer, measure(layer, states, taps=taps, needs=needs))
                put_stats(writer, measure_and_advance(layer, states, taps=[*last, *layer.cache_widths], needs=needs))
                n_taps = len(layer.tap_widths)
            yield done(finished, LayerMeasured(name, i, n_layers, n_taps, time.perf_counter() - started), states)
        if head and n_done < n_layers:
            started = time.perf_counter()
            put_stats(writer, measure_head(forward, states, needs=needs))
            yield done(finished, LayerMeasured(HEAD, n_layers - 1, n_layers, 1, time.perf_counter() - started))
        if forward.predicts:
            yield text_check.measure(forward, states.of(text_check.sampled(ids)), ids)
        writer.commit()
    if writer.notes:
        yield Stands(tuple(writer.notes))


def earlier(finished: Resume, n_layers: int) -> Iterator[Resumed | LayerMeasured]:
    """What an earlier process measured, told again."""
    if finished.steps:
        yield Resumed(finished.writer.work.path, len(finished.steps), n_layers)
    for i, step in enumerate(finished.steps):
        yield LayerMeasured(step.name, i, n_layers, step.told["n_taps"], step.told["seconds"])


def done(finished: Resume, event: LayerMeasured, states: HiddenStates | None = None) -> LayerMeasured:
    """``event``, whose layer is on the record now; ``states``: what the next layer reads."""
    told = {"n_taps": event.n_taps, "seconds": event.seconds}
    finished.finish(event.name, told, None if states is None else {"states": states.hidden})
    return event


def tap_widths(forward: Forward, *, head: bool) -> dict[str, int]:
    """Tap → in_features."""
    specs = forward.checkpoint.specs
    widths = {tap: specs[name].shape[0 if name in forward.turned else -1] for name, tap in forward.taps.items()}
    return widths | {HEAD: forward.head_in_features} if head else widths
