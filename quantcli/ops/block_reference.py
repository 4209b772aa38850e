"""The block ops in torch, the truth that the compiled kernels are held against: matrices to lanes, a codec, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from quantcli.ops.block_codecs import CODECS, KINDS
from quantcli.ops.block_search import Found, Kind, Params


def _lanes(values: Tensor, size: int) -> Tensor:
    """[rows, k·size] → [size, rows·k], contiguous."""
    return values.reshape(-1, size).T.contiguous()


def _rows(lanes: Tensor, n_rows: int, dtype: torch.dtype) -> Tensor:
    """The inverse of :func:`_lanes`, as ``dtype``."""
    return lanes.T.reshape(n_rows, -1).to(dtype).contiguous()


def _row_power(W: Tensor) -> Tensor:
    """Mean square of each row [out], summed along it in float32 as ggml does."""
    total = torch.zeros_like(W[:, 0])
    for column in W.T:
        total = total + column * column
    return total / W.shape[1]


def _search(W: Tensor, kind: str, importance: Tensor | None) -> tuple[Tensor, Found]:
    sizes = KINDS[kind]
    x = _lanes(W.float(), sizes.block)
    if importance is None or not sizes.is_weighted:
        return x, CODECS[kind].search(x, None, None)
    weights = _lanes(importance.expand(W.shape), sizes.block)
    power = _row_power(W.float()).repeat_interleave(W.shape[1] // sizes.block) if sizes.row_power else None
    return x, CODECS[kind].search(x, weights, power)


def _to_parts(params: Params, kind: Kind, n_rows: int) -> dict[str, Tensor]:
    def half(bits: Tensor) -> Tensor:
        return bits.to(torch.int16).view(torch.float16).view(n_rows, -1)

    parts = {} if kind.d_at is None else {"d": half(params.d)}
    if params.scale is not None:
        assert kind.scale is not None
        parts["scale"] = _rows(params.scale, n_rows, kind.scale)
    if params.min is not None and params.dmin is not None:
        parts |= {"dmin": half(params.dmin), "min": _rows(params.min, n_rows, torch.uint8)}
    if params.m is not None:
        parts["m"] = half(params.m)
    return parts


def _from_parts(parts: dict[str, Tensor], kind: Kind) -> Params:
    def half(part: Tensor) -> Tensor:
        return part.contiguous().view(torch.int16).int().flatten() & 0xFFFF

    def subs(part: Tensor) -> Tensor:
        return _lanes(part.int(), kind.block // kind.sub)

    params = Params(half(parts["d"]) if "d" in parts else torch.zeros(0, dtype=torch.int32))
    if "scale" in parts:
        params.scale = subs(parts["scale"])
    if "min" in parts:
        params.dmin, params.min = half(parts["dmin"]), subs(parts["min"])
    if "m" in parts:
        params.m = half(parts["m"])
    return params


def quantize(W: Tensor, kind: str, importance: Tensor | None) -> Tensor:
    x, found = _search(W, kind, importance)
    codes = CODECS[kind].encode(x, found)
    return _rows(CODECS[kind].pack(codes, found.params), W.shape[0], torch.uint8)


def fit(W: Tensor, kind: str, importance: Tensor | None) -> dict[str, Tensor]:
    return _to_parts(_search(W, kind, importance)[1].params, KINDS[kind], W.shape[0])


def pack(codes: Tensor, parts: dict[str, Tensor], kind: str) -> Tensor:
    packed = CODECS[kind].pack(_lanes(codes.int(), KINDS[kind].block), _from_parts(parts, KINDS[kind]))
    return _rows(packed, codes.shape[0], torch.uint8)


def unpack(blocks: Tensor, kind: str, in_features: int) -> tuple[Tensor, dict[str, Tensor]]:
    codes, params = _unpack(blocks, kind, in_features)
    return _rows(codes, blocks.shape[0], torch.int8), _to_parts(params, KINDS[kind], blocks.shape[0])


def dequantize(blocks: Tensor, kind: str, in_features: int) -> Tensor:
    codes, params = _unpack(blocks, kind, in_features)
    return _rows(CODECS[kind].decode(codes, params), blocks.shape[0], torch.float32)


def _unpack(blocks: Tensor, kind: str, in_features: int) -> tuple[Tensor, Params]:
    n_bytes = blocks.shape[1] // (in_features // KINDS[kind].block)
    return CODECS[kind].unpack(_lanes(blocks.int(), n_bytes))
