"""Round to nearest: fit a grid to each weight matrix alone and take the nearest code of every weight.

Ŵ = grid.decode(grid.encode(W)). Where a qtype has an ``encode`` of its own (ggml's block types), its bytes equal the peer's.
No statistics, one pass over the weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from quantcli import qtypes
from quantcli.errors import NumericsError, about
from quantcli.importance import counted, is_silent
from quantcli.passes import Pass
from quantcli.passes.shared.fused import fused_parts
from quantcli.tensors import Layer, QuantizedTensor, Report, Scheme, Stats, TensorReport

SILENT = "the importance of all its inputs is zero, as of an expert that no token reached: they all count alike"


@dataclass(frozen=True, slots=True)
class Options:
    """RTN has no options."""


def quantize(W: Tensor, scheme: Scheme, importance: Tensor | None = None, *, fused: Mapping[str, Tensor] | None = None) -> QuantizedTensor:
    """``W``: [out, in] in any float dtype; ``importance``: [in] or None; ``fused``: parts that it shares with others of its tap."""
    return qtypes.of(scheme.qtype).encode(W, scheme, importance, fused=fused)


def weight_error(W: Tensor, tensor: QuantizedTensor, *, chunk_elements: int = 1 << 18) -> float:
    """‖W−Ŵ‖² / ‖W‖² of ``W``: [..., out, in], a few rows at a time so that no second copy is made; :class:`NumericsError` for NaN, Inf."""
    if W.ndim > 2:  # a stack of matrices is one of all their rows
        W = W.flatten(0, -2)
        rows_of = {name: part.flatten(0, -2) for name, part in tensor.parts.items()}
        tensor = QuantizedTensor(tensor.scheme, tuple(W.shape), rows_of)
    error, total = qtypes.of(tensor.scheme.qtype).errors(W, tensor, chunk_elements=chunk_elements)
    if not math.isfinite(error) or not math.isfinite(total):
        raise NumericsError(f"the weights, or their values in {tensor.scheme}, have NaN or Inf; check the source checkpoint")
    return error / total if total > 0 else float(error > 0)


class Rtn(Pass[Options]):
    """Rounds every weight to the nearest code."""

    name = "rtn"
    options_type = Options

    @override
    def needs(self, options: Options) -> frozenset[str]:
        return frozenset()

    @override
    def run(self, layer: Layer, stats: Mapping[str, Stats], options: Options = Options()) -> Report:
        """Quantize every tensor of ``layer.schemes``; importance is used where the layer or ``stats`` has it."""
        reports, shared = [], fused_parts(layer)
        for name, scheme in layer.schemes.items():
            W = layer.tensors[name]
            tap = stats.get(layer.taps.get(name, ""))
            importance = counted(layer.importance.get(name, None if tap is None else tap.importance))
            notes = (SILENT,) if name in layer.importance and is_silent(layer.importance[name]) else ()
            with about(name):
                layer.quantized[name] = quantize(W, scheme, importance, fused=shared.get(name))
                reports.append(TensorReport(name, weight_error(W, layer.quantized[name]), notes))
        return Report(tuple(reports))


PASS = Rtn()
