"""Steps that several passes share: grouping a layer's tensors by tap, the Hessian of a tap, quantizing one weight matrix."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from quantcli import qtypes
from quantcli.errors import RecipeError, about
from quantcli.tensors import Layer, QuantizedTensor, Scheme, Stats, TensorReport, relative_error

Quantize = Callable[[Tensor, Scheme], QuantizedTensor]
"""``quantize(W, scheme)`` with W [out, in] float32."""


def by_tap(layer: Layer, stats: Mapping[str, Stats]) -> dict[str, list[str]]:
    """Tap → the tensors to be quantized that read it, in the layer's order. :class:`RecipeError` for a tap without statistics, or with
    another model's."""
    groups: dict[str, list[str]] = {}
    for name in layer.schemes:
        groups.setdefault(layer.taps.get(name, ""), []).append(name)
    for tap, names in groups.items():
        if tap not in stats:
            raise RecipeError(f"{names[0]}: no statistics for its tap '{tap}'; calibrate this model again, or exclude it with --skip")
        for name in names:
            if (n := layer.tensors[name].shape[1]) != len(stats[tap].importance):
                raise RecipeError(
                    f"{name}: reads {n} inputs, the statistics of its tap '{tap}' are of {len(stats[tap].importance)}; "
                    "they belong to another model"
                )
    return groups


def silent(stats: Stats) -> str:
    """The note on a tensor of a tap whose H is zero, and which is therefore rounded by its weights alone."""
    why = "its inputs were zero on every calibration token" if stats.n_tokens else "no calibration token reached it"
    return f"{why}: rounded to nearest by its weights alone"


def hessian(tap: str, stats: Stats, device: torch.device, method: str) -> Tensor:
    """H [in, in] float32 of ``tap`` on ``device``; :class:`RecipeError` where ``method`` has none to work with."""
    if stats.H is None:
        raise RecipeError(f"{tap}: {method} needs the Hessian, and these statistics were gathered with --no-hessian")
    return stats.H.to(device, torch.float32)


def code(layer: Layer, name: str, quantize: Quantize, H: Tensor | None = None, **reported: Any) -> TensorReport:
    """Quantize one tensor of ``layer``; its error is computed from ``H`` [in, in] if given; ``reported``: more fields of its report."""
    W, scheme = layer.tensors[name].float(), layer.schemes[name]
    with about(name):
        layer.quantized[name] = quantize(W, scheme)
    W_hat = qtypes.of(scheme.qtype).unpack(layer.quantized[name])
    weight_error = None if H is None else relative_error(W, W_hat)
    return TensorReport(name, relative_error(W, W_hat, H), weight_error=weight_error, **reported)
