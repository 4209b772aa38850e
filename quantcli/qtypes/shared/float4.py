"""What NF4 and FP4 share as qtypes: blocks over the flattened matrix, and bitsandbytes' double quantization of their scales.

Double quantization (Dettmers et al., "QLoRA", arXiv 2305.14314, section 3) stores the scales in 8 bits. With a the scales of a matrix::

    offset = mean(a);   b = a − offset, in blocks of 256;   nested = max |b| of a block;   code = nearest(b / nested) in the dynamic map
    a ≈ map[code] · nested + offset

Two of bitsandbytes' habits on the CPU are part of its bytes and so of ours. The nearest entry is looked up in a table of 65536 even
steps from −1 to 1, not searched for, so that entries closer than a step to zero are never chosen. And the mean is torch's, whose order of
summation depends on the machine's vectors and, from 32768 scales on, on the number of threads: ours is the one of a single thread. On CUDA
bitsandbytes searches, and sums in yet another order: codes of absmax and last bits of the offset differ. Every reader decodes what is
stored, so that all of these are right.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from quantcli.errors import RecipeError
from quantcli.ops.float4 import Book, dequantize_float4, float4_errors, pack_float4, quantize_float4
from quantcli.qtypes import Parts, QType
from quantcli.qtypes.shared.affine import EXACT
from quantcli.tensors import Grid, QuantizedTensor, Scheme, TensorSpec, ordered_sum

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""What bitsandbytes' kernels take."""

NESTED_BLOCK = 256

SMALLEST_DYNAMIC = -6
"""The dynamic map's smallest power of ten."""

LOOKUP_STEPS = 1 << 16


class Float4Type(QType):
    """A 4-bit type by its ``levels``, in the order of their codes."""

    options: ClassVar[Mapping[str, Any]] = {"block_size": 64, "double_quant": False}

    def __init__(self, name: str, levels: tuple[float, ...]) -> None:
        self.name = name
        self._levels = levels

    @override
    def layout(self, shape: tuple[int, ...], scheme: Scheme) -> dict[str, TensorSpec]:
        """The parts of a matrix of ``shape``; any width will do."""
        block, nested = self._options(scheme)
        if len(shape) != 2:
            raise RecipeError(f"{scheme} codes matrices [out, in], got shape {list(shape)}; exclude this tensor")
        n = shape[0] * shape[1]
        n_blocks = -(-n // block)
        parts = {"packed": ("U8", (-(-n // 2),)), "absmax": ("U8" if nested else "F32", (n_blocks,))}
        if nested:
            parts |= {"nested_absmax": ("F32", (-(-n_blocks // NESTED_BLOCK),)), "nested_offset": ("F32", (1,))}
        return {name: TensorSpec.dense(name, dtype, size) for name, (dtype, size) in parts.items()}

    @override
    def encode(self, W: Tensor, scheme: Scheme, importance: Tensor | None = None, *, fused: Parts | None = None) -> QuantizedTensor:
        """Bitsandbytes' bytes of ``W`` [out, in], in float32, bfloat16 or float16. ``importance`` has no say in them."""
        self.layout(tuple(W.shape), scheme)
        block, nested = self._options(scheme)
        packed, absmax = quantize_float4(W.contiguous(), book_of(self._levels), block_size=block)
        return QuantizedTensor(scheme, tuple(W.shape), {"packed": packed, **stored_scales(absmax, nested=nested)})

    @override
    def fit(self, W: Tensor, scheme: Scheme, importance: Tensor | None = None, *, fused: Parts | None = None) -> Grid:
        """The grid of ``W`` [out, in] float32: the scales are given by its blocks. Codes are ranks of levels, from the lowest up.

        Raises :class:`RecipeError` where a block would lie in two rows: a solver that changes a row would change the next one's scale.
        """
        self.layout(tuple(W.shape), scheme)
        block, nested = self._options(scheme)
        if W.shape[1] % block:
            raise RecipeError(
                f"in_features {W.shape[1]} is not a multiple of the {scheme} block {block}, so that blocks lie across rows, which only the "
                "pass rtn can code; use a smaller block, or rtn for this tensor"
            )
        absmax = W.contiguous().view(-1, block).abs().amax(1)
        parts = stored_scales(absmax, nested=nested)
        scale = scales_of(parts).view(W.shape[0], -1)
        book = book_of(self._levels).to(W.device)
        return Grid(scale, None, 0, 15, block, book=book.levels[book.order.int()], parts=parts)

    @override
    def pack(self, codes: Tensor, grid: Grid, scheme: Scheme) -> QuantizedTensor:
        """Ranks ``codes`` [out, in] of ``grid`` as parts."""
        order = book_of(self._levels).to(codes.device).order.to(torch.uint8)
        return QuantizedTensor(scheme, tuple(codes.shape), {"packed": pack_float4(order[codes.int()]), **grid.parts})

    @override
    def unpack(self, tensor: QuantizedTensor) -> Tensor:
        """The weights [out, in] float32 that an engine computes: level · scale."""
        n = tensor.shape[0] * tensor.shape[1]
        block, _ = self._options(tensor.scheme)
        W = dequantize_float4(tensor.parts["packed"], scales_of(tensor.parts), book_of(self._levels), block_size=block, n=n)
        return W.view(tensor.shape)

    @override
    def errors(self, W: Tensor, tensor: QuantizedTensor, *, chunk_elements: int = 1 << 18) -> tuple[float, float]:
        """‖W−Ŵ‖² and ‖W‖² of ``W`` [out, in], block by block: Ŵ is never in memory."""
        block, _ = self._options(tensor.scheme)
        error, energy = float4_errors(W, tensor.parts["packed"], scales_of(tensor.parts), book_of(self._levels), block_size=block)
        return float(ordered_sum(error)), float(ordered_sum(energy))

    @override
    def variants(self, scheme: Scheme) -> Iterator[Scheme]:
        yield scheme
        yield scheme.with_options(double_quant=False)

    @override
    def holds(self, source: Scheme, target: Scheme, in_features: int) -> str | None:
        """The same codes in the same blocks, their scales in float32."""
        same_blocks = source.qtype == self.name and source.option("block_size") == target.option("block_size")
        return EXACT if same_blocks and not target.option("double_quant") else None

    @override
    def take(self, tensor: QuantizedTensor, target: Scheme) -> QuantizedTensor:
        return QuantizedTensor(target, tensor.shape, {"packed": tensor.parts["packed"], "absmax": scales_of(tensor.parts)})

    def _options(self, scheme: Scheme) -> tuple[int, bool]:
        block, nested = scheme.get("block_size", 64), scheme.get("double_quant", False)
        if block not in BLOCK_SIZES:
            raise RecipeError(f"{scheme}: block_size is {block}; bitsandbytes has {', '.join(map(str, BLOCK_SIZES))}")
        if not isinstance(nested, bool):
            raise RecipeError(f"{scheme}: double_quant is {nested}; expected true or false")
        return block, nested


@cache
def book_of(levels: tuple[float, ...]) -> Book:
    """The book of a type with ``levels``, in the order of their codes."""
    return Book.of(torch.tensor(levels, dtype=torch.float32))


def stored_scales(absmax: Tensor, *, nested: bool) -> dict[str, Tensor]:
    """The parts that hold ``absmax`` [n_blocks] float32: itself, or its 8 bits. These are found on the CPU, whatever the device."""
    if not nested:
        return {"absmax": absmax}
    a = absmax.cpu()
    offset = torch.stack((a, a)).mean(1)[:1]  # two rows, since one alone would be summed in as many pieces as there are threads
    b = torch.nn.functional.pad(a - offset, (0, -len(a) % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    peak = b.abs().amax(1)
    step = ((b * (1.0 / peak)[:, None]).nan_to_num_(-1.0).clamp_(-1.0, 1.0) + 1.0) * 0.5 * (LOOKUP_STEPS - 1) + 0.5
    codes = torch.where((peak == 0)[:, None], 0, nearest_dynamic()[step.int()]).view(-1)[: len(a)]
    parts = {"absmax": codes, "nested_absmax": peak, "nested_offset": offset}
    return {name: part.to(absmax.device) for name, part in parts.items()}


def scales_of(parts: Mapping[str, Tensor]) -> Tensor:
    """The scales [n_blocks] float32 that ``parts`` hold."""
    absmax = parts["absmax"]
    if "nested_absmax" not in parts:
        return absmax
    peak = parts["nested_absmax"].repeat_interleave(NESTED_BLOCK)[: len(absmax)]
    return dynamic_map().to(absmax.device)[absmax.int()] * peak + parts["nested_offset"]


@cache
def dynamic_map() -> Tensor:
    """The 256 entries of bitsandbytes' dynamic 8-bit type, ascending: 0, 1, and for each power of ten 10⁻⁶ … 1 twice as many even steps
    between its tenth and itself as for the one before, on both sides (Dettmers, "8-Bit Approximations", arXiv 1511.04561)."""
    entries = [0.0, 1.0]
    for i in range(7):
        bounds = torch.linspace(0.1, 1, 2**i + 1)
        means = (10.0 ** (SMALLEST_DYNAMIC + i) * ((bounds[:-1] + bounds[1:]) / 2)).tolist()
        entries += means + [-mean for mean in means]
    return torch.tensor(sorted(entries), dtype=torch.float32)


@cache
def nearest_dynamic() -> Tensor:
    """The code [65536] uint8 of the entry nearest to each of as many even steps from −1 to 1."""
    entries = dynamic_map()
    steps = -1.0 + 2.0 * torch.arange(LOOKUP_STEPS, dtype=torch.float32) / (LOOKUP_STEPS - 1)
    return torch.bucketize(steps, 0.5 * (entries[:-1] + entries[1:])).to(torch.uint8)
