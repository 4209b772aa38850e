"""Codes of 2 to 8 bits as a dense run of bits in 32-bit words, least significant bit first.

Code i of a row occupies bits i·bits … (i+1)·bits − 1 of the row, and bit b of the row is bit b mod 32 of word b div 32. For 3 bits 32 codes
fill 3 words, and codes 10 and 21 lie across two of them::

    word 0   c0 c1 … c9 c10[0:2]     word 1   c10[2] c11 … c20 c21[0]     word 2   c21[1:3] c22 … c31

This is the layout of GPTQ's ``qweight`` and ``qzeros`` (turned so that the packed axis runs last), and of compressed-tensors' packed codes,
which 5, 6 and 7 bits have too: these are packed by the reference alone, 32 (6 bits: 16) codes to a run.
"""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor

from quantcli.errors import KernelError
from quantcli.ops.dispatch import kernel, stream

BITS = tuple(range(2, 9))

KERNEL_BITS = (2, 3, 4, 8)
"""Those that a kernel packs."""


def codes_per_run(bits: int) -> int:
    """Codes after which the pattern of words repeats, and the multiple that a row's length must have: 16, 32, 8, 4 for 2, 3, 4, 8 bits."""
    return 32 // gcd(bits, 32)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Words of ``codes``: [rows, n] uint8 below 2^bits, n a multiple of :func:`codes_per_run`. Returns [rows, n·bits/32] int32."""
    _check(codes, torch.uint8, bits, codes_per_run(bits) if bits in BITS else 1, "codes")
    if codes.numel() and int(codes.max()) >= 2**bits:
        raise KernelError(f"pack_bits: the largest code is {int(codes.max())}; expected at most {2**bits - 1} for {bits} bits")
    codes = codes.contiguous()
    kernels = kernel(codes) if bits in KERNEL_BITS else None
    if kernels is None:
        return pack_bits_reference(codes, bits)
    packed = torch.empty(codes.shape[0], codes.shape[1] * bits // 32, dtype=torch.int32, device=codes.device)
    kernels.pack_bits(codes, bits, packed, stream=stream(codes))
    return packed


def unpack_bits(packed: Tensor, bits: int, n: int) -> Tensor:
    """The ``n`` codes of each row of ``packed``: [rows, n·bits/32] int32. Returns [rows, n] uint8."""
    _check(packed, torch.int32, bits, bits // gcd(bits, 32) if bits in BITS else 1, "packed")
    if n * bits != packed.shape[1] * 32:
        raise KernelError(f"unpack_bits: {n} codes of {bits} bits do not fill {packed.shape[1]} words of 32 bits a row")
    packed = packed.contiguous()
    kernels = kernel(packed) if bits in KERNEL_BITS else None
    if kernels is None:
        return unpack_bits_reference(packed, bits, n)
    codes = torch.empty(packed.shape[0], n, dtype=torch.uint8, device=packed.device)
    kernels.unpack_bits(packed, bits, codes, stream=stream(packed))
    return codes


def pack_bits_reference(codes: Tensor, bits: int) -> Tensor:
    """The same in torch, one place of the run at a time over all rows and runs."""
    run = codes_per_run(bits)
    codes = codes.view(codes.shape[0], -1, run)
    packed = torch.zeros(*codes.shape[:2], run * bits // 32, dtype=torch.int64, device=codes.device)
    for i in range(run):
        word, shift = divmod(i * bits, 32)
        code = codes[:, :, i].long()
        packed[:, :, word] |= (code << shift) & 0xFFFFFFFF
        if shift + bits > 32:
            packed[:, :, word + 1] |= code >> (32 - shift)
    return ((packed ^ 0x80000000) - 0x80000000).to(torch.int32).view(codes.shape[0], -1)  # back into the signed range


def unpack_bits_reference(packed: Tensor, bits: int, n: int) -> Tensor:
    """The same in torch, one place of the run at a time over all rows and runs."""
    run = codes_per_run(bits)
    runs = (packed.long() & 0xFFFFFFFF).view(packed.shape[0], -1, run * bits // 32)
    codes = torch.empty(*runs.shape[:2], run, dtype=torch.uint8, device=packed.device)
    for i in range(run):
        word, shift = divmod(i * bits, 32)
        code = runs[:, :, word] >> shift
        if shift + bits > 32:
            code = code | (runs[:, :, word + 1] << (32 - shift))
        codes[:, :, i] = (code & (2**bits - 1)).to(torch.uint8)
    return codes.view(packed.shape[0], n)


def _check(tensor: Tensor, dtype: torch.dtype, bits: int, multiple: int, name: str) -> None:
    if bits not in BITS:
        raise KernelError(f"bits is {bits}; expected 2 to 8")
    if tensor.ndim != 2 or tensor.dtype != dtype:
        raise KernelError(f"{name} is {tensor.dtype} {list(tensor.shape)}; expected {dtype} with two dimensions")
    if tensor.shape[1] % multiple:
        raise KernelError(f"{name} has {tensor.shape[1]} columns; expected a multiple of {multiple} for {bits} bits")
