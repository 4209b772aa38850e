"""Round to nearest: fit a grid to each weight matrix alone and take the nearest code of every weight.

Ŵ = grid.decode(grid.encode(W)). Where a qtype has an ``encode`` of its own (ggml's block types), its bytes are the peer's.
No statistics, one pass over the weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantcli.errors import NumericsError, about
from quantcli.passes._fused import fused_parts
from quantcli.registry import find
from quantcli.tensors import Layer, QuantizedTensor, Report, Scheme, Stats, TensorReport

NEEDS: frozenset[str] = frozenset()

SCALED_ROWS = 128
"""Rows that share a scale in number formats scaled by blocks of a matrix."""


@dataclass(frozen=True, slots=True)
class Options:
    """RTN has nothing to set."""


def quantize(W: Tensor, scheme: Scheme, importance: Tensor | None = None, *, fused: Mapping[str, Tensor] | None = None) -> QuantizedTensor:
    """``W``: [out, in] in any float dtype; ``importance``: [in] or None; ``fused``: parts that it shares with others of its tap."""
    qtype = find("qtypes", scheme.qtype)
    shared = {"fused": fused} if fused else {}
    if hasattr(qtype, "encode"):
        return qtype.encode(W, scheme, importance, **shared)
    W = W.float()
    grid = qtype.fit(W, scheme, importance, **shared)
    return qtype.pack(grid.encode(W), grid, scheme)


def weight_error(W: Tensor, tensor: QuantizedTensor, *, chunk_elements: int = 1 << 18) -> float:
    """‖W−Ŵ‖² / ‖W‖² of ``W``: [..., out, in], a few rows at a time so that no second copy is made; :class:`NumericsError` for NaN, Inf."""
    qtype = find("qtypes", tensor.scheme.qtype)
    if W.ndim > 2:  # a stack of matrices is one of all their rows
        W = W.flatten(0, -2)
        rows_of = {name: part.flatten(0, -2) for name, part in tensor.parts.items()}
        tensor = QuantizedTensor(tensor.scheme, tuple(W.shape), rows_of)
    if hasattr(qtype, "errors"):  # blocks that know no rows
        error, total = qtype.errors(W, tensor)
    else:
        error = total = 0.0
        rows = -(-max(1, chunk_elements // W.shape[-1]) // SCALED_ROWS) * SCALED_ROWS
        for start in range(0, W.shape[0], rows):
            stop = min(start + rows, W.shape[0])
            V = W[start:stop].float()
            E = torch.sub(V, qtype.unpack(slice_rows(tensor, start, stop))).view(-1)
            error += float(E.dot(E))  # twice as fast as a sum of squares, which is another matrix first
            total += float(V.reshape(-1).dot(V.reshape(-1)))
    if not math.isfinite(error) or not math.isfinite(total):
        raise NumericsError(f"the weights, or what {tensor.scheme} makes of them, have NaN or Inf; check the source checkpoint")
    return error / total if total > 0 else float(error > 0)


def slice_rows(tensor: QuantizedTensor, start: int, stop: int) -> QuantizedTensor:
    """Rows ``start … stop`` of ``tensor``, from a multiple of :data:`SCALED_ROWS`. Its parts have a row for each of its own, one for each
    block of that many rows, or serve all rows."""
    n_rows, parts = tensor.shape[0], {}
    for name, part in tensor.parts.items():
        if part.shape[0] == n_rows and name != "g_idx":  # which has one for each input
            parts[name] = part[start:stop]
        elif part.ndim == 2:
            parts[name] = part[start // SCALED_ROWS : -(-stop // SCALED_ROWS)]
        else:
            parts[name] = part
    return QuantizedTensor(tensor.scheme, (stop - start, *tensor.shape[1:]), parts)


def run(layer: Layer, stats: Mapping[str, Stats], options: Options = Options()) -> Report:
    """Quantize every tensor of ``layer.schemes``; importance is used where the layer or ``stats`` has it."""
    reports, shared = [], fused_parts(layer)
    for name, scheme in layer.schemes.items():
        W = layer.tensors[name]
        tap = stats.get(layer.taps.get(name, ""))
        importance = layer.importance.get(name, None if tap is None else tap.importance)
        with about(name):
            layer.quantized[name] = quantize(W, scheme, importance, fused=shared.get(name))
            reports.append(TensorReport(name, weight_error(W, layer.quantized[name])))
    return Report(tuple(reports))
