"""Blocks of 4-bit codes, sixteen levels times the block's largest magnitude: NF4 and FP4, bytes as bitsandbytes has them on the CPU.

A tensor of n weights is one row of blocks, the last of which may be short. For a block with scale s = max |w| and each of its weights::

    code = that of the level nearest to w · (1 / max(s, 1e-38)), a tie to the lower level

in float32, every operation rounded. The short block has s = max(max |w|, 1e-38) and divides, w / s: bitsandbytes' own difference. Codes go
two to a byte, the even weight in the high half; where n is odd, the last low half is the code of zero. A lane is a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantcli.errors import KernelError
from quantcli.ops.dispatch import kernel, stream

SMALLEST = 1e-38
"""Below this a block's scale is not inverted. float32 holds it as a subnormal number."""

BLOCKS_AT_ONCE = 1 << 15
"""Blocks that the references look at together."""


@dataclass(frozen=True, slots=True)
class Book:
    """Sixteen ``levels`` [16] float32 by code, within −1 … 1; ``order`` [16] int32: the codes from the lowest level up, equal levels by
    code; ``mids`` [15] float32: where the nearest level changes; ``heap`` [16] float32: the same as a search tree, children of i at 2i and
    2i + 1, entry 0 unused."""

    levels: Tensor
    order: Tensor
    mids: Tensor
    heap: Tensor

    @classmethod
    def of(cls, levels: Tensor) -> Book:
        """The book of ``levels``: [16] in the order of their codes."""
        if tuple(levels.shape) != (16,) or not bool(levels.isfinite().all()):
            raise KernelError(f"a book has 16 finite levels, got {list(levels.shape)}")
        levels = levels.to(torch.float32).contiguous()
        order = torch.argsort(levels, stable=True)
        ascending = levels[order]
        mids = (ascending[:-1] + ascending[1:]) / 2
        places = [0] + [place for step in (16, 8, 4, 2) for place in range(step // 2 - 1, 15, step)]
        return cls(levels, order.to(torch.int32), mids, mids[places].contiguous())

    @property
    def is_sorted(self) -> bool:
        """Whether a code is its level's rank."""
        return bool((self.order == torch.arange(16, device=self.order.device)).all())

    def to(self, device: torch.device) -> Book:
        """The same on ``device``."""
        if self.levels.device == device:
            return self
        return Book(*(tensor.to(device) for tensor in (self.levels, self.order, self.mids, self.heap)))


def quantize_float4(W: Tensor, book: Book, *, block_size: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of ``W`` (any shape, float32, bfloat16 or float16), flattened: packed [⌈n/2⌉] uint8 and scale [n_blocks] float32."""
    _check(W, block_size, (torch.float32, torch.bfloat16, torch.float16))
    W, book = W.detach().reshape(-1).contiguous(), book.to(W.device)
    kernels = kernel(W)
    if kernels is None:
        return quantize_float4_reference(W, book, block_size=block_size)
    packed = torch.empty(-(-W.numel() // 2), dtype=torch.uint8, device=W.device)
    scale = torch.empty(-(-W.numel() // block_size), dtype=torch.float32, device=W.device)
    kernels.quantize_float4(W, block_size, *_tables(book), packed, scale, stream=stream(W))
    return packed, scale


def dequantize_float4(packed: Tensor, scale: Tensor, book: Book, *, block_size: int, n: int) -> Tensor:
    """The weights [n] float32 of ``packed`` [⌈n/2⌉] uint8 and ``scale`` [n_blocks] float32: level · scale."""
    packed, scale, book = _codes(packed, scale, book, block_size, n)
    kernels = kernel(packed)
    if kernels is None:
        return dequantize_float4_reference(packed, scale, book, block_size=block_size, n=n)
    W = torch.empty(n, dtype=torch.float32, device=packed.device)
    kernels.dequantize_float4(packed, scale, block_size, *_tables(book), W, stream=stream(packed))
    return W


def float4_errors(W: Tensor, packed: Tensor, scale: Tensor, book: Book, *, block_size: int) -> tuple[Tensor, Tensor]:
    """Σ (w − ŵ)² and Σ w² of each block of ``W`` (as for :func:`quantize_float4`): two [n_blocks] float32, summed in order."""
    _check(W, block_size, (torch.float32, torch.bfloat16, torch.float16))
    W = W.detach().reshape(-1).contiguous()
    packed, scale, book = _codes(packed, scale, book, block_size, W.numel())
    kernels = kernel(W)
    if kernels is None:
        return float4_errors_reference(W, packed, scale, book, block_size=block_size)
    error, energy = torch.empty_like(scale), torch.empty_like(scale)
    kernels.float4_errors(W, packed, scale, block_size, *_tables(book), error, energy, stream=stream(W))
    return error, energy


def pack_float4(codes: Tensor) -> Tensor:
    """Two codes a byte, the first in the high half: ``codes`` [n] below 16, n even or not (0 fills up). Returns [⌈n/2⌉] uint8."""
    codes = codes.reshape(-1).to(torch.uint8)
    if codes.numel() % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[::2] << 4 | codes[1::2]


def unpack_float4(packed: Tensor, n: int) -> Tensor:
    """The ``n`` codes [n] uint8 of ``packed``."""
    return torch.stack((packed >> 4, packed & 15), dim=-1).reshape(-1)[:n]


def quantize_float4_reference(W: Tensor, book: Book, *, block_size: int) -> tuple[Tensor, Tensor]:
    """The same in torch. ``W``: [n]."""
    n_whole = W.numel() // block_size
    whole, rest = W[: n_whole * block_size].view(-1, block_size), W[n_whole * block_size :].float()
    ranks, scales = [], []
    for first in range(0, max(1, len(whole)), BLOCKS_AT_ONCE):
        X = whole[first : first + BLOCKS_AT_ONCE].float()
        scale = X.abs().amax(1)
        ranks.append(torch.bucketize(X * (1.0 / scale.clamp_min(SMALLEST))[:, None], book.mids).to(torch.uint8).view(-1))
        scales.append(scale)
    if rest.numel():
        scale = rest.abs().amax().clamp_min(SMALLEST)
        ranks.append(torch.bucketize(rest / scale, book.mids).to(torch.uint8))
        scales.append(scale[None])
    if W.numel() % 2:
        ranks.append(torch.bucketize(torch.zeros(1, device=W.device), book.mids).to(torch.uint8))
    codes = book.order.to(torch.uint8)[torch.cat([*ranks, W.new_empty(0, dtype=torch.uint8)]).int()]
    return pack_float4(codes), torch.cat([*scales, W.new_empty(0, dtype=torch.float32)])


def dequantize_float4_reference(packed: Tensor, scale: Tensor, book: Book, *, block_size: int, n: int) -> Tensor:
    """The same in torch."""
    return book.levels[unpack_float4(packed, n).int()] * scale.repeat_interleave(block_size)[:n]


def float4_errors_reference(W: Tensor, packed: Tensor, scale: Tensor, book: Book, *, block_size: int) -> tuple[Tensor, Tensor]:
    """The same in torch, one place of the block at a time over all blocks. ``W``: [n]."""
    W_hat = dequantize_float4_reference(packed, scale, book, block_size=block_size, n=W.numel())
    error, energy = torch.zeros_like(scale), torch.zeros_like(scale)
    for i in range(min(block_size, W.numel())):
        x = W[i::block_size].float()
        difference = x - W_hat[i::block_size]
        error[: len(x)] += difference * difference
        energy[: len(x)] += x * x
    return error, energy


def _tables(book: Book) -> tuple[Tensor, Tensor | None, Tensor]:
    """A book as kernels take it."""
    return book.heap, None if book.is_sorted else book.order, book.levels


def _codes(packed: Tensor, scale: Tensor, book: Book, block_size: int, n: int) -> tuple[Tensor, Tensor, Book]:
    """Codes and scales flat and contiguous, the book beside them; :class:`KernelError` when they do not fit ``n`` weights."""
    _check(packed, block_size, (torch.uint8,))
    if packed.numel() != -(-n // 2) or scale.dtype != torch.float32 or scale.numel() != -(-n // block_size):
        raise KernelError(
            f"{n} weights in blocks of {block_size} have {-(-n // 2)} bytes and {-(-n // block_size)} float32 scales, "
            f"got {packed.numel()} and {scale.numel()} of {scale.dtype}"
        )
    return packed.reshape(-1).contiguous(), scale.reshape(-1).contiguous(), book.to(packed.device)


def _check(tensor: Tensor, block_size: int, dtypes: tuple[torch.dtype, ...]) -> None:
    if block_size < 32 or block_size % 32:
        raise KernelError(f"block_size is {block_size}; expected a multiple of 32")
    if tensor.dtype not in dtypes:
        raise KernelError(f"got {tensor.dtype} {list(tensor.shape)}; expected {' or '.join(map(str, dtypes))}")
