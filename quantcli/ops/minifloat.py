"""Small floats: rounding to E4M3, E5M2 and E2M1 by a scale for each tile, and the scale bytes of MXFP4's and NVFP4's groups.

A weight is divided by the scale of its tile in float32, clamped to the largest finite number and rounded to nearest, ties to even::

    E4M3  s eeee mmm   ±448,    steps of 2⁻⁹ below 2⁻⁶       E2M1  s ee m   0 0.5 1 1.5 2 3 4 6, two to a byte, the even input low
    E5M2  s eeeee mm   ±57344,  steps of 2⁻¹⁶ below 2⁻¹⁴     E8M0  eeeeeeee  2^(byte − 127), 255 is NaN

So it is never NaN or infinite. A negative weight that rounds to zero keeps its sign bit. These are the bytes of compressed-tensors
(which NVIDIA's conversion instructions make too) for the same scales and float32 weights. A tile is ``(rows, inputs)``: the whole matrix, a
row, 128 × 128, a group of 32; those on the right and lower edge may be cut.

MXFP4 and NVFP4 store a byte b for each group: a weight's step is 2^(b − 127), or E4M3(b) / global_scale. The byte that absmax gives
(b₀: compressed-tensors') is not the best: the search tries those from b₀ + :data:`CANDIDATES` and takes the one of the least
Σ importance·(w − ŵ)², the first of equals; b₀ is tried first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantcli.errors import KernelError
from quantcli.ops.dispatch import kernel, stream

Tile = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Float8:
    """``name``: safetensors' name of the dtype; ``largest``: the largest finite number."""

    name: str
    dtype: torch.dtype
    largest: float


FLOAT8 = {
    "e4m3": Float8("F8_E4M3", torch.float8_e4m3fn, 448.0),
    "e5m2": Float8("F8_E5M2", torch.float8_e5m2, 57344.0),
}

FP4_LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FP4_LARGEST = 6.0

CANDIDATES = {"mxfp4": (-1, 0), "nvfp4": (-3, 6)}
"""First and last offset from absmax's byte that the search tries."""

LARGEST_BYTE = {"mxfp4": 252, "nvfp4": 126}
ZERO_GROUP_BYTE = 0x20
"""NVFP4's scale of a group whose own rounds to zero: 0.125, as compressed-tensors has it."""


def tile_absmax(W: Tensor, tile: Tile) -> Tensor:
    """The largest |w| of each tile of ``W``: [out, in] float32, bfloat16 or float16, NaN where the tile has one. Returns float32 [tiles
    down, tiles across]."""
    W = _weights(W)
    kernels = kernel(W)
    down, across = tiles_of(W.shape, tile)
    if kernels is None:
        runs = run_absmax_reference(W, tile[1])
    else:
        runs = torch.empty(W.shape[0], across, device=W.device)
        kernels.run_absmax(W, tile[1], runs, stream=stream(W))
    return torch.nn.functional.pad(runs, (0, 0, 0, down * tile[0] - W.shape[0])).view(down, tile[0], across).amax(1)


def quantize_fp8(W: Tensor, scale: Tensor, tile: Tile, dtype: str = "e4m3") -> Tensor:
    """``W``: [out, in] float32, bfloat16 or float16, over ``scale``: [tiles down, tiles across] float32 above zero, as ``dtype`` "e4m3" or
    "e5m2": [out, in]."""
    W, scale = _weights(W), _scales("quantize_fp8", W.shape, scale, tile)
    kernels = kernel(W)
    if kernels is None:
        return quantize_fp8_reference(W, scale, tile, dtype)
    data = torch.empty(W.shape, dtype=torch.uint8, device=W.device)
    kernels.quantize_fp8(dtype, W, scale, *tile, data, stream=stream(W))
    return data.view(FLOAT8[dtype].dtype)


def dequantize_fp8(data: Tensor, scale: Tensor, tile: Tile) -> Tensor:
    """``data``: [out, in] float8_e4m3fn or float8_e5m2 times ``scale``: [tiles down, tiles across] float32. Returns [out, in] float32."""
    scale = _scales("dequantize_fp8", data.shape, scale, tile)
    data = data.detach().contiguous()
    kernels = kernel(data)
    if kernels is None:
        return data.float() * spread(scale, data.shape, tile)
    W = torch.empty(data.shape, dtype=torch.float32, device=data.device)
    name = "e4m3" if data.dtype == torch.float8_e4m3fn else "e5m2"
    kernels.dequantize_fp8(name, data.view(torch.uint8), scale, *tile, W, stream=stream(W))
    return W


def quantize_fp4(W: Tensor, step: Tensor) -> Tensor:
    """``W``: [out, in] float32, bfloat16 or float16, over ``step``: [out, n_groups] float32 above zero, as pairs of E2M1: uint8
    [out, in / 2]."""
    W, step = _weights(W), _steps("quantize_fp4", W.shape, step)
    kernels = kernel(W)
    if kernels is None:
        return quantize_fp4_reference(W, step)
    packed = torch.empty(W.shape[0], W.shape[1] // 2, dtype=torch.uint8, device=W.device)
    kernels.quantize_fp4(W, step, packed, stream=stream(W))
    return packed


def dequantize_fp4(packed: Tensor, step: Tensor) -> Tensor:
    """``packed``: [out, in / 2] uint8 times ``step``: [out, n_groups] float32. Returns [out, in] float32."""
    step = _steps("dequantize_fp4", (packed.shape[0], packed.shape[1] * 2), step)
    packed = packed.detach().contiguous()
    kernels = kernel(packed)
    if kernels is None:
        return dequantize_fp4_reference(packed, step)
    W = torch.empty(packed.shape[0], packed.shape[1] * 2, dtype=torch.float32, device=packed.device)
    kernels.dequantize_fp4(packed, step, W, stream=stream(W))
    return W


def fit_fp4(W: Tensor, start: Tensor, kind: str, global_scale: float = 1.0, importance: Tensor | None = None) -> Tensor:
    """The best scale byte of each group near ``start``: [out, n_groups] uint8, absmax's. ``W``: [out, in] float32, bfloat16 or float16;
    ``kind``: "mxfp4" or "nvfp4"; ``importance``: [in] or None. Returns [out, n_groups] uint8."""
    W = _weights(W)
    if start.shape[0] != W.shape[0] or W.shape[1] % (16 * start.shape[1]):
        raise KernelError(f"fit_fp4: {list(start.shape)} bytes for {list(W.shape)} weights; expected groups of 16 or 32 inputs")
    start = start.contiguous()
    importance = None if importance is None else importance.to(W.device, torch.float32).contiguous()
    kernels = kernel(W)
    if kernels is None:
        return fit_fp4_reference(W, start, kind, global_scale, importance)
    found = torch.empty_like(start)
    first, last = CANDIDATES[kind]
    kernels.fit_fp4(kind, W, importance, start, global_scale, first, last, found, stream=stream(W))
    return found


def run_absmax_reference(W: Tensor, width: int) -> Tensor:
    """The largest |w| of each ``width`` inputs of a row in torch: float32 [out, runs]."""
    return torch.nn.functional.pad(W.float().abs(), (0, -W.shape[1] % width)).view(W.shape[0], -1, width).amax(2)


def quantize_fp8_reference(W: Tensor, scale: Tensor, tile: Tile, dtype: str) -> Tensor:
    """The same in torch."""
    largest = FLOAT8[dtype].largest
    return (W.float() / spread(scale, W.shape, tile)).clamp_(-largest, largest).to(FLOAT8[dtype].dtype)


def quantize_fp4_reference(W: Tensor, step: Tensor) -> Tensor:
    """The same in torch."""
    codes = fp4_codes(W.float().view(*step.shape, -1) / step[:, :, None])
    return pack_fp4(codes.view(W.shape))


def dequantize_fp4_reference(packed: Tensor, step: Tensor) -> Tensor:
    """The same in torch."""
    codes = unpack_fp4(packed)
    return (fp4_values(codes).view(*step.shape, -1) * step[:, :, None]).view(codes.shape)


def fit_fp4_reference(W: Tensor, start: Tensor, kind: str, global_scale: float, importance: Tensor | None) -> Tensor:
    """The same in torch, a candidate at a time over all groups; sums run input by input, as in a lane."""
    groups = W.float().view(*start.shape, -1)
    weights = None if importance is None else importance.view(1, start.shape[1], -1)
    best, least = start.clone(), torch.full(start.shape, torch.inf, device=W.device)
    first, last = CANDIDATES[kind]
    for offset in sorted(range(first, last + 1), key=lambda k: k != 0):
        # A byte of zero is no step of NVFP4's, and 2⁻¹²⁷ of MXFP4's.
        byte = (start.int() + offset).clamp(1 if kind == "nvfp4" else 0, LARGEST_BYTE[kind])
        step = group_step(byte.to(torch.uint8), kind, global_scale)[:, :, None]
        squares = (groups - fp4_values(fp4_codes(groups / step)) * step).square()
        error = torch.zeros_like(least)
        for i in range(squares.shape[2]):
            error = error + (squares[:, :, i] if weights is None else squares[:, :, i] * weights[:, :, i])
        better = error < least
        best, least = torch.where(better, byte.to(torch.uint8), best), torch.where(better, error, least)
    return best


def group_step(scale: Tensor, kind: str, global_scale: float = 1.0) -> Tensor:
    """What a level of 1 is worth in each group: ``scale`` uint8 of any shape → float32."""
    if kind == "nvfp4":
        return scale.view(torch.float8_e4m3fn).float() / torch.tensor(global_scale, dtype=torch.float32, device=scale.device)
    step = torch.where(scale == 0, 1 << 22, scale.int() << 23).view(torch.float32)  # 2⁻¹²⁷ is a subnormal
    return torch.where(scale == 255, torch.nan, step)


def mx_scale(absmax: Tensor, largest_exponent: int) -> Tensor:
    """The E8M0 byte of each group from its ``absmax`` float32, as compressed-tensors computes it: uint8 of the same shape.

    The OCP specification (MX v1.0, 6.3) takes the exponent of absmax less that of the largest element (``largest_exponent``: 2 for E2M1,
    8 for E4M3), which cuts off what exceeds 1.5 or 1.75 times that power of two. compressed-tensors takes the next exponent from 1.75 on.
    """
    exponent = (absmax.view(torch.int32) + (1 << 21)) >> 23  # biased; the carry out of the mantissa is the rounding up
    return (exponent - largest_exponent).clamp_(0, 254 - largest_exponent).to(torch.uint8)  # further up, the largest element is infinite


def fp4_codes(V: Tensor) -> Tensor:
    """The E2M1 code of each element of ``V`` float32: uint8, bit 3 the sign."""
    magnitude = V.abs()
    # Ties to the even mantissa: 0.25 → 0, 0.75 → 1, 1.25 → 1, 1.75 → 2, 2.5 → 2, 3.5 → 4, 5 → 4.
    code = (V < 0).to(torch.uint8) * 8
    for bound, tie_up in ((0.25, False), (0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True), (5.0, False)):
        code += magnitude >= bound if tie_up else magnitude > bound
    return code


def fp4_values(codes: Tensor) -> Tensor:
    """The values of E2M1 ``codes`` uint8 below 16: float32."""
    levels = torch.tensor([*FP4_LEVELS, *(-level for level in FP4_LEVELS)], device=codes.device)
    return levels[codes.int()]


def pack_fp4(codes: Tensor) -> Tensor:
    """``codes``: [out, in] uint8 below 16, two to a byte: [out, in / 2]."""
    return codes[:, 0::2] | codes[:, 1::2] << 4


def unpack_fp4(packed: Tensor) -> Tensor:
    """The inverse of :func:`pack_fp4`."""
    return torch.stack((packed & 15, packed >> 4), dim=2).view(packed.shape[0], -1)


def tiles_of(shape: tuple[int, ...], tile: Tile) -> Tile:
    """Tiles down and across a matrix of ``shape``, cut ones counted."""
    return -(-shape[0] // tile[0]), -(-shape[1] // tile[1])


def spread(scale: Tensor, shape: tuple[int, ...], tile: Tile) -> Tensor:
    """``scale``: [tiles down, tiles across] for each weight of ``shape``; a dimension of one tile stays one long, to be broadcast."""
    for axis in (0, 1):
        if scale.shape[axis] > 1 and tile[axis] > 1:
            scale = scale.repeat_interleave(tile[axis], axis).narrow(axis, 0, shape[axis])
    return scale


def _weights(W: Tensor) -> Tensor:
    W = W.detach().contiguous()
    return W if W.dtype in (torch.float32, torch.bfloat16, torch.float16) else W.float()


def _scales(op: str, shape: tuple[int, ...], scale: Tensor, tile: Tile) -> Tensor:
    if len(shape) != 2 or min(tile) < 1 or tuple(scale.shape) != tiles_of(shape, tile):
        raise KernelError(f"{op}: scale is {list(scale.shape)} for weights {list(shape)} in tiles of {list(tile)}")
    return scale.to(torch.float32).contiguous()


def _steps(op: str, shape: tuple[int, ...], step: Tensor) -> Tensor:
    if (
        step.ndim != 2
        or step.shape[0] != shape[0]
        or not step.shape[1]
        or shape[1] // step.shape[1] not in (16, 32)
        or shape[1] % step.shape[1]
    ):
        raise KernelError(f"{op}: step is {list(step.shape)} for weights {list(shape)}; expected groups of 16 or 32 inputs")
    return step.to(torch.float32).contiguous()
