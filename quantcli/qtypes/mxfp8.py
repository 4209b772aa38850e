"""MXFP8: E4M3 with a power of two for each 32 inputs, 8.25 bpw: ``w ≈ 2^(scale − 127)·data``.

Open Compute Project, "OCP Microscaling Formats (MX) Specification", version 1.0. Parts of one weight matrix [out, in]::

    data   F8_E4M3 [out, in]
    scale  U8      [out, in/32]   E8M0, a biased exponent

The exponent is compressed-tensors' (:func:`quantcli.ops.minifloat.mx_scale`), which loses no weight: absmax lies in 224 … 448. A
search gains nothing, since a float's relative error does not depend on its scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from quantcli.ops.minifloat import dequantize_fp8, group_step, mx_scale, quantize_fp8
from quantcli.qtypes import Parts, QType
from quantcli.qtypes.shared.minifloat import check_matrix, finite_absmax, float_bits, signed_book
from quantcli.tensors import Grid, QuantizedTensor, Scheme, TensorSpec, check_divisible

GROUP = 32
E4M3_EXPONENT = 8  # of 448


class Mxfp8(QType):
    """E4M3 with a power of two for each 32 inputs."""

    name = "mxfp8"
    options: ClassVar[Mapping[str, Any]] = {"act": ""}

    @override
    def layout(self, shape: tuple[int, ...], scheme: Scheme) -> dict[str, TensorSpec]:
        """The parts of a matrix of ``shape``; :class:`RecipeError` unless rows are whole groups."""
        check_matrix(shape, scheme)
        check_divisible(shape, GROUP, scheme, "use fp8-channel or exclude it")
        return {
            "data": TensorSpec.dense("data", "F8_E4M3", shape),
            "scale": TensorSpec.dense("scale", "U8", (shape[0], shape[1] // GROUP)),
        }

    @override
    def fit(self, W: Tensor, scheme: Scheme, importance: Tensor | None = None, *, fused: Parts | None = None) -> Grid:
        """The grid of ``W`` [out, in] float32: a book of the 253 finite numbers. Importance changes nothing."""
        self.layout(tuple(W.shape), scheme)
        scale = mx_scale(finite_absmax(W, (1, GROUP)), E4M3_EXPONENT)
        book = signed_book(_magnitudes()).to(W.device)
        return Grid(group_step(scale, "mxfp4"), None, 0, len(book) - 1, GROUP, book=book, parts={"scale": scale})

    @override
    def pack(self, codes: Tensor, grid: Grid, scheme: Scheme) -> QuantizedTensor:
        """``codes`` [out, in] of ``grid`` as parts."""
        data = float_bits(codes, len(_magnitudes()), 128).view(torch.float8_e4m3fn)
        return QuantizedTensor(scheme, tuple(codes.shape), {"data": data, "scale": grid.parts["scale"]})

    @override
    def unpack(self, tensor: QuantizedTensor) -> Tensor:
        """The weights [out, in] float32 that an engine computes."""
        return dequantize_fp8(tensor.parts["data"], group_step(tensor.parts["scale"], "mxfp4"), (1, GROUP))

    @override
    def encode(self, W: Tensor, scheme: Scheme, importance: Tensor | None = None, *, fused: Parts | None = None) -> QuantizedTensor:
        """``W`` [out, in] in any float dtype: ties go to even, which a :class:`Grid` does not know."""
        self.layout(tuple(W.shape), scheme)
        scale = mx_scale(finite_absmax(W, (1, GROUP)), E4M3_EXPONENT)
        data = quantize_fp8(W, group_step(scale, "mxfp4"), (1, GROUP))
        return QuantizedTensor(scheme, tuple(W.shape), {"data": data, "scale": scale})


QTYPE = Mxfp8()


def _magnitudes() -> Tensor:
    return torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
