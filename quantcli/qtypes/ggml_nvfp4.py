"""GGUF's NVFP4: E2M1 with an unsigned E4M3 scale for each 16 inputs, in ggml's blocks of 64, 4.5 bpw.

``w = scale/2·level[q]``, levels twice E2M1's; 36 bytes a block, drawn in ``kernels/blocks/e2m1.h``. The block has no scale of the whole
matrix, as the qtype ``nvfp4`` does: a group whose largest weight is under 0.006 becomes zero, and one beyond 2688 is refused.
llama.cpp's scale, bit for bit, is the largest |w| over 6, and importance does not count.

With the option ``scaled`` there is one, as convert_hf_to_gguf writes it for folders in NVFP4: a part ``scale`` F32 [1], in a file the
tensor ``….scale`` beside ``….weight``, that llama.cpp multiplies a linear's output by. So the codes and scales of such folders stay as
they are.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from quantcli.ops.minifloat import FLOAT8, FP4_LARGEST
from quantcli.qtypes._ggml import BlockType
from quantcli.tensors import Grid, QuantizedTensor, Scheme, TensorSpec

OPTIONS: dict[str, Any] = {"scaled": False}

_TYPE = BlockType("ggml_nvfp4")


def layout(shape: tuple[int, ...], scheme: Scheme) -> dict[str, TensorSpec]:
    """The part ``blocks`` and, of a scaled matrix, ``scale``; :class:`RecipeError` unless rows are whole blocks."""
    parts = _TYPE.layout(shape, scheme)
    return parts | {"scale": TensorSpec.dense("scale", "F32", (1,))} if scheme.option("scaled") else parts


def fit(W: Tensor, scheme: Scheme, importance: Tensor | None = None) -> Grid:
    """The grid of ``W`` [out, in]; ``importance`` does not count."""
    if not scheme.option("scaled"):
        return _TYPE.fit(W, scheme, importance)
    scale = _matrix_scale(W)
    grid = _TYPE.fit(W / scale, scheme, importance)
    return replace(grid, scale=grid.scale * scale, parts={**grid.parts, "matrix_scale": scale})


def pack(codes: Tensor, grid: Grid, scheme: Scheme) -> QuantizedTensor:
    """``codes`` [out, in] of ``grid`` as parts."""
    parts = {name: part for name, part in grid.parts.items() if name != "matrix_scale"}
    return _with_scale(_TYPE.pack(codes, replace(grid, parts=parts), scheme), grid.parts.get("matrix_scale"))


def unpack(tensor: QuantizedTensor) -> Tensor:
    """The weights float32 that llama.cpp computes with: what its dequantizer gives, times the scale of the matrix."""
    W = _TYPE.unpack(tensor)
    return W * tensor.parts["scale"] if "scale" in tensor.parts else W


def encode(W: Tensor, scheme: Scheme, importance: Tensor | None = None) -> QuantizedTensor:
    """``W`` [..., out, in], any float dtype, as ggml's very bytes; a scaled matrix after it is divided by its scale."""
    if not scheme.option("scaled"):
        return _TYPE.encode(W, scheme, importance)
    scale = _matrix_scale(W)
    return _with_scale(_TYPE.encode(W.float() / scale, scheme, importance), scale)


def _matrix_scale(W: Tensor) -> Tensor:
    """[1] float32 that makes the largest of all scales the largest of E4M3, rounded up so that it is none larger; 1 for zeros."""
    scale = W.float().abs().max() / (FLOAT8["e4m3"].largest * FP4_LARGEST)
    return torch.where(scale > 0, scale.nextafter(torch.full_like(scale, torch.inf)), 1.0).view(1)


def _with_scale(tensor: QuantizedTensor, scale: Tensor | None) -> QuantizedTensor:
    return tensor if scale is None else replace(tensor, parts={**tensor.parts, "scale": scale})
