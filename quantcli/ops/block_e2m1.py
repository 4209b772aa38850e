"""ggml's MXFP4 and NVFP4 in torch: 4-bit floats under a scale of 8 bits (layouts: ``kernels/blocks/e2m1.h``).

Levels are twice E2M1's numbers, scales half of what their bits mean elsewhere. There is no ``d``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantcli.ops.block_legacy import pack_nibbles, unpack_nibbles
from quantcli.ops.block_search import Found, Kind, Params, ratio, truncate

LEVELS = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 0.0, -1.0, -2.0, -3.0, -4.0, -6.0, -8.0, -12.0)


def floor_log2(x: Tensor) -> Tensor:
    """⌊log2f(x)⌋ of x > 0 as glibc computes it, and so ggml: just below a power of two the logarithm rounds up to it.

    There x = 2^k·(1 − j·2⁻²⁴), log2 x ≈ k − j·2⁻²⁴/ln 2, and float32 is spaced by 2⁻²³ times the power of two in k.
    """
    subnormal = x < 2.0**-126
    word = torch.where(subnormal, x * 2.0**24, x).view(torch.int32)
    exponent = (word >> 23) - torch.where(subnormal, 127 + 24, 127)
    k, j = exponent + 1, 0x800000 - (word & 0x7FFFFF)
    distance = torch.where(k > 0, k - 1, -k)  # a power of two is spaced finer from below
    half_spacing = (distance.float().view(torch.int32) & 0x7F800000).view(torch.float32)
    return torch.where(j.float() <= half_spacing * 0.6931472, k, exponent)


def e8m0_half(bits: Tensor) -> Tensor:
    """2^(bits − 128) of each byte."""
    subnormal = torch.where(bits == 0, 0x00200000, 0x00400000)
    return torch.where(bits < 2, subnormal, (bits - 1) << 23).int().view(torch.float32)


def to_ue4m3(x: Tensor) -> Tensor:
    """The bits of the unsigned E4M3 nearest to x ≥ 0 as ggml rounds: halves up, and what reaches 256 becomes the largest, 448."""
    word = x.clamp(max=448.0).view(torch.int32)
    rounded = (word - ((127 - 7) << 23) + (1 << 19)) >> 20
    small = truncate(x.clamp(max=448.0) * 512 + 0.5).clamp(max=7)
    return torch.where((word >> 23) - 127 + 7 <= 0, small, torch.where(rounded >= 0x78, 0x7E, rounded))


def ue4m3_half(bits: Tensor) -> Tensor:
    """Half of the unsigned E4M3 of each byte; its NaN is 0."""
    exponent, mantissa = bits >> 3 & 15, bits & 7
    normal = ((exponent + (127 - 8)) << 23 | mantissa << 20).int().view(torch.float32)
    scale = torch.where(exponent == 0, mantissa * 2.0**-10, normal)
    return torch.where(bits == 0x7F, 0.0, scale)


def nearest_level(x: Tensor, scale: Tensor) -> Tensor:
    """The code of least |scale·level − x|, the first of equals: differences are rounded, so that far from every level many are equal."""
    code, least = torch.zeros_like(x, dtype=torch.int32), x.abs()
    for k in (*range(1, 8), *range(9, 16)):
        error = (LEVELS[k] * scale - x).abs()
        better = error < least
        code, least = torch.where(better, k, code), torch.where(better, error, least)
    return code


def level_at(codes: Tensor) -> Tensor:
    return torch.tensor(LEVELS, device=codes.device)[codes.long()]


class MXFP4:
    kind = Kind(32, 17, 32, 0, 15, torch.uint8, d_at=None, is_weighted=False, levels=LEVELS, scale_of=e8m0_half)

    @staticmethod
    def search(x: Tensor, importance: Tensor | None, power: Tensor | None) -> Found:
        peak = x.abs().amax(0)
        exponent = torch.where(peak > 0, (floor_log2(peak) + (127 - 2)) & 255, 0)  # ggml keeps the low byte of one below zero
        return Found(Params(torch.empty_like(exponent), exponent[None]))

    @staticmethod
    def encode(x: Tensor, found: Found) -> Tensor:
        assert found.params.scale is not None
        return nearest_level(x, e8m0_half(found.params.scale))

    @staticmethod
    def pack(codes: Tensor, params: Params) -> Tensor:
        assert params.scale is not None
        return torch.cat((params.scale, pack_nibbles(codes, 4)))

    @staticmethod
    def unpack(data: Tensor) -> tuple[Tensor, Params]:
        return unpack_nibbles(data[1:], 4), Params(torch.empty_like(data[0]), data[:1])

    @staticmethod
    def decode(codes: Tensor, params: Params) -> Tensor:
        assert params.scale is not None
        return level_at(codes) * e8m0_half(params.scale)


class NVFP4:
    kind = Kind(64, 36, 16, 0, 15, torch.uint8, d_at=None, is_weighted=False, levels=LEVELS, scale_of=ue4m3_half)

    @staticmethod
    def search(x: Tensor, importance: Tensor | None, power: Tensor | None) -> Found:
        peak = x.view(4, 16, -1).abs().amax(1)
        scale = to_ue4m3(ratio(peak, 6))
        return Found(Params(torch.empty_like(scale[0]), scale))

    @staticmethod
    def encode(x: Tensor, found: Found) -> Tensor:
        assert found.params.scale is not None
        return nearest_level(x, ue4m3_half(found.params.scale).repeat_interleave(16, 0))

    @staticmethod
    def pack(codes: Tensor, params: Params) -> Tensor:
        assert params.scale is not None
        pairs = codes.view(4, 2, 8, -1)
        return torch.cat((params.scale, (pairs[:, 0] | pairs[:, 1] << 4).view(32, -1)))

    @staticmethod
    def unpack(data: Tensor) -> tuple[Tensor, Params]:
        low = data[4:].reshape(4, 8, -1)
        return torch.stack((low & 15, low >> 4), 1).view(64, -1), Params(torch.empty_like(data[0]), data[:4])

    @staticmethod
    def decode(codes: Tensor, params: Params) -> Tensor:
        assert params.scale is not None
        return level_at(codes) * ue4m3_half(params.scale).repeat_interleave(16, 0)
