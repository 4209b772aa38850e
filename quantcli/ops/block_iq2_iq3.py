"""ggml's code-book types in torch, one class each: search, encode, pack, unpack, decode (layouts: ``kernels/blocks/iq2.h``, ``iq3.h``)."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from quantcli.ops.block_grid import CodeBook, GridType, Sub
from quantcli.ops.block_search import (
    Kind,
    Params,
    half_at,
    half_bytes,
    search_scales,
    square_root,
)


def weave(bits: Tensor, n: int) -> Tensor:
    """[k · n, m] bits → [k, m]: each n of them one number, the first lowest."""
    shift = torch.arange(n, dtype=torch.int32, device=bits.device)[:, None]
    return (bits.reshape(-1, n, bits.shape[1]) << shift).sum(1, dtype=torch.int32)


def unweave(numbers: Tensor, n: int, width: int = 1) -> Tensor:
    """The inverse: ``n`` numbers of ``width`` bits each. [k, m] → [k · n, m]."""
    shift = width * torch.arange(n, dtype=torch.int32, device=numbers.device)[:, None]
    return (numbers[:, None] >> shift & (1 << width) - 1).reshape(-1, numbers.shape[1])


def words_of(data: Tensor) -> Tensor:
    """Little-endian bytes [4 k, n] → [k, n] int64."""
    quads = data.reshape(-1, 4, data.shape[1]).long()
    return quads[:, 0] | quads[:, 1] << 8 | quads[:, 2] << 16 | quads[:, 3] << 24


def bytes_of(words: Tensor, n_bytes: int = 4) -> Tensor:
    shift = 8 * torch.arange(n_bytes, device=words.device)[:, None]
    return (words.long()[:, None] >> shift & 255).int().reshape(-1, words.shape[1])


def even_signs(seven: Tensor) -> Tensor:
    """[k, n] numbers of seven bits → [8 k, n] minus signs, of which an even number is set."""
    bits = unweave(seven, 7).reshape(-1, 7, seven.shape[1])
    return torch.cat((bits, bits.sum(1, keepdim=True, dtype=torch.int32) % 2), 1).reshape(-1, seven.shape[1])


class IQ3(GridType):
    """Four levels of eight a run, 8 sub-blocks of 32 (``iq3.h``)."""

    width, step = 15, 0.2

    @classmethod
    @override
    def weights(cls, x: Tensor, importance: Tensor | None, power: Tensor) -> Tensor:
        return x * x if importance is None else importance * square_root(2 * power / 256 + x * x)


class IQ3_S(IQ3):
    kind = Kind(256, 110, 32, -15, 15, torch.int8, has_book=True, scale_range=(0, 15))
    book, magnitudes = CodeBook("IQ3_S", 8, 3), tuple(range(1, 16, 2))
    n_steps, fudge, refines = 9, 1.033, "all_if_any"

    @classmethod
    @override
    def steps(cls, d: Tensor, scale: Tensor) -> Tensor:
        return d * (1 + 2 * scale)

    @classmethod
    @override
    def finish(cls, points: Tensor, minus: Tensor, scale: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
        """ggml does not go on past the bytes of an all-zero sub-block: low bits and signs of those that follow move to the front, while
        ninth bits stay."""
        order = torch.argsort(~live, dim=0, stable=True)  # [8, n]; what is not live has no bits set
        low, signs = (points & 255).reshape(8, 8, -1), minus.reshape(8, 32, -1)
        low = low.gather(0, order[:, None].expand(low.shape)).reshape(points.shape)
        signs = signs.gather(0, order[:, None].expand(signs.shape)).reshape(minus.shape)
        return low | points & 256, signs

    @classmethod
    def pack(cls, codes: Tensor, params: Params) -> Tensor:
        assert params.scale is not None
        index, minus = cls.contract(codes)
        return torch.cat((half_bytes(params.d), index & 255, weave(index >> 8, 8), weave(minus, 8), weave_nibbles(params.scale)))

    @classmethod
    def unpack(cls, data: Tensor) -> tuple[Tensor, Params]:
        index = data[2:66] | unweave(data[66:74], 8) << 8
        return cls.expand(index, unweave(data[74:106], 8).bool()), Params(half_at(data, 0), unweave(data[106:110], 2, 4))


class IQ3_XXS(IQ3):
    kind = Kind(256, 98, 32, -62, 62, torch.int8, has_book=True, scale_range=(0, 15))
    book, magnitudes = CodeBook("IQ3_XXS", 8, 2), (4, 12, 20, 28, 36, 44, 52, 62)
    n_steps, fudge, even_signs, least_peak = 15, 1.0125, True, 1e-8

    @classmethod
    @override
    def steps(cls, d: Tensor, scale: Tensor) -> Tensor:
        return d * (0.5 + scale) * 0.5

    @classmethod
    def pack(cls, codes: Tensor, params: Params) -> Tensor:
        assert params.scale is not None
        index, minus = cls.contract(codes)
        return torch.cat((half_bytes(params.d), index, bytes_of(pack_signs(minus, params.scale))))

    @classmethod
    def unpack(cls, data: Tensor) -> tuple[Tensor, Params]:
        minus, scale = unpack_signs(words_of(data[66:]))
        return cls.expand(data[2:66], minus), Params(half_at(data, 0), scale)


def pack_signs(minus: Tensor, scale: Tensor) -> Tensor:
    """A word for each 32 weights: four times seven signs, and the scale in the highest four bits. [8, n] int64."""
    sevens = (weave(minus, 8) & 127).reshape(8, 4, -1).long()
    return sevens[:, 0] | sevens[:, 1] << 7 | sevens[:, 2] << 14 | sevens[:, 3] << 21 | scale.long() << 28


def unpack_signs(words: Tensor) -> tuple[Tensor, Tensor]:
    """Minus signs [256, n] and scales [8, n] of :func:`pack_signs`."""
    return even_signs(unweave((words & (1 << 28) - 1).int(), 4, 7)).bool(), (words >> 28).int()


class IQ2(GridType):
    """Eight levels of three a run (``iq2.h``)."""

    width, step = 5, 0.1
    magnitudes = (8, 25, 43)
    power_factor: float = 1.0

    @classmethod
    @override
    def weights(cls, x: Tensor, importance: Tensor | None, power: Tensor) -> Tensor:
        sigma2 = cls.power_factor * power / 256
        return 0.25 * sigma2 + x * x if importance is None else importance * square_root(sigma2 + x * x)

    @classmethod
    @override
    def steps(cls, d: Tensor, scale: Tensor) -> Tensor:
        return d * (0.5 + scale) * 0.25


class IQ2_XXS(IQ2):
    kind = Kind(256, 66, 32, -43, 43, torch.int8, has_book=True, needs_importance=True, scale_range=(0, 15))
    book = CodeBook("IQ2_XXS", 3, 2)
    n_steps, even_signs, least_peak, refines = 6, True, 1e-15, "all"

    @classmethod
    @override
    def start(cls, sub: Sub, peak: Tensor) -> tuple[Tensor, Tensor]:
        """Scales are tried around that of the weights rounded to 0 … 4."""
        _, scale = search_scales(sub.x, sub.w, 4)
        reach = scale * 3
        sub.live = sub.live & ~(reach <= 0)
        return reach, scale

    @classmethod
    def pack(cls, codes: Tensor, params: Params) -> Tensor:
        assert params.scale is not None
        index, minus = cls.contract(codes)
        words = torch.stack((words_of(index), pack_signs(minus, params.scale)), 1).reshape(16, -1)
        return torch.cat((half_bytes(params.d), bytes_of(words)))

    @classmethod
    def unpack(cls, data: Tensor) -> tuple[Tensor, Params]:
        words = words_of(data[2:]).reshape(8, 2, -1)
        minus, scale = unpack_signs(words[:, 1])
        return cls.expand(bytes_of(words[:, 0]), minus), Params(half_at(data, 0), scale)


class IQ2_XS(IQ2):
    kind = Kind(256, 74, 16, -43, 43, torch.int8, has_book=True, needs_importance=True, scale_range=(0, 15))
    book = CodeBook("IQ2_XS", 3, 2)
    n_steps, even_signs, least_peak = 9, True, 1e-15

    @classmethod
    def pack(cls, codes: Tensor, params: Params) -> Tensor:
        assert params.scale is not None
        index, minus = cls.contract(codes)
        both = index | (weave(minus, 8) & 127) << 9
        return torch.cat((half_bytes(params.d), bytes_of(both, 2), weave_nibbles(params.scale)))

    @classmethod
    def unpack(cls, data: Tensor) -> tuple[Tensor, Params]:
        both = data[2:66:2] | data[3:66:2] << 8
        return cls.expand(both & 511, even_signs(both >> 9).bool()), Params(half_at(data, 0), unweave(data[66:], 2, 4))


class IQ2_S(IQ2):
    kind = Kind(256, 82, 16, -43, 43, torch.int8, has_book=True, scale_range=(0, 15))
    book = CodeBook("IQ2_S", 3, 1)
    n_steps, fudge, least_peak, power_factor = 9, 0.9875, 1e-8, 2.0

    @classmethod
    @override
    def finish(cls, points: Tensor, minus: Tensor, scale: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
        """What was found stays where no sub-block has a scale."""
        return points, minus

    @classmethod
    def pack(cls, codes: Tensor, params: Params) -> Tensor:
        assert params.scale is not None
        index, minus = cls.contract(codes)
        high = unweave(index >> 8, 2)
        return torch.cat((half_bytes(params.d), index & 255, weave(minus, 8), weave(high, 8), weave_nibbles(params.scale)))

    @classmethod
    def unpack(cls, data: Tensor) -> tuple[Tensor, Params]:
        index = data[2:34] | unweave(data[66:74], 4, 2) << 8
        return cls.expand(index, unweave(data[34:66], 8).bool()), Params(half_at(data, 0), unweave(data[74:], 2, 4))


def weave_nibbles(numbers: Tensor) -> Tensor:
    """[2 k, n] numbers of four bits → [k, n] bytes, the first lowest."""
    return numbers[::2] & 15 | (numbers[1::2] & 15) << 4
