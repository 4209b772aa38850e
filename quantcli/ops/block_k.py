"""ggml's k-quants in torch, one class each: search, encode, pack, unpack, decode (layouts: ``kernels/blocks``)."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

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
    ray_code,
    search_line,
    search_ray,
    search_scales,
    signed_byte,
    square_root,
    to_half,
)


def in_subs(x: Tensor, size: int) -> Tensor:
    """[256, n] → [size, 256 / size, n]: the sub-blocks as lanes."""
    return x.view(-1, size, x.shape[1]).transpose(0, 1)


class AffineK:
    """Q2_K, Q4_K and Q5_K but for their packing: w = (d·scale)·q − (dmin·min)."""

    kind: Kind
    first = -0.5
    n_steps = 15
    top = 63  # the largest scale and minimum

    @classmethod
    def search(cls, x: Tensor, importance: Tensor | None, power: Tensor | None) -> Found:
        kind, two_bits = cls.kind, cls.kind.hi == 3
        subs = in_subs(x, kind.sub)
        if importance is None:
            rms = 0.0 if two_bits else square_root(ordered_sum(subs * subs) / 32)
            scale, low, inverse, origin = search_line(subs, rms + subs.abs(), kind.hi, cls.first, 0.1, cls.n_steps, mad=two_bits)
            params = cls._store_plain(scale, -low)
        else:
            block_power = (1 if two_bits else 2) * ordered_sum(x * x) / 256
            weights = in_subs(importance, kind.sub) * square_root(block_power + subs * subs)
            scale, low, inverse, origin = search_line(subs, weights, kind.hi, -0.9, 0.05, 36)
            params = cls._store_weighted(scale, -low, ordered_sum(weights))
        # What is stored is what counts: ggml ORs bytes that it does not always clip.
        params.scale, params.min = cls.unpack_scales(cls.pack_scales(params))
        return Found(params, inverse, origin)

    @classmethod
    def _store_plain(cls, scale: Tensor, minimum: Tensor) -> Params:
        clip = 255 if cls.kind.hi == 3 else cls.top  # ggml does not clip Q2_K's

        def codes(values: Tensor) -> tuple[Tensor, Tensor]:
            peak = torch.where(values.amax(0) > 0, values.amax(0), 0.0)  # and never −0
            inverse = torch.where(peak > 0, ratio(cls.top, peak), 0.0)
            return to_half(ratio(peak, cls.top)), (nearest_int(inverse * values) & 255).clamp(max=clip)

        (d, scales), (dmin, minima) = codes(scale), codes(minimum)
        return Params(d, scales, dmin, minima)

    @classmethod
    def _store_weighted(cls, scale: Tensor, minimum: Tensor, weight: Tensor) -> Params:
        (scales, d), (minima, dmin) = search_scales(scale, weight, cls.top), search_scales(minimum, weight, cls.top)
        clip = cls.top if cls.kind.hi == 31 else 255  # ggml clips here for Q5_K alone
        return Params(to_half(d), scales.clamp(max=clip), to_half(dmin), minima.clamp(max=clip))

    @staticmethod
    def pack_scales(params: Params) -> Tensor:
        """[12, n] bytes of eight six-bit scales and minima."""
        assert params.scale is not None
        assert params.min is not None
        scale, low = params.scale, params.min
        split = scale[4:] & 15 | (low[4:] & 15) << 4
        return torch.cat((scale[:4] | scale[4:] >> 4 << 6, low[:4] | low[4:] >> 4 << 6, split)) & 255

    @staticmethod
    def unpack_scales(data: Tensor) -> tuple[Tensor, Tensor]:
        low, high, split = data[:4], data[4:8], data[8:12]
        return torch.cat((low & 63, split & 15 | low >> 6 << 4)), torch.cat((high & 63, split >> 4 | high >> 6 << 4))

    @classmethod
    def pack_params(cls, params: Params) -> Tensor:
        """[16, n] bytes: d, dmin, and 12 of scales and minima."""
        return torch.cat((*cls._halves(params), cls.pack_scales(params)))

    @classmethod
    def unpack_params(cls, data: Tensor) -> Params:
        scale, minimum = cls.unpack_scales(data[4:16])
        return Params(half_at(data, 0), scale, half_at(data, 2), minimum)

    @staticmethod
    def _halves(params: Params) -> tuple[Tensor, Tensor]:
        assert params.dmin is not None
        return half_bytes(params.d), half_bytes(params.dmin)

    @classmethod
    def encode(cls, x: Tensor, found: Found) -> Tensor:
        size = cls.kind.sub
        scale, minimum = (part.repeat_interleave(size, 0) for part in cls._effective(found.params))
        codes = nearest_int((x + minimum) / scale)
        inverse, origin = found.inverse.repeat_interleave(size, 0), found.origin.repeat_interleave(size, 0)
        return torch.where(scale == 0, nearest_int(inverse * (x - origin)), codes).clamp(0, cls.kind.hi)

    @staticmethod
    def _effective(params: Params) -> tuple[Tensor, Tensor]:
        assert params.scale is not None
        assert params.min is not None
        assert params.dmin is not None
        return from_half(params.d) * params.scale.float(), from_half(params.dmin) * params.min.float()

    @classmethod
    def decode(cls, codes: Tensor, params: Params) -> Tensor:
        scale, minimum = (part.repeat_interleave(cls.kind.sub, 0) for part in cls._effective(params))
        return scale * codes.float() - minimum


class Q4_K(AffineK):
    kind = Kind(256, 144, 32, 0, 15, torch.uint8, has_min=True, scale_range=(0, 63))
    first, n_steps = -1.0, 20

    @classmethod
    def pack(cls, codes: Tensor, params: Params) -> Tensor:
        pairs = codes.view(4, 2, 32, -1)
        return torch.cat((cls.pack_params(params), (pairs[:, 0] | pairs[:, 1] << 4).view(128, -1)))

    @classmethod
    def unpack(cls, data: Tensor) -> tuple[Tensor, Params]:
        low = data[16:].reshape(4, 32, -1)
        return torch.stack((low & 15, low >> 4), 1).view(256, -1), cls.unpack_params(data)


class Q5_K(AffineK):
    kind = Kind(256, 176, 32, 0, 31, torch.uint8, has_min=True, scale_range=(0, 63))

    @classmethod
    def pack(cls, codes: Tensor, params: Params) -> Tensor:
        bit = torch.arange(8, dtype=torch.int32, device=codes.device)[:, None, None]
        fifth = ((codes.view(8, 32, -1) >> 4) << bit).sum(0, dtype=torch.int32)
        pairs = codes.view(4, 2, 32, -1) & 15
        return torch.cat((cls.pack_params(params), fifth, (pairs[:, 0] | pairs[:, 1] << 4).view(128, -1)))

    @classmethod
    def unpack(cls, data: Tensor) -> tuple[Tensor, Params]:
        bit = torch.arange(8, dtype=torch.int32, device=data.device)[:, None, None]
        low = data[48:].reshape(4, 32, -1)
        codes = torch.stack((low & 15, low >> 4), 1).view(8, 32, -1) | (data[16:48] >> bit & 1) << 4
        return codes.view(256, -1), cls.unpack_params(data)


def pack_pairs(codes: Tensor) -> Tensor:
    """Two bits of each code [256, n] as 64 bytes, those of codes 32 apart in one (``kernels/blocks/pairs.h``)."""
    quarters = codes.view(2, 4, 32, -1) & 3
    return (quarters[:, 0] | quarters[:, 1] << 2 | quarters[:, 2] << 4 | quarters[:, 3] << 6).reshape(64, -1)


def unpack_pairs(data: Tensor) -> Tensor:
    shift = torch.tensor([0, 2, 4, 6], dtype=torch.int32, device=data.device)[:, None, None]
    return (data.reshape(2, 1, 32, -1) >> shift & 3).view(256, -1)


class Q2_K(AffineK):
    kind = Kind(256, 84, 16, 0, 3, torch.uint8, has_min=True, d_at=80, scale_range=(0, 15))
    top = 15

    @staticmethod
    @override
    def pack_scales(params: Params) -> Tensor:
        assert params.scale is not None
        assert params.min is not None
        return (params.scale | params.min << 4) & 255

    @staticmethod
    @override
    def unpack_scales(data: Tensor) -> tuple[Tensor, Tensor]:
        return data & 15, data >> 4

    @classmethod
    def pack(cls, codes: Tensor, params: Params) -> Tensor:
        return torch.cat((cls.pack_scales(params), pack_pairs(codes), *cls._halves(params)))

    @classmethod
    def unpack(cls, data: Tensor) -> tuple[Tensor, Params]:
        scale, minimum = cls.unpack_scales(data[:16])
        return unpack_pairs(data[16:80]), Params(half_at(data, 80), scale, half_at(data, 82), minimum)


class SignedK:
    """Q3_K and Q6_K but for their search and packing: sub-blocks of 16, w = (d·scale)·q."""

    @staticmethod
    def effective(params: Params) -> Tensor:
        """d·scale of every weight [256, n]."""
        assert params.scale is not None
        return (from_half(params.d) * params.scale.float()).repeat_interleave(16, 0)

    @classmethod
    def decode(cls, codes: Tensor, params: Params) -> Tensor:
        return cls.effective(params) * codes.float()


class Q3_K(SignedK):
    kind = Kind(256, 110, 16, -4, 3, torch.int8, d_at=108, scale_range=(-32, 31))

    @classmethod
    def search(cls, x: Tensor, importance: Tensor | None, power: Tensor | None) -> Found:
        subs = in_subs(x, 16)
        if importance is None:
            scale, _ = descend(subs, 4)
            params = cls._store_plain(scale)
            return Found(params)
        block_power = 2 * ordered_sum(x * x) / 256
        weights = in_subs(importance, 16) * square_root(block_power + subs * subs)
        scale, inverse = search_ray(subs, weights, 4)
        d, to_code = search_ray(scale, ordered_sum(weights), 32)
        codes = ray_code(to_code, scale, 32, peak_of(scale).abs() < TINY)
        return Found(Params(to_half(d), codes), inverse, is_weighted=True)

    @staticmethod
    def _store_plain(scale: Tensor) -> Params:
        peak = peak_of(scale)
        zero = peak == 0  # ggml then stores the lowest scales
        inverse = ratio(-32, torch.where(zero, 1.0, peak))
        codes = signed_byte(nearest_int(inverse * scale)).clamp(-32, 31)
        return Params(torch.where(zero, 0, to_half(ratio(1, inverse))), torch.where(zero, -32, codes))

    @classmethod
    def encode(cls, x: Tensor, found: Found) -> Tensor:
        scale = cls.effective(found.params)
        if found.is_weighted:
            searched = ray_code(found.inverse.repeat_interleave(16, 0), x, 4)
        else:
            searched = descend(in_subs(x, 16), 4)[1].transpose(0, 1).reshape(x.shape)
        return torch.where(scale == 0, searched, nearest_int(x / scale).clamp(-4, 3))

    @staticmethod
    def pack(codes: Tensor, params: Params) -> Tensor:
        assert params.scale is not None
        raw, scale = codes + 4, params.scale + 32
        bit = torch.arange(8, dtype=torch.int32, device=codes.device)[:, None, None]
        third = (raw.view(8, 32, -1) >> 2 << bit).sum(0, dtype=torch.int32)
        low = scale[:8] & 15 | (scale[8:] & 15) << 4
        high = (scale.view(4, 4, -1) >> 4 << 2 * bit[:4]).sum(0, dtype=torch.int32)
        return torch.cat((third, pack_pairs(raw), low, high, half_bytes(params.d)))

    @staticmethod
    def unpack(data: Tensor) -> tuple[Tensor, Params]:
        bit = torch.arange(8, dtype=torch.int32, device=data.device)[:, None, None]
        third = (data[:32] >> bit & 1).view(256, -1)
        low, high = data[96:104], (data[104:108] >> 2 * bit[:4] & 3).view(16, -1)
        scale = (torch.cat((low & 15, low >> 4)) | high << 4) - 32
        return (unpack_pairs(data[32:96]) | third << 2) - 4, Params(half_at(data, 108), scale)


def descend(x: Tensor, n_max: int) -> tuple[Tensor, Tensor]:
    """make_q3_quants: scale […] of least Σ x²·(scale·q − x)² by coordinate descent, and codes q = −n_max … n_max − 1 of ``x`` [k, …]."""
    peak = peak_of(x)
    tiny = peak.abs() < TINY
    codes = list(nearest_int(ratio(-n_max, torch.where(tiny, 1.0, peak)) * x).clamp(-n_max, n_max - 1).float())
    w = x * x
    wx = w * x
    sum_lx, sum_l2 = ordered_sum(wx * torch.stack(codes)), ordered_sum(w * torch.stack(codes) * torch.stack(codes))
    for i in [*range(len(codes))] * 5:
        lx, l2 = sum_lx - wx[i] * codes[i], sum_l2 - w[i] * codes[i] * codes[i]
        moved = nearest_int(x[i] * l2 / lx).clamp(-n_max, n_max - 1).float()
        possible = (lx > 0) & (moved != codes[i])
        lx, l2 = lx + wx[i] * moved, l2 + w[i] * moved * moved
        better = possible & (l2 > 0) & (lx * lx * sum_l2 > sum_lx * sum_lx * l2)
        codes[i] = torch.where(better, moved, codes[i])
        sum_lx, sum_l2 = torch.where(better, lx, sum_lx), torch.where(better, l2, sum_l2)
    scale = torch.where(sum_l2 > 0, sum_lx / sum_l2, 0.0)
    return torch.where(tiny, 0.0, scale), torch.where(tiny, -n_max, torch.stack(codes).int())


class Q6_K(SignedK):
    kind = Kind(256, 210, 16, -32, 31, torch.int8, d_at=208, scale_range=(-128, 127))

    @staticmethod
    def search(x: Tensor, importance: Tensor | None, power: Tensor | None) -> Found:
        subs = in_subs(x, 16)
        scale, inverse = search_ray(subs, subs * subs if importance is None else in_subs(importance, 16), 32)
        # ggml writes a block of zeros where every scale is tiny: no scale, and the codes of an all-zero sub-block.
        peak = peak_of(scale)
        tiny = peak.abs() < TINY
        to_code = ratio(-128, torch.where(tiny, 1.0, peak))
        scales = torch.where(tiny, 0, signed_byte(nearest_int(to_code * scale).clamp(max=127)))
        params = Params(torch.where(tiny, 0, to_half(ratio(1, to_code))), scales)
        return Found(params, torch.where(tiny, 0.0, inverse))

    @classmethod
    def encode(cls, x: Tensor, found: Found) -> Tensor:
        scale = cls.effective(found.params)
        searched = ray_code(found.inverse.repeat_interleave(16, 0), x, 32)
        return torch.where(scale == 0, searched, nearest_int(x / scale).clamp(-32, 31))

    @staticmethod
    def pack(codes: Tensor, params: Params) -> Tensor:
        assert params.scale is not None
        raw = (codes + 32).view(2, 4, 32, -1)
        low = (raw[:, :2] & 15 | (raw[:, 2:] & 15) << 4).reshape(128, -1)
        high = (raw[:, 0] >> 4 | raw[:, 1] >> 4 << 2 | raw[:, 2] >> 4 << 4 | raw[:, 3] >> 4 << 6).reshape(64, -1)
        return torch.cat((low, high, params.scale & 255, half_bytes(params.d)))

    @staticmethod
    def unpack(data: Tensor) -> tuple[Tensor, Params]:
        low, high = data[:128].reshape(2, 2, 32, -1), data[128:192].reshape(2, 1, 32, -1)
        shift = torch.tensor([0, 2, 4, 6], dtype=torch.int32, device=data.device)[:, None, None]
        raw = torch.cat((low & 15, low >> 4), 1) | (high >> shift & 3) << 4
        return raw.view(256, -1) - 32, Params(half_at(data, 208), signed_byte(data[192:208]))
