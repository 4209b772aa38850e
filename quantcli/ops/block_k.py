"""ggml's block types of 256 weights in torch, one class each: search, encode, pack, unpack, decode (layouts: ``kernels/blocks``)."""

from __future__ import annotations

import torch
from torch import Tensor

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


class AffineK:
    """Q4_K and Q5_K but for their packing: 8 sub-blocks of 32, w = (d·scale)·q − (dmin·min)."""

    kind: Kind
    first: float
    n_steps: int

    @classmethod
    def search(cls, x: Tensor, importance: Tensor | None, power: Tensor | None) -> Found:
        subs = x.view(8, 32, -1)
        if importance is None:
            rms = [square_root(ordered_sum(sub * sub) / 32) for sub in subs]
            lines = [search_line(sub, r + sub.abs(), cls.kind.hi, cls.first, 0.1, cls.n_steps) for sub, r in zip(subs, rms, strict=True)]
            scale, low, inverse, origin = (torch.stack(part) for part in zip(*lines, strict=True))
            params = cls._store_plain(scale, -low)
        else:
            block_power = 2 * ordered_sum(x * x) / 256
            weights = importance.view(subs.shape) * square_root(block_power + subs * subs)
            lines = [search_line(sub, w, cls.kind.hi, -0.9, 0.05, 36) for sub, w in zip(subs, weights, strict=True)]
            scale, low, inverse, origin = (torch.stack(part) for part in zip(*lines, strict=True))
            params = cls._store_weighted(scale, -low, torch.stack([ordered_sum(w) for w in weights]))
        # What is stored is what counts: ggml ORs bytes that it does not always clip.
        return Found(cls.unpack_params(cls.pack_params(params)), inverse, origin)

    @staticmethod
    def _store_plain(scale: Tensor, minimum: Tensor) -> Params:
        def codes(values: Tensor) -> tuple[Tensor, Tensor]:
            peak = torch.where(values.amax(0) > 0, values.amax(0), 0.0)  # and never −0
            inverse = torch.where(peak > 0, ratio(63, peak), 0.0)
            return to_half(ratio(peak, 63)), (nearest_int(inverse * values) & 255).clamp(max=63)

        (d, scales), (dmin, minima) = codes(scale), codes(minimum)
        return Params(d, scales, dmin, minima)

    @classmethod
    def _store_weighted(cls, scale: Tensor, minimum: Tensor, weight: Tensor) -> Params:
        (scales, d), (minima, dmin) = search_scales(scale, weight, 63), search_scales(minimum, weight, 63)
        top = 63 if cls.kind.hi == 31 else 255  # ggml clips here for Q5_K alone
        return Params(to_half(d), scales.clamp(max=top), to_half(dmin), minima.clamp(max=top))

    @staticmethod
    def pack_params(params: Params) -> Tensor:
        """[16, n] bytes: d, dmin, and 12 of scales and minima."""
        assert params.scale is not None
        assert params.min is not None
        assert params.dmin is not None
        scale, low = params.scale, params.min
        split = scale[4:] & 15 | (low[4:] & 15) << 4
        scales = torch.cat((scale[:4] | scale[4:] >> 4 << 6, low[:4] | low[4:] >> 4 << 6, split)) & 255
        return torch.cat((half_bytes(params.d), half_bytes(params.dmin), scales))

    @staticmethod
    def unpack_params(data: Tensor) -> Params:
        low, high, split = data[4:8], data[8:12], data[12:16]
        scale = torch.cat((low & 63, split & 15 | low >> 6 << 4))
        minimum = torch.cat((high & 63, split >> 4 | high >> 6 << 4))
        return Params(half_at(data, 0), scale, half_at(data, 2), minimum)

    @classmethod
    def encode(cls, x: Tensor, found: Found) -> Tensor:
        scale, minimum = (part.repeat_interleave(32, 0) for part in cls._effective(found.params))
        codes = nearest_int((x + minimum) / scale)
        inverse, origin = found.inverse.repeat_interleave(32, 0), found.origin.repeat_interleave(32, 0)
        return torch.where(scale == 0, nearest_int(inverse * (x - origin)), codes).clamp(0, cls.kind.hi)

    @staticmethod
    def _effective(params: Params) -> tuple[Tensor, Tensor]:
        assert params.scale is not None
        assert params.min is not None
        assert params.dmin is not None
        return from_half(params.d) * params.scale.float(), from_half(params.dmin) * params.min.float()

    @classmethod
    def decode(cls, codes: Tensor, params: Params) -> Tensor:
        scale, minimum = (part.repeat_interleave(32, 0) for part in cls._effective(params))
        return scale * codes.float() - minimum


class Q4_K(AffineK):
    kind = Kind(256, 144, 32, 0, 15, torch.uint8, has_min=True)
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
    kind = Kind(256, 176, 32, 0, 31, torch.uint8, has_min=True)
    first, n_steps = -0.5, 15

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


class Q6_K:
    kind = Kind(256, 210, 16, -32, 31, torch.int8, d_at=208)

    @staticmethod
    def search(x: Tensor, importance: Tensor | None, power: Tensor | None) -> Found:
        subs = x.view(16, 16, -1)
        weights = subs * subs if importance is None else importance.view(subs.shape)
        rays = [search_ray(sub, w, 32) for sub, w in zip(subs, weights, strict=True)]
        scale, inverse = (torch.stack(part) for part in zip(*rays, strict=True))
        # ggml writes a block of zeros where every scale is tiny: no scale, and the codes of an all-zero sub-block.
        peak = peak_of(scale)
        tiny = peak.abs() < TINY
        to_code = ratio(-128, torch.where(tiny, 1.0, peak))
        scales = torch.where(tiny, 0, signed_byte(nearest_int(to_code * scale).clamp(max=127)))
        params = Params(torch.where(tiny, 0, to_half(ratio(1, to_code))), scales)
        return Found(params, torch.where(tiny, 0.0, inverse), torch.zeros_like(inverse))

    @staticmethod
    def _effective(params: Params) -> Tensor:
        assert params.scale is not None
        return (from_half(params.d) * params.scale.float()).repeat_interleave(16, 0)

    @classmethod
    def encode(cls, x: Tensor, found: Found) -> Tensor:
        scale = cls._effective(found.params)
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

    @classmethod
    def decode(cls, codes: Tensor, params: Params) -> Tensor:
        return cls._effective(params) * codes.float()
