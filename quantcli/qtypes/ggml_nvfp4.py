"""GGUF's NVFP4: E2M1 with an unsigned E4M3 scale for each 16 inputs, in ggml's blocks of 64, 4.5 bpw.

``w = scale/2·level[q]``, levels twice E2M1's; 36 bytes a block, drawn in ``kernels/blocks/e2m1.h``. The block has no scale of the whole
matrix, as the qtype ``nvfp4`` does: a group whose largest weight is under 0.006 becomes zero, and one beyond 2688 is refused.
llama.cpp's scale, bit for bit, is the largest |w| over 6, and importance does not count.

With the option ``scaled`` there is one, as convert_hf_to_gguf writes it for folders in NVFP4: a part ``scale`` F32 [1], in a file the
tensor ``….scale`` beside ``….weight``, that llama.cpp multiplies a linear's output by. So the codes and scales of such folders stay as
they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from quantcli.errors import NumericsError
from quantcli.ops.blocks import KINDS, pack_blocks
from quantcli.ops.minifloat import FLOAT8, FP4_LARGEST, unpack_fp4
from quantcli.qtypes import Parts
from quantcli.qtypes.shared.affine import CODES
from quantcli.qtypes.shared.ggml import BlockType
from quantcli.tensors import Grid, QuantizedTensor, Scheme, TensorSpec

LARGEST_E4M3 = 126
"""The byte of 448; those after it are no number, or have a sign."""


class ScaledType(BlockType):
    """ggml's blocks of E2M1, with a scale of the whole matrix beside them where the option ``scaled`` says so."""

    options: ClassVar[Mapping[str, Any]] = {"scaled": False}

    @override
    def layout(self, shape: tuple[int, ...], scheme: Scheme) -> dict[str, TensorSpec]:
        """The part ``blocks`` and, of a scaled matrix, ``scale``; :class:`RecipeError` unless rows are whole blocks."""
        parts = super().layout(shape, scheme)
        return parts | {"scale": TensorSpec.dense("scale", "F32", (1,))} if scheme.option("scaled") else parts

    @override
    def fit(self, W: Tensor, scheme: Scheme, importance: Tensor | None = None, *, fused: Parts | None = None) -> Grid:
        """The grid of ``W`` [out, in]; ``importance`` does not count."""
        if not scheme.option("scaled"):
            return super().fit(W, scheme, importance)
        scale = _matrix_scale(W)
        grid = super().fit(W / scale, scheme, importance)
        return replace(grid, scale=grid.scale * scale, parts={**grid.parts, "matrix_scale": scale})

    @override
    def pack(self, codes: Tensor, grid: Grid, scheme: Scheme) -> QuantizedTensor:
        """``codes`` [out, in] of ``grid`` as parts."""
        parts = {name: part for name, part in grid.parts.items() if name != "matrix_scale"}
        return _with_scale(super().pack(codes, replace(grid, parts=parts), scheme), grid.parts.get("matrix_scale"))

    @override
    def unpack(self, tensor: QuantizedTensor) -> Tensor:
        """The weights float32 that llama.cpp computes with: what its dequantizer gives, times the scale of the matrix."""
        W = super().unpack(tensor)
        return W * tensor.parts["scale"] if "scale" in tensor.parts else W

    @override
    def encode(self, W: Tensor, scheme: Scheme, importance: Tensor | None = None, *, fused: Parts | None = None) -> QuantizedTensor:
        """``W`` [..., out, in], any float dtype, as ggml's very bytes; a scaled matrix after it is divided by its scale."""
        if not scheme.option("scaled"):
            return super().encode(W, scheme, importance)
        scale = _matrix_scale(W)
        return _with_scale(super().encode(W.float() / scale, scheme, importance), scale)

    @override
    def holds(self, source: Scheme, target: Scheme, in_features: int) -> str | None:
        """The codes and scales of ``nvfp4``, of whose scale of the matrix the reciprocal is stored."""
        fits = source.qtype == "nvfp4" and target.option("scaled") and in_features % KINDS[self.name].block == 0
        return CODES if fits else None

    @override
    def take(self, tensor: QuantizedTensor, target: Scheme) -> QuantizedTensor:
        scale = tensor.parts["scale"].view(torch.uint8)
        if int(scale.max()) > LARGEST_E4M3:
            raise NumericsError("a scale of the source is negative or no number, which GGUF's NVFP4 cannot hold; the file is damaged")
        blocks = pack_blocks(unpack_fp4(tensor.parts["packed"]).to(torch.int8), {"scale": scale}, self.name)
        return QuantizedTensor(target, tensor.shape, {"blocks": blocks, "scale": 1 / tensor.parts["global_scale"].float()})


QTYPE = ScaledType("ggml_nvfp4")


def _matrix_scale(W: Tensor) -> Tensor:
    """[1] float32 that makes the largest of all scales the largest of E4M3, rounded up so that it is none larger; 1 for zeros."""
    scale = W.float().abs().max() / (FLOAT8["e4m3"].largest * FP4_LARGEST)
    return torch.where(scale > 0, scale.nextafter(torch.full_like(scale, torch.inf)), 1.0).view(1)


def _with_scale(tensor: QuantizedTensor, scale: Tensor | None) -> QuantizedTensor:
    return tensor if scale is None else replace(tensor, parts={**tensor.parts, "scale": scale})
