"""IQ4_NL and IQ4_XS in torch: 4-bit codes of sixteen fixed levels (layouts: ``kernels/blocks/iq4.h``)."""

from __future__ import annotations

import torch
from torch import Tensor

from quantcli.ops.block_legacy import inverse_of, pack_nibbles, unpack_nibbles
from quantcli.ops.block_search import (
    TINY,
    Found,
    Kind,
    Params,
    from_half,
    half_at,
    half_bytes,
    nearest_int,
    ordered_sum,
    peak_of,
    ratio,
    square_root,
    to_half,
)

LEVELS = (-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0)
"""ggml's kvalues_iq4nl: finer around zero, and not symmetric."""


def level_index(v: Tensor) -> Tensor:
    """The index of the level nearest to ``v``, the upper of two equally near; NaN gives the last, as ggml's bisection does."""
    levels = torch.tensor(LEVELS, device=v.device)
    return torch.bucketize(v.contiguous(), (levels[1:] + levels[:-1]) / 2, right=True, out_int32=True)


def level_at(index: Tensor) -> Tensor:
    return torch.tensor(LEVELS, device=index.device)[index.long()]


def search_levels(x: Tensor, w: Tensor) -> Tensor:
    """The scale […] of least Σ w·(scale·level − x)² for ``x``: [32, …]: the best of 16 spacings that put the extreme weight near the first
    level, 0 where the weights count as all zero."""

    def sums(inverse: Tensor) -> tuple[Tensor, Tensor]:
        level = level_at(level_index(inverse * x))
        return ordered_sum(w * level * x), ordered_sum(w * level * level)

    peak = peak_of(x)
    tiny = peak.abs() < TINY
    peak = torch.where(tiny, 1.0, peak)
    sum_lx, sum_l2 = sums(ratio(1, ratio(-peak, LEVELS[0])))
    scale = torch.where(sum_l2 > 0, sum_lx / sum_l2, 0.0)
    best_score = scale * sum_lx
    for trial in range(-7, 8):
        sum_lx, sum_l2 = sums(ratio(trial + LEVELS[0], peak))
        better = (sum_l2 > 0) & (sum_lx * sum_lx > best_score * sum_l2)
        scale = torch.where(better, sum_lx / sum_l2, scale)
        best_score = torch.where(better, scale * sum_lx, best_score)
    return torch.where(tiny, 0.0, scale)


def level_weights(x: Tensor, importance: Tensor | None) -> Tensor:
    """What weighs the error of each of a block's ``x`` [k, n]."""
    if importance is None:
        return x * x
    return importance * square_root(ordered_sum(x * x) * (2 / len(x)) + x * x)


class IQ4_NL:
    kind = Kind(32, 18, 32, 0, 15, levels=LEVELS)

    @staticmethod
    def search(x: Tensor, importance: Tensor | None, power: Tensor | None) -> Found:
        scale = search_levels(x, level_weights(x, importance))
        return Found(Params(to_half(scale)), inverse_of(scale)[None])

    @staticmethod
    def encode(x: Tensor, found: Found) -> Tensor:
        return level_index(found.inverse * x)

    @staticmethod
    def pack(codes: Tensor, params: Params) -> Tensor:
        return torch.cat((half_bytes(params.d), pack_nibbles(codes, 4)))

    @staticmethod
    def unpack(data: Tensor) -> tuple[Tensor, Params]:
        return unpack_nibbles(data[2:], 4), Params(half_at(data, 0))

    @staticmethod
    def decode(codes: Tensor, params: Params) -> Tensor:
        return from_half(params.d) * level_at(codes)


class IQ4_XS:
    kind = Kind(256, 136, 32, 0, 15, torch.int8, levels=LEVELS, scale_range=(-32, 31))

    @staticmethod
    def search(x: Tensor, importance: Tensor | None, power: Tensor | None) -> Found:
        subs, weights = (part.view(8, 32, -1).transpose(0, 1) for part in (x, level_weights(x, importance)))
        scale = search_levels(subs, weights)
        d = -peak_of(scale) / 32
        codes = nearest_int(inverse_of(d) * scale).clamp(-32, 31)
        return Found(Params(to_half(d), codes), inverse_of(d * codes.float()))

    @staticmethod
    def encode(x: Tensor, found: Found) -> Tensor:
        return level_index(found.inverse.repeat_interleave(32, 0) * x)

    @staticmethod
    def pack(codes: Tensor, params: Params) -> Tensor:
        assert params.scale is not None
        raw = params.scale + 32
        shift = 2 * torch.arange(8, dtype=torch.int32, device=codes.device)[:, None]
        high = (raw >> 4 << shift).sum(0, dtype=torch.int32)
        low = raw[::2] & 15 | (raw[1::2] & 15) << 4
        nibbles = [pack_nibbles(sub, 4) for sub in codes.view(8, 32, -1)]
        return torch.cat((half_bytes(params.d), half_bytes(high), low, *nibbles))

    @staticmethod
    def unpack(data: Tensor) -> tuple[Tensor, Params]:
        shift = 2 * torch.arange(8, dtype=torch.int32, device=data.device)[:, None]
        high = half_at(data, 2) >> shift & 3
        low = torch.stack((data[4:8] & 15, data[4:8] >> 4), 1).view(8, -1)
        codes = torch.cat([unpack_nibbles(sub, 4) for sub in data[8:].reshape(8, 16, -1)])
        return codes, Params(half_at(data, 0), (low | high << 4) - 32)

    @staticmethod
    def decode(codes: Tensor, params: Params) -> Tensor:
        assert params.scale is not None
        return (from_half(params.d) * params.scale.float()).repeat_interleave(32, 0) * level_at(codes)
