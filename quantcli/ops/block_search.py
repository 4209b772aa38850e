"""ggml's arithmetic and its three scale searches in torch, with the block index as the lane.

``x`` is [block, n]: row ``i`` holds element ``i`` of every block, so that a sum over ``i`` runs in ggml's order for each of them.
Codes are [block, n] int32, centred on zero where the type is signed; bytes are [n_bytes, n] int32 in 0 … 255; ``d`` and ``dmin`` are
the bits of IEEE halves as int32. The compiled codecs in ``kernels/blocks`` have the same shape and the same names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

TINY = 1e-15
"""Below this a group counts as all zero (ggml's GROUP_MAX_EPS)."""


@dataclass(slots=True)
class Params:
    """What a block stores besides its codes. ``d``, ``dmin``, ``m`` [n]; ``scale``, ``min`` [n_sub, n]; int32.

    A type that has no ``d`` leaves it empty.
    """

    d: Tensor
    scale: Tensor | None = None
    dmin: Tensor | None = None
    min: Tensor | None = None
    m: Tensor | None = None


@dataclass(slots=True)
class Found:
    """The result of a search: the parameters, and of each sub-block its encoding, ``round(inverse · (x − origin))``, each [n_sub, n], where
    the type's ``encode`` needs it; or, where it chooses from a code book, the ``codes`` themselves [block, n]."""

    params: Params
    inverse: Tensor = field(default_factory=lambda: torch.empty(0))
    origin: Tensor = field(default_factory=lambda: torch.empty(0))
    is_weighted: bool = False
    codes: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Kind:
    """The constants of a block type.

    ``block``, ``n_bytes``: weights and bytes of a block; ``sub``: weights of a sub-block; ``lo`` … ``hi``: the codes; ``scale``: dtype of
    the sub-blocks' scales, integers within ``scale_range`` as the minima are; ``has_min``: ``dmin`` and a minimum for each sub-block;
    ``has_offset``: ``m``, the offset of the block; ``d_at``: the byte of ``d``, which ``dmin`` or ``m`` follow, None
    without a ``d``; ``is_weighted``: the search uses importance;
    ``row_power``: and the mean square of the block's whole row with it; ``needs_importance``: and fails without; ``has_book``:
    magnitudes come from a code book; ``levels``: the values of the codes where these differ; ``scale_of``: the values of the sub-blocks'
    scales likewise.
    """

    block: int
    n_bytes: int
    sub: int
    lo: int
    hi: int
    scale: torch.dtype | None = None
    has_min: bool = False
    has_offset: bool = False
    d_at: int | None = 0
    is_weighted: bool = True
    row_power: bool = False
    needs_importance: bool = False
    has_book: bool = False
    levels: tuple[float, ...] | None = None
    scale_of: Callable[[Tensor], Tensor] | None = None
    scale_range: tuple[int, int] = (0, 0)


class Codec(Protocol):
    """One block type. ``power`` is the mean square of each block's whole row."""

    kind: Kind

    def search(self, x: Tensor, importance: Tensor | None, power: Tensor | None) -> Found: ...
    def encode(self, x: Tensor, found: Found) -> Tensor: ...
    def pack(self, codes: Tensor, params: Params) -> Tensor: ...
    def unpack(self, data: Tensor) -> tuple[Tensor, Params]: ...
    def decode(self, codes: Tensor, params: Params) -> Tensor: ...


# -- arithmetic ------------------------------------------------------------------------------------------------------------------


def nearest_int(x: Tensor) -> Tensor:
    """ggml's rounding to nearest even by the low bits of x + 1.5·2²³, int32. Out of range it gives what the bits give; NaN gives 0,
    which are the bits of x86's and Arm's own NaN, though not of every NaN that torch makes."""
    total = x + 12582912.0
    return torch.where(total.isnan(), 0, (total.view(torch.int32) & 0x007FFFFF) - 0x00400000)


def truncate(x: Tensor) -> Tensor:
    """float32 → int32 towards zero; NaN and values outside int32 give the smallest, as on x86 (and so in ggml's files)."""
    inside = x.abs() < 2147483648.0
    return torch.where(inside, torch.where(inside, x, 0.0).to(torch.int32), -(2**31))


def round_half_away(x: Tensor) -> Tensor:
    """roundf; the addend is the float below one half, so that 0.49999997 does not round up."""
    return truncate(x + torch.copysign(torch.full_like(x, 0.49999997), x))


def square_root(x: Tensor) -> Tensor:
    """√x, rounded once: torch's float32 root comes from a vector library and may be off by one unit in the last place."""
    return x.double().sqrt().float()


def to_half(x: Tensor) -> Tensor:
    return x.half().view(torch.int16).int() & 0xFFFF


def from_half(bits: Tensor) -> Tensor:
    return bits.to(torch.int16).view(torch.float16).float()


def half_bytes(bits: Tensor) -> Tensor:
    """[n] halves → [2, n] bytes."""
    return torch.stack((bits & 255, bits >> 8))


def half_at(data: Tensor, at: int) -> Tensor:
    return data[at] | data[at + 1] << 8


def signed_byte(x: Tensor) -> Tensor:
    return (x & 255 ^ 128) - 128


def ordered_sum(x: Tensor) -> Tensor:
    """Σ over the first axis, one element after another."""
    total = torch.zeros_like(x[0])
    for row in x:
        total = total + row
    return total


def peak_of(x: Tensor) -> Tensor:
    """The element of largest magnitude along the first axis, the first of equals, with its sign. [n]"""
    peak, amax = torch.zeros_like(x[0]), torch.zeros_like(x[0])
    for row in x:
        more = row.abs() > amax
        amax, peak = torch.where(more, row.abs(), amax), torch.where(more, row, peak)
    return peak


def least_of(x: Tensor) -> Tensor:
    """The least element along the first axis, the first of equals (so that the sign of a zero is ggml's). [n]"""
    least = x[0]
    for row in x[1:]:
        least = torch.where(row < least, row, least)
    return least


def ratio(a: Tensor | float, b: Tensor | float) -> Tensor:
    """a / b, rounded once. (Torch turns number / tensor into a reciprocal and a product, and tensor / number too on CUDA.)"""
    like = a if isinstance(a, Tensor) else b
    assert isinstance(like, Tensor)
    a, b = (v if isinstance(v, Tensor) else torch.full_like(like, v) for v in (a, b))
    return a / b


def spacing(n_max: int, first: float, step: float, trial: int) -> float:
    """``first + step·trial + n_max`` in float32."""
    parts = torch.tensor([first, step, trial], dtype=torch.float32)
    return ((parts[0] + parts[1] * parts[2]) + n_max).item()


# -- the three searches ----------------------------------------------------------------------------------------------------------


def search_line(
    x: Tensor, w: Tensor, n_max: int, first: float, step: float, n_steps: int, *, mad: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """make_qkx2_quants and make_qkx3_quants: scale and min ≤ 0 of least Σ w·(scale·q + min − x)², q = 0 … n_max.

    ``x``, ``w``: [k, …]; ``mad``: the error's magnitude counts, not its square. Returns scale, min, inverse, origin, each […].
    """

    def codes_of(inverse: Tensor, low: Tensor) -> Tensor:
        return nearest_int(inverse * (x - low)).clamp(0, n_max).float()

    def error_of(scale: Tensor, low: Tensor, codes: Tensor) -> Tensor:
        diff = scale * codes + low - x
        return ordered_sum(w * (diff.abs() if mad else diff * diff))

    low, high = least_of(x), x.amax(0)
    low = torch.where(low > 0, 0.0, low)
    sum_w, sum_x = ordered_sum(w), ordered_sum(w * x)
    flat = high <= low
    best_inverse = ratio(n_max, torch.where(flat, 1.0, high - low))
    best_scale = ratio(1, best_inverse)
    best_origin = low
    best_error = torch.where(flat, -1.0, error_of(best_scale, low, codes_of(best_inverse, low)))
    for trial in range(n_steps + 1):
        inverse = ratio(spacing(n_max, first, step, trial), torch.where(flat, 1.0, high - low))
        codes = codes_of(inverse, low)
        wl = w * codes
        sum_l, sum_l2, sum_xl = ordered_sum(wl), ordered_sum(wl * codes), ordered_sum(wl * x)
        determinant = sum_w * sum_l2 - sum_l * sum_l
        scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        minimum = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        positive = minimum > 0
        scale = torch.where(positive, sum_xl / sum_l2, scale)
        minimum = torch.where(positive, 0.0, minimum)
        error = error_of(scale, minimum, codes)
        better = (determinant > 0) & (error < best_error)
        best_error = torch.where(better, error, best_error)
        best_inverse = torch.where(better, inverse, best_inverse)
        best_origin = torch.where(better, low, best_origin)
        best_scale = torch.where(better, scale, best_scale)
        low = torch.where(better, minimum, low)
    return torch.where(flat, 0.0, best_scale), low, torch.where(flat, 0.0, best_inverse), best_origin


def search_ray(x: Tensor, w: Tensor, n_max: int) -> tuple[Tensor, Tensor]:
    """make_qx_quants with rmse_type 1: scale of least Σ w·(scale·q − x)², q = −n_max … n_max − 1. Returns scale, inverse, each [n]."""

    def sums(inverse: Tensor) -> tuple[Tensor, Tensor]:
        codes = nearest_int(inverse * x).clamp(-n_max, n_max - 1).float()
        return ordered_sum(w * x * codes), ordered_sum(w * codes * codes)

    peak = peak_of(x)
    tiny = peak.abs() < TINY
    peak = torch.where(tiny, 1.0, peak)
    best_inverse = ratio(-n_max, peak)
    sum_lx, sum_l2 = sums(best_inverse)
    best_scale = torch.where(sum_l2 == 0, 0.0, sum_lx / sum_l2)
    best_score = best_scale * sum_lx
    for trial in (*range(-9, 0), *range(1, 10)):
        inverse = ratio(-spacing(n_max, 0.0, 0.1, trial), peak)
        sum_lx, sum_l2 = sums(inverse)
        better = (sum_l2 > 0) & (sum_lx * sum_lx > best_score * sum_l2)
        best_scale = torch.where(better, sum_lx / sum_l2, best_scale)
        best_inverse = torch.where(better, inverse, best_inverse)
        best_score = torch.where(better, best_scale * sum_lx, best_score)
    return torch.where(tiny, 0.0, best_scale), torch.where(tiny, 0.0, best_inverse)


def ray_code(inverse: Tensor, x: Tensor, n_max: int, tiny: Tensor | None = None) -> Tensor:
    """The codes that :func:`search_ray` gave ``x``: all lowest where it counted as zero, which a zero ``inverse`` shows if x is finite."""
    return torch.where(inverse == 0 if tiny is None else tiny, -n_max, nearest_int(inverse * x).clamp(-n_max, n_max - 1))


def search_scales(x: Tensor, w: Tensor, n_max: int) -> tuple[Tensor, Tensor]:
    """make_qp_quants: codes 0 … n_max of non-negative ``x`` [k, n] and their scale [n]; codes as ggml's bytes (low 8 bits)."""
    peak = torch.zeros_like(x[0])
    for row in x:
        peak = torch.where(peak > row, peak, row)
    tiny = peak < TINY
    peak = torch.where(tiny, 1.0, peak)
    best_inverse = ratio(n_max, peak)
    diff = x - ratio(1, best_inverse) * (nearest_int(best_inverse * x) & 255).float()
    best_error = ordered_sum(w * diff * diff)
    for trial in (*range(-4, 0), *range(1, 5)):
        inverse = ratio(spacing(n_max, 0.0, 0.1, trial), peak)
        diff = x - ratio(1, inverse) * nearest_int(inverse * x).clamp(max=n_max).float()
        error = ordered_sum(w * diff * diff)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_inverse = torch.where(better, inverse, best_inverse)
    nearest = nearest_int(best_inverse * x).clamp(max=n_max)
    sum_lx, sum_l2 = ordered_sum(w * x * nearest.float()), ordered_sum(w * nearest.float() * nearest.float())
    codes = list(nearest & 255)
    for i in [*range(len(codes))] * 5:  # coordinate descent, five rounds
        code = codes[i].float()
        lx, l2 = sum_lx - w[i] * x[i] * code, sum_l2 - w[i] * code * code
        moved = nearest_int(x[i] * l2 / lx).clamp(max=n_max)
        possible = (lx > 0) & (l2 > 0) & (moved != codes[i])
        lx, l2 = lx + w[i] * x[i] * moved.float(), l2 + w[i] * moved.float() * moved.float()
        better = possible & (lx * lx * sum_l2 > sum_lx * sum_lx * l2)
        codes[i] = torch.where(better, moved & 255, codes[i])
        sum_lx, sum_l2 = torch.where(better, lx, sum_lx), torch.where(better, l2, sum_l2)
    scale = torch.where(sum_l2 > 0, sum_lx / sum_l2, 0.0)
    return torch.where(tiny, 0, torch.stack(codes)), torch.where(tiny, 0.0, scale)
