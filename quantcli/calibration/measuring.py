"""Measures the inputs of a layer's taps while hidden states run through it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import repeat

import torch
from torch import Tensor

from quantcli.calibration.original import Original
from quantcli.errors import NumericsError
from quantcli.experts import expert_of
from quantcli.forward import Forward, HiddenStates, LoadedLayer
from quantcli.statistics.meter import StatsMeter
from quantcli.statistics.outliers import Figures, figures_of
from quantcli.statistics.stats_file import DIAGONAL_PARTS
from quantcli.tensors import HEAD, Stats

MAX_HESSIAN_BYTES = 8 << 30
"""H of one layer that is held at a time, where a layer of many experts has more: these are measured in several runs of the layer."""

DIAGONALS = frozenset(DIAGONAL_PARTS)
EVERYTHING = DIAGONALS | {"H"}


def measure(
    layer: LoadedLayer,
    states: HiddenStates,
    *,
    taps: Sequence[str] | None = None,
    needs: frozenset[str] = EVERYTHING,
    original: Original | None = None,
) -> dict[str, Stats]:
    """Stats of ``taps`` (None: all of the layer's) for ``states``, which stay as they stand; H and dXXT only where ``needs`` has them.

    dXXT is told from ``original``, which has the same layer in memory. The tap of an expert that no token was routed to has zeros, of no
    tokens; one whose tokens the router chooses has no dXXT.
    """
    assert original is not None or "dXXT" not in needs
    meters = _meters(layer, taps, needs)
    drifting = [tap for tap, meter in meters.items() if meter.has_drift]
    originals = original.inputs(drifting) if original and drifting else repeat({})
    for (hidden, ids), X0 in zip(states.batches(), originals, strict=False):
        layer.inputs(hidden, ids, partial(_gather, meters, X0), meters)
    return _finished(meters)


def measure_and_advance(
    layer: LoadedLayer, states: HiddenStates, *, taps: Sequence[str] | None = None, needs: frozenset[str] = EVERYTHING
) -> dict[str, Stats]:
    """Stats of ``taps`` (None: all of the layer's) while ``states`` go through it: one run instead of two."""
    assert "dXXT" not in needs
    meters = _meters(layer, taps, needs)
    states.advance(lambda hidden, ids: layer.observe(hidden, ids, partial(_gather, meters, {}), meters))
    return _finished(meters)


def kept_inputs(layer: LoadedLayer, states: HiddenStates, taps: Sequence[str]) -> dict[str, Tensor]:
    """What ``taps`` read of ``states``, all of it: tap → X [n_tokens, in] float32. Of few windows, or it takes much memory."""
    seen: dict[str, list[Tensor]] = {tap: [] for tap in taps}
    for hidden, ids in states.batches():
        layer.inputs(hidden, ids, lambda tap, X: seen[tap].append(X.float().clone()), taps)
    return {tap: torch.cat(parts) for tap, parts in seen.items() if parts}


def measure_head(
    forward: Forward, states: HiddenStates, *, needs: frozenset[str] = EVERYTHING, original: Original | None = None
) -> dict[str, Stats]:
    """Stats of what the output embedding reads, for ``states`` that have gone through all layers, as those of ``original`` have."""
    drift, histogram = "dXXT" in needs, "histogram" in needs
    assert original is not None or not drift
    meters = {HEAD: StatsMeter(forward.head_in_features, "H" in needs, forward.device, histogram=histogram, drift=drift)}
    originals = original.head_inputs() if original and drift else repeat({})
    for (hidden, _), X0 in zip(states.batches(), originals, strict=False):
        forward.observe_head(hidden, partial(_gather, meters, X0, HEAD))
    return _finished(meters)


def histograms(layer: LoadedLayer, states: HiddenStates, scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tap → histogram [ranges.N_BINS] of what it reads divided by s [in], for ``scales``: tap → s. A run of ``layer`` as it is."""
    meters = {tap: StatsMeter(len(s), False, layer.device, histogram=True) for tap, s in scales.items()}
    divisors = {tap: s.to(layer.device, torch.float32) for tap, s in scales.items()}
    for hidden, ids in states.batches():
        layer.inputs(hidden, ids, lambda tap, X: meters[tap].add(X / divisors[tap]), meters)
    found = {tap: stats.histogram for tap, stats in _finished(meters).items()}
    return {tap: histogram for tap, histogram in found.items() if histogram is not None}


def figures_by_tap(forward: Forward, ids: Tensor) -> dict[str, Figures]:
    """The figures of every tap of a model as it is, for token windows ``ids`` [n, T]: one run, without H."""
    found: dict[str, Figures] = {}
    states = HiddenStates.embed(forward, ids)
    for i in range(len(forward.layers)):
        with forward.layer(i) as layer:
            found |= {tap: figures_of(stats) for tap, stats in measure_and_advance(layer, states, needs=DIAGONALS).items()}
    return found


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


def _meters(layer: LoadedLayer, taps: Sequence[str] | None, needs: frozenset[str]) -> dict[str, StatsMeter]:
    """A meter for each of ``taps``, its linears' or its caches', or (None) of all its linears'."""
    widths, caches, meters = layer.tap_widths, layer.cache_widths, {}
    for tap in sorted(widths if taps is None else taps):
        if tap in caches:  # which no linear reads
            meters[tap] = StatsMeter(caches[tap], False, layer.device, histogram="histogram" in needs)
            continue
        drift = "dXXT" in needs and (layer.shows_all_tokens or not expert_of(tap))
        meters[tap] = StatsMeter(widths[tap], "H" in needs, layer.device, histogram="histogram" in needs, drift=drift)
    return meters


def _gather(meters: Mapping[str, StatsMeter], originals: Mapping[str, list[Tensor]], tap: str, X: Tensor) -> None:
    """Add X [n_tokens, in] to the meter of ``tap``, with what the model before it was quantized has in its place, if that is known."""
    meters[tap].add(X)
    if tap in originals:
        meters[tap].add_drift(X, originals[tap].pop(0))


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
