"""Round to nearest: fit a grid to each weight matrix alone and take the nearest code of every weight.

Ŵ = grid.decode(grid.encode(W)). Where a qtype has an ``encode`` of its own (ggml's block types), its bytes are the peer's.
No statistics, one pass over the weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from quantcli.errors import NumericsError, about
from quantcli.registry import find
from quantcli.tensors import Layer, QuantizedTensor, Report, Scheme, Stats, TensorReport

NEEDS: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Options:
    """RTN has nothing to set."""


def quantize(W: Tensor, scheme: Scheme, importance: Tensor | None = None) -> QuantizedTensor:
    """``W``: [out, in] in any float dtype; ``importance``: [in] or None."""
    qtype = find("qtypes", scheme.qtype)
    if hasattr(qtype, "encode"):
        return qtype.encode(W, scheme, importance)
    W = W.float()
    grid = qtype.fit(W, scheme, importance)
    return qtype.pack(grid.encode(W), grid, scheme)


def weight_error(W: Tensor, tensor: QuantizedTensor, *, chunk_elements: int = 1 << 18) -> float:
    """‖W−Ŵ‖² / ‖W‖² of ``W``: [out, in], a few rows at a time so that no second copy is made; :class:`NumericsError` for NaN or Inf."""
    unpack = find("qtypes", tensor.scheme.qtype).unpack
    rows = max(1, chunk_elements // W.shape[-1])
    error = total = 0.0
    for start in range(0, W.shape[0], rows):
        now = slice(start, start + rows)
        V = W[now].float()
        parts = {name: part if part.ndim == 1 else part[now] for name, part in tensor.parts.items()}  # g_idx [in] serves every row
        E = V - unpack(QuantizedTensor(tensor.scheme, tuple(V.shape), parts))
        error += float(E.square().sum())
        total += float(V.square().sum())
    if not math.isfinite(error) or not math.isfinite(total):
        raise NumericsError(f"the weights, or what {tensor.scheme} makes of them, have NaN or Inf; check the source checkpoint")
    return error / total if total > 0 else float(error > 0)


def run(layer: Layer, stats: Mapping[str, Stats], options: Options = Options()) -> Report:
    """Quantize every tensor of ``layer.schemes``; importance is used where ``stats`` has it."""
    reports = []
    for name, scheme in layer.schemes.items():
        W = layer.tensors[name]
        tap = stats.get(layer.taps.get(name, ""))
        with about(name):
            layer.quantized[name] = quantize(W, scheme, None if tap is None else tap.importance)
            reports.append(TensorReport(name, weight_error(W, layer.quantized[name])))
    return Report(tuple(reports))
