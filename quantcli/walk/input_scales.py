"""The static input scale of a coded weight: of its own inputs' range, or of the widest of the other experts where it has none."""

from __future__ import annotations

from collections.abc import Mapping

from quantcli.errors import RecipeError
from quantcli.experts import expert_of
from quantcli.passes.shared import activations
from quantcli.statistics.ranges import find_range
from quantcli.tensors import QuantizedTensor, Stats


def with_input_scale(name: str, tensor: QuantizedTensor, tap: str, stats: Mapping[str, Stats], method: str) -> tuple[QuantizedTensor, str]:
    """``tensor`` with the part ``input_scale``, where its scheme has the engine quantize inputs by a scale found beforehand.

    ``stats``: of the layer's taps; ``method``: how the range is found that the scale spans (:data:`quantcli.statistics.ranges.METHODS`).
    Also returns a note, empty where the inputs of ``tap`` told the range. :class:`RecipeError` where nobody measured them.
    """
    if not tensor.scheme.static_activations:
        return tensor, ""
    if tap not in stats:
        raise RecipeError(
            f"{name}: {tensor.scheme} needs the range of its inputs, and there are no statistics of them; calibrate this model again"
        )
    act = str(tensor.scheme.get("act"))

    def range_of(tap: str) -> float:
        return find_range(method, act, stats[tap].absmax, stats[tap].histogram) if stats[tap].n_tokens else 0.0

    reach, note = range_of(tap), ""
    if not reach:
        why = "its inputs were zero on every calibration token" if stats[tap].n_tokens else "no calibration token reached it"
        reach, where = max(((range_of(other), other) for other in alike(tap, stats)), default=(0.0, ""))
        note = f"{why}: its input scale is that of {where}, the widest among the layer's experts"
        if not reach:
            reach = activations.RANGE_OF_ZEROS
            note = f"{why}: its input scale is that of the range {reach:g}"
    scale = activations.static_scale(act, reach)
    return QuantizedTensor(tensor.scheme, tensor.shape, {**tensor.parts, "input_scale": scale}), note


def alike(tap: str, stats: Mapping[str, Stats]) -> list[str]:
    """The taps among ``stats`` that differ from ``tap`` by the number of an expert."""
    at = expert_of(tap)
    if at is None:
        return []
    others = ((other, expert_of(other)) for other in stats if other != tap)
    return [other for other, there in others if there and (there.stack, there.linear) == (at.stack, at.linear)]
