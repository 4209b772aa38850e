"""Parts that matrices of one tap share, because engines run them as one: q, k and v; gate and up."""

from __future__ import annotations

from torch import Tensor

from quantcli import qtypes
from quantcli.tensors import Layer, Scheme


def fused_parts(layer: Layer) -> dict[str, dict[str, Tensor]]:
    """Tensor name → the parts that are the same for all matrices of its tap and scheme; only for number formats that have such parts.

    The qtype computes them in ``fused(Ws, scheme)``; a tensor without a tap shares them with no other.
    """
    groups: dict[tuple[str, Scheme], list[str]] = {}
    for name, scheme in layer.schemes.items():
        if qtypes.of(scheme.qtype).shares_parts:
            groups.setdefault((layer.taps.get(name, name), scheme), []).append(name)
    out: dict[str, dict[str, Tensor]] = {}
    for (_, scheme), members in groups.items():
        parts = qtypes.of(scheme.qtype).fused([layer.tensors[name] for name in members], scheme)
        out |= dict.fromkeys(members, parts)
    return out
