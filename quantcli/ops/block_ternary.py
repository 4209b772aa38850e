"""TQ1_0 and TQ2_0 in torch: 256 ternary weights, w = d·q (layouts: ``kernels/blocks/tq.h``)."""

from __future__ import annotations

import torch
from torch import Tensor

from quantcli.ops.block_k import pack_pairs, unpack_pairs
from quantcli.ops.block_legacy import inverse_of
from quantcli.ops.block_search import Found, Kind, Params, from_half, half_at, half_bytes, round_half_away, signed_byte, to_half

SPANS = ((0, 32, 5), (160, 16, 5), (240, 4, 4))
"""TQ1_0's bytes: the first weight of a span, its bytes, and the trits in each, which are as many weights apart as there are bytes."""


class Ternary:
    @staticmethod
    def search(x: Tensor, importance: Tensor | None, power: Tensor | None) -> Found:
        peak = x.abs().amax(0)
        return Found(Params(to_half(peak)), inverse_of(peak)[None])

    @staticmethod
    def encode(x: Tensor, found: Found) -> Tensor:
        return signed_byte(round_half_away(x * found.inverse))  # ggml keeps the low bits: an infinite 1/d gives 0

    @staticmethod
    def decode(codes: Tensor, params: Params) -> Tensor:
        return codes.float() * from_half(params.d)


class TQ1_0(Ternary):
    kind = Kind(256, 54, 256, -1, 1, d_at=52, is_weighted=False)

    @staticmethod
    def pack(codes: Tensor, params: Params) -> Tensor:
        spans = []
        for first, n_bytes, n_trits in SPANS:
            trits = (codes[first : first + n_bytes * n_trits] + 1).view(n_trits, n_bytes, -1)
            number = torch.zeros_like(trits[0])
            for k in range(5):
                number = number * 3 + (trits[k] if k < n_trits else 0)
            spans.append((number * 256 + 242) // 243)
        return torch.cat((*spans, half_bytes(params.d)))

    @staticmethod
    def unpack(data: Tensor) -> tuple[Tensor, Params]:
        codes, at = [], 0
        for _, n_bytes, n_trits in SPANS:
            fraction = data[at : at + n_bytes]
            at += n_bytes
            for _ in range(n_trits):
                codes.append((fraction * 3 >> 8) - 1)
                fraction = fraction * 3 & 255
        return torch.cat(codes), Params(half_at(data, 52))


class TQ2_0(Ternary):
    kind = Kind(256, 66, 256, -1, 1, d_at=64, is_weighted=False)

    @staticmethod
    def pack(codes: Tensor, params: Params) -> Tensor:
        return torch.cat((pack_pairs(codes + 1), half_bytes(params.d)))

    @staticmethod
    def unpack(data: Tensor) -> tuple[Tensor, Params]:
        return unpack_pairs(data[:64]) - 1, Params(half_at(data, 64))
