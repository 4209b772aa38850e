"""MXFP4: E2M1 with a power of two for each 32 inputs, 4.25 bpw: ``w ≈ 2^(scale − 127)·level``, levels 0 ½ 1 1½ 2 3 4 6 and their negatives.

Open Compute Project, "OCP Microscaling Formats (MX) Specification", version 1.0. Parts of one weight matrix [out, in]::

    packed  U8 [out, in/2]    the even input in the low four bits
    scale   U8 [out, in/32]   E8M0, a biased exponent

Option ``search``: "minmax" takes compressed-tensors' exponent (:func:`quantcli.ops.minifloat.mx_scale`) and so makes its bytes;
"mse", the default, weighs it and its neighbours by Σ importance·(w − ŵ)². Engines decode either.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from quantcli.ops.blocks import unpack_blocks
from quantcli.ops.minifloat import FP4_LEVELS, dequantize_fp4, fit_fp4, group_step, mx_scale, pack_fp4, quantize_fp4
from quantcli.qtypes import Parts, QType
from quantcli.qtypes.shared.affine import EXACT
from quantcli.qtypes.shared.minifloat import check_matrix, check_search, finite_absmax, fp4_book, fp4_packed
from quantcli.tensors import Grid, QuantizedTensor, Scheme, TensorSpec, check_divisible

GROUP = 32
E2M1_EXPONENT = 2  # of 6


class Mxfp4(QType):
    """E2M1 with a power of two for each 32 inputs."""

    name = "mxfp4"
    options: ClassVar[Mapping[str, Any]] = {"search": "mse", "act": ""}

    @override
    def layout(self, shape: tuple[int, ...], scheme: Scheme) -> dict[str, TensorSpec]:
        """The parts of a matrix of ``shape``; :class:`RecipeError` unless rows are whole groups."""
        check_matrix(shape, scheme)
        check_search(scheme)
        check_divisible(shape, GROUP, scheme, "use nvfp4 (groups of 16) or exclude it")
        return {
            "packed": TensorSpec.dense("packed", "U8", (shape[0], shape[1] // 2)),
            "scale": TensorSpec.dense("scale", "U8", (shape[0], shape[1] // GROUP)),
        }

    @override
    def fit(self, W: Tensor, scheme: Scheme, importance: Tensor | None = None, *, fused: Parts | None = None) -> Grid:
        """The grid of ``W`` [out, in] float32; ``importance`` [in] weighs the search, None weighs all inputs alike."""
        scale = _scale(W, scheme, importance)
        return Grid(group_step(scale, "mxfp4"), None, 0, 2 * len(FP4_LEVELS) - 2, GROUP, book=fp4_book(W.device), parts={"scale": scale})

    @override
    def pack(self, codes: Tensor, grid: Grid, scheme: Scheme) -> QuantizedTensor:
        """``codes`` [out, in] of ``grid`` as parts."""
        return QuantizedTensor(scheme, tuple(codes.shape), {"packed": fp4_packed(codes), "scale": grid.parts["scale"]})

    @override
    def unpack(self, tensor: QuantizedTensor) -> Tensor:
        """The weights [out, in] float32 that an engine computes."""
        return dequantize_fp4(tensor.parts["packed"], group_step(tensor.parts["scale"], "mxfp4"))

    @override
    def encode(self, W: Tensor, scheme: Scheme, importance: Tensor | None = None, *, fused: Parts | None = None) -> QuantizedTensor:
        """``W`` [out, in] in any float dtype: ties go to even, which a :class:`Grid` does not know."""
        scale = _scale(W, scheme, importance)
        packed = quantize_fp4(W, group_step(scale, "mxfp4"))
        return QuantizedTensor(scheme, tuple(W.shape), {"packed": packed, "scale": scale})

    @override
    def relatives(self, scheme: Scheme) -> Iterator[Scheme]:
        yield Scheme.parse("ggml_mxfp4")

    @override
    def holds(self, source: Scheme, target: Scheme, in_features: int) -> str | None:
        """GGUF's packing has the same 4 bits and the same exponents."""
        return EXACT if source.qtype == "ggml_mxfp4" else None

    @override
    def take(self, tensor: QuantizedTensor, target: Scheme) -> QuantizedTensor:
        codes, params = unpack_blocks(tensor.parts["blocks"], tensor.scheme.qtype, tensor.shape[-1])
        return QuantizedTensor(target, tensor.shape, {"packed": pack_fp4(codes.to(torch.uint8)), "scale": params["scale"]})


QTYPE = Mxfp4()


def _scale(W: Tensor, scheme: Scheme, importance: Tensor | None) -> Tensor:
    QTYPE.layout(tuple(W.shape), scheme)
    scale = mx_scale(finite_absmax(W, (1, GROUP)), E2M1_EXPONENT)
    return fit_fp4(W, scale, "mxfp4", importance=importance) if check_search(scheme) else scale
