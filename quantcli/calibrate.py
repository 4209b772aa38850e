"""Token windows → Stats for each tap, measured layer by layer and streamed to a file of statistics.

Memory: one layer, the H of its taps, and the hidden states of all windows (n_tokens · hidden · 4 bytes, 2 in bfloat16).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantcli import familiarity
from quantcli.arrange import open_forward
from quantcli.checkpoint import Checkpoint
from quantcli.errors import NumericsError
from quantcli.experts import expert_of
from quantcli.familiarity import Familiarity
from quantcli.forward import Forward, LoadedLayer, run_dtype
from quantcli.meter import StatsMeter
from quantcli.outliers import Figures, figures_of
from quantcli.readahead import reading_ahead
from quantcli.shards import file_layout
from quantcli.stats_file import DIAGONAL_PARTS, put_stats, stats_metadata, stats_specs
from quantcli.tensors import HEAD, Stats
from quantcli.writer import Writer

if TYPE_CHECKING:
    from quantcli.original import Original

BATCH_TOKENS = 2048
"""Tokens that a layer runs at once (at least one window): enough to keep a GEMM busy, few enough for the activations to stay small."""

MAX_HESSIAN_BYTES = 8 << 30
"""H of one layer that is held at a time, where a layer of many experts has more: these are measured in several runs of the layer."""

DIAGONALS = frozenset(DIAGONAL_PARTS)
EVERYTHING = DIAGONALS | {"H"}

MOE = "moe"
"""The key of the file's metadata that tells which tokens experts were measured on; only models that have experts have it."""


def kept_on(device: torch.device, n_bytes: int) -> torch.device:
    """Where hidden states of ``n_bytes`` stay between layers: on a GPU when they take no more than half of what it has free."""
    if device.type == "cuda" and n_bytes > torch.cuda.mem_get_info(device)[0] // 2:
        return torch.device("cpu")
    return device


def at_once(ids: Tensor) -> list[slice]:
    """The windows of ``ids`` [n, T] in the batches that a layer runs: about :data:`BATCH_TOKENS` each."""
    step = max(1, BATCH_TOKENS // ids.shape[1])
    return [slice(i, i + step) for i in range(0, len(ids), step)]


class Activations:
    """The hidden states that all windows bring to the next layer.

    ``ids``: [n, T] int64; ``hidden``: [n, T, hidden] in the run's dtype, on its device where that has room, replaced in place as the
    layers advance; ``original``: the same windows in the model before it was quantized, where dXXT is to be measured.
    """

    original: Original | None = None

    def __init__(self, ids: Tensor, hidden: Tensor) -> None:
        self.ids = ids
        self.hidden = hidden

    @classmethod
    def embed(cls, forward: Forward, ids: Tensor) -> Activations:
        """What the first layer is given for ``ids``: [n, T] int64."""
        hidden: Tensor | None = None
        for windows in at_once(ids):
            batch = forward.embed(ids[windows])
            if hidden is None:
                shape = (*ids.shape, batch.shape[-1])
                hidden = torch.empty(shape, dtype=batch.dtype, device=kept_on(batch.device, math.prod(shape) * batch.itemsize))
            hidden[windows] = batch
        assert hidden is not None
        return cls(ids, hidden)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Hidden states [b, T, hidden], a view, and ids [b, T]."""
        for windows in at_once(self.ids):
            yield self.hidden[windows], self.ids[windows]

    def advance(self, layer: LoadedLayer) -> None:
        """Go through ``layer``."""
        for hidden, ids in self.batches():
            hidden.copy_(layer(hidden, ids))

    def beside(self, index: int) -> AbstractContextManager[None]:
        """While it lasts layer ``index`` of the original, if there is one, can be measured; then its windows have gone through it."""
        return nullcontext() if self.original is None else self.original.layer(index)

    def measure(self, layer: LoadedLayer, taps: Sequence[str] | None = None, needs: frozenset[str] = EVERYTHING) -> dict[str, Stats]:
        """Stats of ``taps`` (None: all of the layer's) for the windows as they stand; H and dXXT only where ``needs`` has them.

        The tap of an expert that no token was routed to has zeros, of no tokens; one whose tokens the router chooses has no dXXT.
        """
        meters = _meters(layer, needs, taps)
        drifting = [tap for tap, meter in meters.items() if meter.has_drift]
        originals = self.original.inputs(drifting) if self.original and drifting else repeat({})
        for (hidden, ids), X0 in zip(self.batches(), originals, strict=False):
            layer.inputs(hidden, ids, partial(_gather, meters, X0), meters)
        return _finished(meters)

    def histograms(self, layer: LoadedLayer, scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tap → histogram [ranges.N_BINS] of what it reads divided by s [in], for ``scales``: tap → s. A run of ``layer`` as it is."""
        meters = {tap: StatsMeter(len(s), False, layer.device, histogram=True) for tap, s in scales.items()}
        divisors = {tap: s.to(layer.device, torch.float32) for tap, s in scales.items()}
        for hidden, ids in self.batches():
            layer.inputs(hidden, ids, lambda tap, X: meters[tap].add(X / divisors[tap]), meters)
        found = {tap: stats.histogram for tap, stats in _finished(meters).items()}
        return {tap: histogram for tap, histogram in found.items() if histogram is not None}

    def measure_and_advance(
        self, layer: LoadedLayer, needs: frozenset[str] = EVERYTHING, taps: Sequence[str] | None = None
    ) -> dict[str, Stats]:
        """Stats of ``taps`` (None: all) of ``layer`` while going through it: one run instead of two."""
        meters = _meters(layer, needs, taps)
        for hidden, ids in self.batches():
            hidden.copy_(layer.observe(hidden, ids, partial(_gather, meters, {}), meters))
        return _finished(meters)


def _meters(layer: LoadedLayer, needs: frozenset[str], taps: Sequence[str] | None = None) -> dict[str, StatsMeter]:
    """A meter for each of ``taps``, its linears' or its caches', or (None) of all its linears'."""
    widths, caches, meters = layer.tap_widths, layer.cache_widths, {}
    for tap in sorted(widths if taps is None else taps):
        if tap in caches:  # which no linear reads
            meters[tap] = StatsMeter(caches[tap], False, layer.device, histogram="histogram" in needs)
            continue
        drift = "dXXT" in needs and (layer.shows_all_tokens or not expert_of(tap))
        meters[tap] = StatsMeter(widths[tap], "H" in needs, layer.device, histogram="histogram" in needs, drift=drift)
    return meters


def shares(taps: Iterable[str], widths: Mapping[str, int], needs: frozenset[str]) -> list[list[str]]:
    """``taps`` of a layer in parts of at most :data:`MAX_HESSIAN_BYTES` of H: all taps of an expert in one, those of no expert in the last.

    No expert reads what another one makes, and nothing else of the layer what they make, so parts may be measured and coded in turn.
    """
    groups: dict[str, list[str]] = {}
    for tap in taps:
        at = expert_of(tap)
        groups.setdefault(at.expert if at else "", []).append(tap)
    groups[""] = groups.pop("", [])  # last
    parts: list[list[str]] = [[]]
    room = MAX_HESSIAN_BYTES
    for group in groups.values():
        n_bytes = sum(4 * widths[tap] ** 2 for tap in group) * len(needs & {"H", "dXXT"})
        if n_bytes > room and parts[-1]:
            parts.append([])
            room = MAX_HESSIAN_BYTES
        parts[-1] += group
        room -= n_bytes
    return [part for part in parts if part]


def in_turn(taps: Sequence[str]) -> list[list[str]]:
    """``taps`` one after the other, but those together that differ by the number of an expert: none of these sees another."""
    stages: dict[str, list[str]] = {}
    for tap in taps:
        at = expert_of(tap)
        stages.setdefault(f"{at.stack}.{at.linear}" if at else tap, []).append(tap)
    return list(stages.values())


def _finished(meters: Mapping[str, StatsMeter]) -> dict[str, Stats]:
    """Stats of every meter. Raises :class:`NumericsError` where one is not finite."""
    result: dict[str, Stats] = {}
    for tap, meter in meters.items():
        stats = meter.stats()
        total = stats.importance.sum() if stats.H is None else stats.H.sum()
        if not torch.isfinite(total) or not torch.isfinite(stats.mean).all():
            raise NumericsError(
                f"{tap}: its inputs have NaN or Inf, or squares beyond float32; the calibration text or a weight is at fault"
            )
        result[tap] = stats
    return result


@dataclass(frozen=True, slots=True)
class LayerMeasured:
    """One layer's taps are in the stats file."""

    name: str
    index: int
    n_layers: int
    n_taps: int
    seconds: float


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
) -> Iterator[LayerMeasured | Familiarity]:
    """Measure every tap of ``checkpoint``, its caches' too, on token windows ``ids`` [n, T] and write the statistics to ``target``.

    With ``head`` also what the output embedding reads. ``moe`` "routed": an expert is measured on the tokens routed to it; "all": on every
    token. The last event tells how well the model knows the text. The file stands under its name only after it.
    """
    needs = (EVERYTHING if hessian else DIAGONALS) | ({"histogram"} if histograms else set())
    dtype = run_dtype(checkpoint.specs.values(), device)
    forward = open_forward(checkpoint, dtype=dtype, device=device, all_tokens=moe == "all")
    specs = stats_specs(tap_widths(forward, head=head), hessian=hessian, histograms=histograms)
    caches = {tap: width for cache in forward.caches for tap, width in cache.widths.items()}
    specs += stats_specs(caches, hessian=False, histograms=histograms)
    with Writer(target, overwrite=overwrite, folder=False) as writer:
        experts = {MOE: moe} if forward.has_experts else {}
        writer.declare([file_layout(target.name, specs, stats_metadata(checkpoint, ids) | experts)])
        activations = Activations.embed(forward, ids)
        n_layers = len(forward.layers) + head
        for i, name in enumerate(reading_ahead(forward.layers, forward.layers, forward.checkpoint.locations())):
            started = time.perf_counter()
            with forward.layer(i) as layer:
                *first, last = shares(sorted(layer.tap_widths), layer.tap_widths, needs) or [[]]
                for taps in first:
                    put_stats(writer, activations.measure(layer, taps, needs))
                put_stats(writer, activations.measure_and_advance(layer, needs, [*last, *layer.cache_widths]))
                n_taps = len(layer.tap_widths)
            yield LayerMeasured(name, i, n_layers, n_taps, time.perf_counter() - started)
        if head:
            started = time.perf_counter()
            put_stats(writer, measure_head(forward, activations, needs))
            yield LayerMeasured(HEAD, n_layers - 1, n_layers, 1, time.perf_counter() - started)
        few = familiarity.sampled(ids)
        yield familiarity.measure(forward, Activations(ids[few], activations.hidden[few]), ids)
        writer.commit()


def figures_by_tap(forward: Forward, ids: Tensor) -> dict[str, Figures]:
    """The figures of every tap of a model as it is, for token windows ``ids`` [n, T]: one run, without H."""
    found: dict[str, Figures] = {}
    activations = Activations.embed(forward, ids)
    for i in range(len(forward.layers)):
        with forward.layer(i) as layer:
            found |= {tap: figures_of(stats) for tap, stats in activations.measure_and_advance(layer, DIAGONALS).items()}
    return found


def measure_head(forward: Forward, activations: Activations, needs: frozenset[str] = EVERYTHING) -> dict[str, Stats]:
    """Stats of what the output embedding reads, for windows that have gone through all layers."""
    drift, histogram = "dXXT" in needs, "histogram" in needs
    meters = {HEAD: StatsMeter(forward.head_in_features, "H" in needs, forward.device, histogram=histogram, drift=drift)}
    originals = activations.original.head_inputs() if activations.original and drift else repeat({})
    for (hidden, _), X0 in zip(activations.batches(), originals, strict=False):
        forward.observe_head(hidden, partial(_gather, meters, X0, HEAD))
    return _finished(meters)


def _gather(meters: Mapping[str, StatsMeter], originals: Mapping[str, list[Tensor]], tap: str, X: Tensor) -> None:
    """Add X [n_tokens, in] to the meter of ``tap``, with what the model before it was quantized has in its place, if that is known."""
    meters[tap].add(X)
    if tap in originals:
        meters[tap].add_drift(X, originals[tap].pop(0))


def tap_widths(forward: Forward, *, head: bool) -> dict[str, int]:
    """Tap → in_features."""
    widths = {tap: forward.checkpoint.specs[name].shape[-1] for name, tap in forward.taps.items()}
    return widths | {HEAD: forward.head_in_features} if head else widths
