"""8-bit floats, E4M3 or E5M2, with a scale for the tensor, each row, or each 128 × 128 block: ``w ≈ scale·data``.

Parts of one weight matrix [out, in]::

    data         F8_E4M3 [out, in]                            F8_E5M2 with the option dtype
    scale        F32 [1] | [out, 1] | [⌈out/128⌉, ⌈in/128⌉]   of the strategy tensor | channel | block; F16, BF16 with scale_dtype
    input_scale  F32 [1]                                      of the linear's input, when its scale is found beforehand (option act)

The scale is absmax / 448 (57344 for E5M2), rounded to ``scale_dtype`` before codes are chosen; weights are then divided, clamped and
rounded to nearest even. These are compressed-tensors' bytes. A scale that rounds to zero becomes the machine epsilon, as there. A search
would gain nothing: a float's relative error does not depend on its scale, and absmax / 448 uses the range to its end.
Blocks at the right and lower edge may be cut; ``block`` (rows, inputs) replaces 128 × 128 in what other tools wrote. Fused experts
[n, out, in] are read, each matrix for itself.
Matrices that engines join (q, k, v) share the scale of the strategy tensor through :func:`fused`: vLLM would otherwise round two of them
a second time, to the largest of the three scales.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from quantcli.errors import NumericsError, RecipeError
from quantcli.ops.minifloat import FLOAT8, Float8, Tile, dequantize_fp8, quantize_fp8, tiles_of
from quantcli.qtypes import Parts, QType
from quantcli.qtypes.shared.affine import CODES, EXACT, WIDER, stored
from quantcli.qtypes.shared.minifloat import check_matrix, finite_absmax, float_bits, signed_book
from quantcli.tensors import DTYPES, Grid, QuantizedTensor, Scheme, TensorSpec

STRATEGIES = ("tensor", "channel", "block")
BLOCK = (128, 128)


COARSE_TO_FINE = ("tensor", "block", "channel")
REPEATS = {("tensor", "block"), ("tensor", "channel")}
"""Pairs of strategies of which the second can repeat the first one's scales."""


class Fp8(QType):
    """8-bit floats with a scale for the tensor, each row or each block."""

    name = "fp8"
    options: ClassVar[Mapping[str, Any]] = {"dtype": "e4m3", "strategy": "channel", "scale_dtype": "F32", "act": ""}

    @override
    def layout(self, shape: tuple[int, ...], scheme: Scheme) -> dict[str, TensorSpec]:
        """The parts of a matrix of ``shape``, or of a stack of them; :class:`RecipeError` for options that do not exist."""
        _check_options(scheme)
        if len(shape) not in (2, 3):
            raise RecipeError(f"{scheme} codes matrices [out, in], got shape {list(shape)}; exclude this tensor")
        stack, matrix = shape[:-2], shape[-2:]
        scale = (*stack, *tiles_of(matrix, _tile(matrix, scheme)))
        one = scheme.option("strategy") == "tensor" and not stack
        parts = {"data": (_float(scheme).name, tuple(shape)), "scale": (scheme.option("scale_dtype"), (1,) if one else scale)}
        if scheme.static_activations:
            parts["input_scale"] = ("F32", (1,))
        return {name: TensorSpec.dense(name, dtype, size) for name, (dtype, size) in parts.items()}

    @override
    def fused(self, Ws: Sequence[Tensor], scheme: Scheme) -> dict[str, Tensor]:
        """What the matrices ``Ws`` must share when an engine joins them: with the strategy tensor, their scale."""
        if scheme.option("strategy") != "tensor":
            return {}
        absmax = torch.stack([finite_absmax(W, (W.shape[0], W.shape[1])) for W in Ws]).amax(0)
        return {"scale": _stored_scale(absmax, scheme).view(1)}

    @override
    def fit(self, W: Tensor, scheme: Scheme, importance: Tensor | None = None, *, fused: Parts | None = None) -> Grid:
        """The grid of ``W`` [out, in] float32: a book of all finite numbers, 253 or 247. Importance changes nothing (see above)."""
        scale = _scale(W, scheme, fused)
        rows, width = _tile(tuple(W.shape), scheme)
        size = math.gcd(W.shape[1], width)  # a Grid's groups are whole: a cut block is several of them
        by_row = scale.float().view(tiles_of(W.shape, (rows, width))).repeat_interleave(rows, 0)[: W.shape[0]]
        first = torch.arange(0, W.shape[1], size, device=W.device) // width
        book = signed_book(_magnitudes(scheme)).to(W.device)
        return Grid(by_row[:, first], None, 0, len(book) - 1, size, book=book, parts={"scale": scale})

    @override
    def pack(self, codes: Tensor, grid: Grid, scheme: Scheme) -> QuantizedTensor:
        """``codes`` [out, in] of ``grid`` as parts."""
        data = float_bits(codes, len(_magnitudes(scheme)), 128).view(_float(scheme).dtype)
        return QuantizedTensor(scheme, tuple(codes.shape), {"data": data, "scale": grid.parts["scale"]})

    @override
    def unpack(self, tensor: QuantizedTensor) -> Tensor:
        """The weights float32 of the tensor's shape that an engine computes: ``data.float()·scale.float()``."""
        data, scale = tensor.parts["data"], tensor.parts["scale"].float()
        tile = _tile(tuple(data.shape[-2:]), tensor.scheme)
        down, across = tiles_of(data.shape[-2:], tile)
        if data.ndim == 2:
            return dequantize_fp8(data, scale.view(down, across), tile)
        W = torch.empty(data.shape, device=data.device)
        for out, matrix, own in zip(W, data, scale.view(-1, down, across), strict=True):
            out.copy_(dequantize_fp8(matrix, own, tile))
        return W

    @override
    def encode(self, W: Tensor, scheme: Scheme, importance: Tensor | None = None, *, fused: Parts | None = None) -> QuantizedTensor:
        """``W`` [out, in] in any float dtype: ties go to even, as everywhere, which a :class:`Grid` does not know."""
        check_matrix(tuple(W.shape), scheme)
        scale = _scale(W, scheme, fused)
        tile = _tile(tuple(W.shape), scheme)
        data = quantize_fp8(W, scale.float().view(tiles_of(W.shape, tile)), tile, scheme.option("dtype"))
        return QuantizedTensor(scheme, tuple(W.shape), {"data": data, "scale": scale})

    @override
    def variants(self, scheme: Scheme) -> Iterator[Scheme]:
        yield scheme
        for strategy in COARSE_TO_FINE:
            yield from (scheme.with_options(strategy=strategy, scale_dtype=dtype) for dtype in ("F32", "BF16"))

    @override
    def holds(self, source: Scheme, target: Scheme, in_features: int) -> str | None:
        """The same weights, with the scales of a coarser strategy repeated."""
        if source.qtype != self.name or source.option("dtype") != target.option("dtype"):
            return None
        have, want = source.option("strategy"), target.option("strategy")
        if have != want and (have, want) not in REPEATS:
            return None
        return EXACT if target.option("scale_dtype") in WIDER[source.option("scale_dtype")] else CODES

    @override
    def take(self, tensor: QuantizedTensor, target: Scheme) -> QuantizedTensor:
        shape = self.layout(tensor.shape, target)["scale"].shape
        scale = stored(tensor.parts["scale"], target.option("scale_dtype")).expand(shape).contiguous()
        parts = {"data": tensor.parts["data"], "scale": scale}
        if target.static_activations:
            parts["input_scale"] = tensor.parts["input_scale"]
        return QuantizedTensor(target, tensor.shape, parts)


QTYPE = Fp8()


def _scale(W: Tensor, scheme: Scheme, fused: Parts | None) -> Tensor:
    """The part ``scale``: the shared one where there is one."""
    QTYPE.layout(tuple(W.shape), scheme)
    if fused and "scale" in fused:
        finite_absmax(W, (W.shape[0], W.shape[1]))
        return fused["scale"].to(W.device)
    scale = _stored_scale(finite_absmax(W, _tile(tuple(W.shape), scheme)), scheme)
    return scale.view(1) if scheme.option("strategy") == "tensor" else scale


def _stored_scale(absmax: Tensor, scheme: Scheme) -> Tensor:
    word = scheme.option("scale_dtype")
    dtype = DTYPES[word]
    scale = (absmax / _float(scheme).largest).to(dtype)
    if not bool(scale.isfinite().all()):
        raise NumericsError(f"a scale does not fit {word} (largest |w| is {float(absmax.max()):.3g}); use scale_dtype F32 (the word sf32)")
    return torch.where(scale == 0, torch.finfo(dtype).eps, scale)


def _magnitudes(scheme: Scheme) -> Tensor:
    """The finite numbers from 0 up, in the order of their bytes."""
    bits = torch.arange(128, dtype=torch.uint8).view(_float(scheme).dtype).float()
    return bits[bits <= _float(scheme).largest]


def _tile(shape: tuple[int, ...], scheme: Scheme) -> Tile:
    """(rows, inputs) that share a scale."""
    strategy = scheme.option("strategy")
    if strategy == "block":
        rows, width = scheme.get("block", BLOCK)
        return rows, width
    return (1, shape[1]) if strategy == "channel" else (shape[0], shape[1])


def _float(scheme: Scheme) -> Float8:
    return FLOAT8[scheme.option("dtype")]


def _check_options(scheme: Scheme) -> None:
    for option, known in (("dtype", tuple(FLOAT8)), ("strategy", STRATEGIES), ("scale_dtype", ("F32", "F16", "BF16"))):
        if (value := scheme.option(option)) not in known:
            raise RecipeError(f"{scheme}: {option} is '{value}'; expected one of {', '.join(known)}")
