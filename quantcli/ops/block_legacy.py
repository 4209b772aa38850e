"""ggml's block types of 32 weights in torch, one class each: search, encode, pack, unpack, decode (layouts: ``kernels/blocks``)."""

from __future__ import annotations

import torch
from torch import Tensor

from quantcli.ops.block_search import (
    Found,
    Kind,
    Params,
    from_half,
    half_at,
    half_bytes,
    least_of,
    nearest_int,
    peak_of,
    ratio,
    ray_code,
    round_half_away,
    search_line,
    search_ray,
    signed_byte,
    square_root,
    to_half,
    truncate,
)


def inverse_of(d: Tensor) -> Tensor:
    return torch.where(d == 0, 0.0, ratio(1, d))


def pack_nibbles(codes: Tensor, n_bits: int) -> Tensor:
    """Codes [32, n] from 0 as bytes: of five bits the fifth bits first, 4 bytes; then 16 of low halves, i and i + 16 in a byte."""
    low = codes[:16] & 15 | (codes[16:] & 15) << 4
    if n_bits == 4:
        return low
    bit = torch.arange(8, dtype=torch.int32, device=codes.device)[:, None]
    fifth = ((codes.view(4, 8, -1) >> 4 & 1) << bit).sum(1, dtype=torch.int32)
    return torch.cat((fifth, low))


def unpack_nibbles(data: Tensor, n_bits: int) -> Tensor:
    low = data[-16:]
    codes = torch.cat((low & 15, low >> 4))
    if n_bits == 4:
        return codes
    bit = torch.arange(8, dtype=torch.int32, device=data.device)[:, None]
    return codes | (data[:4, None] >> bit & 1).view(32, -1) << 4


class Q8_0:
    kind = Kind(32, 34, 32, -127, 127, is_weighted=False)

    @staticmethod
    def search(x: Tensor, importance: Tensor | None, power: Tensor | None) -> Found:
        d = ratio(x.abs().amax(0), 127)
        return Found(Params(to_half(d)), inverse_of(d)[None])

    @staticmethod
    def encode(x: Tensor, found: Found) -> Tensor:
        return signed_byte(round_half_away(x * found.inverse))

    @staticmethod
    def pack(codes: Tensor, params: Params) -> Tensor:
        return torch.cat((half_bytes(params.d), codes & 255))

    @staticmethod
    def unpack(data: Tensor) -> tuple[Tensor, Params]:
        return signed_byte(data[2:]), Params(half_at(data, 0))

    @staticmethod
    def decode(codes: Tensor, params: Params) -> Tensor:
        return codes.float() * from_half(params.d)


class Symmetric:
    """Q4_0 and Q5_0: w = d·q, q = −n_max … n_max − 1."""

    kind: Kind
    n_bits: int

    @classmethod
    def search(cls, x: Tensor, importance: Tensor | None, power: Tensor | None) -> Found:
        n_max = cls.kind.hi + 1
        if importance is not None and power is not None:
            scale, inverse = search_ray(x, importance * square_root(power + x * x), n_max)
            return Found(Params(to_half(scale)), inverse[None], is_weighted=True)
        d = peak_of(x) / -n_max
        return Found(Params(to_half(d)), inverse_of(d)[None])

    @classmethod
    def encode(cls, x: Tensor, found: Found) -> Tensor:
        n_max = cls.kind.hi + 1
        if found.is_weighted:
            return ray_code(found.inverse, x, n_max)
        return signed_byte(truncate(x * found.inverse + (n_max + 0.5))).clamp(max=2 * n_max - 1) - n_max

    @classmethod
    def pack(cls, codes: Tensor, params: Params) -> Tensor:
        return torch.cat((half_bytes(params.d), pack_nibbles(codes - cls.kind.lo, cls.n_bits)))

    @classmethod
    def unpack(cls, data: Tensor) -> tuple[Tensor, Params]:
        return unpack_nibbles(data[2:], cls.n_bits) + cls.kind.lo, Params(half_at(data, 0))

    @staticmethod
    def decode(codes: Tensor, params: Params) -> Tensor:
        return codes.float() * from_half(params.d)


class Q4_0(Symmetric):
    kind, n_bits = Kind(32, 18, 32, -8, 7, row_power=True), 4


class Q5_0(Symmetric):
    kind, n_bits = Kind(32, 22, 32, -16, 15, row_power=True), 5


class Affine:
    """Q4_1 and Q5_1: w = d·q + m, q = 0 … hi."""

    kind: Kind
    n_bits: int

    @classmethod
    def search(cls, x: Tensor, importance: Tensor | None, power: Tensor | None) -> Found:
        if importance is not None and power is not None:
            weights = importance * square_root(power + x * x)
            scale, low, inverse, origin = search_line(x, weights, cls.kind.hi, -0.9, 0.05, 36)
            return Found(Params(to_half(scale), m=to_half(low)), inverse[None], origin[None], is_weighted=True)
        low = least_of(x)
        d = ratio(x.amax(0) - low, cls.kind.hi)
        return Found(Params(to_half(d), m=to_half(low)), inverse_of(d)[None], low[None])

    @classmethod
    def encode(cls, x: Tensor, found: Found) -> Tensor:
        if found.is_weighted:
            return nearest_int(found.inverse * (x - found.origin)).clamp(0, cls.kind.hi)
        return (truncate((x - found.origin) * found.inverse + 0.5) & 255).clamp(max=cls.kind.hi)

    @classmethod
    def pack(cls, codes: Tensor, params: Params) -> Tensor:
        assert params.m is not None
        return torch.cat((half_bytes(params.d), half_bytes(params.m), pack_nibbles(codes, cls.n_bits)))

    @classmethod
    def unpack(cls, data: Tensor) -> tuple[Tensor, Params]:
        return unpack_nibbles(data[4:], cls.n_bits), Params(half_at(data, 0), m=half_at(data, 2))

    @staticmethod
    def decode(codes: Tensor, params: Params) -> Tensor:
        assert params.m is not None
        return codes.float() * from_half(params.d) + from_half(params.m)


class Q4_1(Affine):
    kind, n_bits = Kind(32, 20, 32, 0, 15, has_offset=True, row_power=True), 4


class Q5_1(Affine):
    kind, n_bits = Kind(32, 24, 32, 0, 31, has_offset=True, row_power=True), 5
