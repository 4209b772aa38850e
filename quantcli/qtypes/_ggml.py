"""What ggml's block types share as qtypes: sizes, the grid of a matrix, and ggml's own bytes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantcli.errors import NumericsError, RecipeError
from quantcli.ops.blocks import KINDS, Params, dequantize_blocks, fit_blocks, pack_blocks, quantize_blocks
from quantcli.tensors import Grid, QuantizedTensor, Scheme, TensorSpec, check_divisible


def effective(params: Params, group_block: int) -> tuple[Tensor, Tensor | None]:
    """Scale and offset of every sub-block, [out, n_sub] float32, as ggml's dequantizer computes them: w = scale·q + offset.

    ``group_block``: sub-blocks in a block, which share ``d`` and ``dmin``.
    """
    d = params["d"].float().repeat_interleave(group_block, 1)
    if "scale" not in params:
        return d, None
    scale = d * params["scale"].float()
    if "min" not in params:
        return scale, None
    return scale, -(params["dmin"].float().repeat_interleave(group_block, 1) * params["min"].float())


@dataclass(frozen=True, slots=True)
class BlockType:
    """One of ggml's block types, codes ``lo`` … ``hi``, with one part ``blocks`` U8 [out, row_bytes].

    ``hint`` tells the user what fits where rows are not whole blocks.
    """

    kind: str
    lo: int
    hi: int
    hint: str

    def layout(self, shape: tuple[int, ...], scheme: Scheme) -> dict[str, TensorSpec]:
        """The part ``blocks`` of a matrix of ``shape``; :class:`RecipeError` unless rows are whole blocks."""
        if len(shape) != 2:
            raise RecipeError(f"{scheme} codes matrices [out, in], got shape {list(shape)}; exclude this tensor")
        sizes = KINDS[self.kind]
        check_divisible(shape, sizes.block, scheme, self.hint)
        return {"blocks": TensorSpec.dense("blocks", "U8", (shape[0], shape[1] // sizes.block * sizes.n_bytes))}

    def fit(self, W: Tensor, scheme: Scheme, importance: Tensor | None = None) -> Grid:
        """The grid that ggml's search finds for ``W`` [out, in]; ``importance`` [in] weighs it as llama.cpp's imatrix does."""
        self.layout(tuple(W.shape), scheme)
        sizes = KINDS[self.kind]
        params = fit_blocks(W, self.kind, importance)
        self._check_finite(W, *(params[name] for name in ("d", "dmin") if name in params))
        scale, offset = effective(params, sizes.block // sizes.sub)
        return Grid(scale, offset, self.lo, self.hi, sizes.sub, parts=params)

    def pack(self, codes: Tensor, grid: Grid, scheme: Scheme) -> QuantizedTensor:
        """``codes`` [out, in] of ``grid`` as ggml's blocks."""
        blocks = pack_blocks(codes.to(torch.int8), dict(grid.parts), self.kind)
        return QuantizedTensor(scheme, tuple(codes.shape), {"blocks": blocks})

    def unpack(self, tensor: QuantizedTensor) -> Tensor:
        """The weights [out, in] float32 that ggml's dequantizer computes."""
        return dequantize_blocks(tensor.parts["blocks"], self.kind, tensor.shape[-1])

    def encode(self, W: Tensor, scheme: Scheme, importance: Tensor | None = None) -> QuantizedTensor:
        """``W`` [out, in], any float dtype, as the very bytes of ``ggml_quantize_chunk``: its codes are not always the grid's nearest."""
        self.layout(tuple(W.shape), scheme)
        blocks = quantize_blocks(W, self.kind, importance)
        self._check_finite(W, *self._halves(blocks))
        return QuantizedTensor(scheme, tuple(W.shape), {"blocks": blocks})

    def _halves(self, blocks: Tensor) -> list[Tensor]:
        """``d`` (and ``dmin``) of each block: at its head, but for Q6_K, where ``d`` ends it."""
        sizes = KINDS[self.kind]
        halves = blocks.view(-1, sizes.n_bytes).view(torch.float16)  # n_bytes is even
        return [halves[:, -1]] if self.kind == "q6_k" else [halves[:, :2] if sizes.has_min else halves[:, 0]]

    def _check_finite(self, W: Tensor, *halves: Tensor) -> None:
        if all(bool(half.isfinite().all()) for half in halves):
            return
        largest = float(W.float().abs().max())
        raise NumericsError(f"a scale of {self.kind} does not fit float16 (largest |w| is {largest:.3g}); keep this tensor in F32 or BF16")
