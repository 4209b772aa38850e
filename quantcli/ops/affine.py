"""The scale and zero point of each group of an affine integer format: min–max, or a search weighted by importance.

A group is ``group_size`` inputs of one row. It is stored as ``w ≈ scale·(code − zero)`` with codes 0 … 2^bits − 1, an integer zero point in
the same range and a scale above zero that the file's dtype holds. Two ways to find them:

min–max, GPTQ's own convention (range widened to hold 0)::

    symmetric    scale = 2·max|w| / (2^bits − 1)         zero = 2^(bits−1)
    asymmetric   scale = (max w − min w) / (2^bits − 1)  zero = round(−min w / scale)

search, minimizing the measure Σ_j importance_j·(w_j − ŵ_j)², from the min–max grid on, so that it is never worse under that measure:

1. *shrink*: symmetric: 48 scales from max|w| / (2^(bits−1) − 1) to a seventh of it; asymmetric: 10 × 10 pairs of factors on the two ends;
2. *move* (asymmetric): zero points −2 … 2 and scales −20 … 20 % around the best;
3. *re-solve*, three times: the codes of the best fixed, its scale by weighted least squares (as ggml's ``make_qx_quants`` does).

Each candidate's scale is rounded to what the file holds (float16, say) *before* it is judged, and judged on the codes that
:meth:`Grid.encode` will find with it. On Gaussian, heavy-tailed and skewed groups of 16 to 128 weights, under even and very uneven
importance, the measure's sum comes within 1 % of a dense search (every zero point, 200 scales each), where min–max is 1.3 to 8 times
above it. Shrinking both ends alike by 80 factors, the usual ``mse`` observer, stays up to 25 % above it on asymmetric grids.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from operator import mul

import torch
from torch import Tensor

from quantcli.errors import KernelError, NumericsError
from quantcli.ops.dispatch import kernel, stream
from quantcli.tensors import Grid

TINY = {torch.float16: 2.0**-24, torch.bfloat16: 2.0**-126, torch.float32: 2.0**-126}
"""The smallest scale in each dtype: a group of weights that are not all zero keeps one."""

HELD = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32"}
"""The kernels' names of these dtypes."""

SYM_SHRINK = tuple(accumulate([0.96] * 47, mul, initial=1.0))
END_SHRINK = (1.0, 0.92, 0.84, 0.76, 0.68, 0.6, 0.5, 0.4, 0.28, 0.16)
MOVE_ZERO = (-2.0, -1.0, 0.0, 1.0, 2.0)
MOVE_SCALE = (0.8, 0.84, 0.88, 0.91, 0.94, 0.97, 1.0, 1.03, 1.06, 1.1, 1.15, 1.2)
N_RESOLVE = 3

_CPU_CANDIDATES = 1 << 16
_CUDA_CANDIDATES = 1 << 23
"""Lanes × candidates that the reference evaluates at once: chosen for the cache of a CPU, or for a GPU."""


def fit_affine(
    W: Tensor,
    importance: Tensor | None,
    *,
    bits: int,
    group_size: int,
    sym: bool,
    search: bool,
    scale_dtype: torch.dtype = torch.float16,
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each group of ``W``: [out, in] float32.

    ``importance``: [in], any positive unit, or None for equal weights; ``group_size`` −1 is one group a row. Returns ``scale``
    [out, n_groups] float32, already a number of ``scale_dtype`` above zero, and ``zero`` [out, n_groups] int32.
    A group of zeros gets scale 1.
    Raises :class:`NumericsError` on NaN, Inf or a scale that ``scale_dtype`` cannot hold.
    """
    group_size = W.shape[-1] if group_size == -1 else group_size
    _check(W, importance, bits, group_size)
    W, importance = W.detach().contiguous(), relative_importance(W, importance)
    kernels = kernel(W)
    if kernels is None:
        scale, zero = fit_affine_reference(W, importance, bits=bits, group_size=group_size, sym=sym, search=search, scale_dtype=scale_dtype)
    else:
        scale, zero = _fitted_like(W, group_size)
        kernels.fit_affine(W, importance, bits, group_size, sym, search, HELD[scale_dtype], scale, zero, stream=stream(W))
    _check_scale(W, scale, group_size, scale_dtype)
    return scale, zero


def affine_errors(
    W: Tensor,
    basis: Tensor,
    importance: Tensor,
    *,
    bits: int,
    group_size: int,
    sym: bool,
    search: bool,
    scale_dtype: torch.dtype = torch.float16,
) -> Tensor:
    """The error of rounding ``W`` [out, in] float32 in another basis: W − Q(W·diag(basis))·diag(1/basis), [out, in].

    ``basis``: [in] float32, above zero; ``importance`` [in]: of the inputs in that basis; the rest as in :func:`fit_affine`.
    """
    size = W.shape[-1] if group_size == -1 else group_size
    kernels = kernel(W)
    if kernels is None:
        scaled = W * basis
        scale, zero = fit_affine(scaled, importance, bits=bits, group_size=size, sym=sym, search=search, scale_dtype=scale_dtype)
        grid = affine_grid(scale, zero, bits=bits, group_size=size, sym=sym)
        return (scaled - grid.decode(grid.encode(scaled))) / basis
    _check(W, importance, bits, size)
    check_finite("the basis", basis[None])
    W, importance, basis = W.detach().contiguous(), relative_importance(W, importance), basis.contiguous()
    scale, zero, E = *_fitted_like(W, size), torch.empty_like(W)
    kernels.fit_affine(W, importance, bits, size, sym, search, HELD[scale_dtype], scale, zero, basis, E, stream=stream(W))
    _check_scale(W, scale, size, scale_dtype, basis)
    return E


def affine_grid(scale: Tensor, zero: Tensor, *, bits: int, group_size: int, sym: bool) -> Grid:
    """The grid of a fit: ``scale``, ``zero`` [out, n_groups]. Codes are signed when symmetric, else they have ``offset`` −scale·zero."""
    half = 2 ** (bits - 1)
    lo, hi = (-half, half - 1) if sym else (0, 2 * half - 1)
    return Grid(scale, None if sym else -(scale * zero), lo, hi, group_size, parts={"zero": zero.to(torch.uint8)})


def _fitted_like(W: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    scale = torch.empty(W.shape[0], W.shape[1] // group_size, device=W.device)
    return scale, torch.empty_like(scale, dtype=torch.int32)


def relative_importance(W: Tensor, importance: Tensor | None) -> Tensor:
    """``importance`` over its maximum, so that float32 sums neither overflow nor vanish; ones for None or when all are zero."""
    if importance is None:
        return torch.ones(W.shape[1], device=W.device)
    importance = importance.to(W.device, torch.float32)
    largest = importance.max()
    return torch.where(largest > 0, importance / largest, torch.ones_like(importance)).contiguous()


def fit_affine_reference(
    W: Tensor,
    importance: Tensor,
    *,
    bits: int,
    group_size: int,
    sym: bool,
    search: bool,
    scale_dtype: torch.dtype = torch.float16,
) -> tuple[Tensor, Tensor]:
    """The same in torch: a lane is a group, its sums run in the order of its weights. ``importance``: [in], at most 1."""
    n_rows, n_groups = W.shape[0], W.shape[1] // group_size
    n_candidates = max(len(SYM_SHRINK), len(END_SHRINK) ** 2)
    n_lanes = (_CUDA_CANDIDATES if W.is_cuda else _CPU_CANDIDATES) // n_candidates
    rows = max(1, n_lanes // n_groups)
    scale = torch.empty(n_rows, n_groups, device=W.device)
    zero = torch.empty(n_rows, n_groups, device=W.device, dtype=torch.int32)
    h = importance.view(n_groups, group_size).t()  # [group_size, n_groups]
    for start in range(0, n_rows, rows):
        chunk = W[start : start + rows].reshape(-1, group_size).t().contiguous()  # [group_size, lanes]
        lanes = _Lanes(chunk, h.repeat(1, chunk.shape[1] // n_groups), bits, sym, scale_dtype)
        s, z = lanes.search() if search else lanes.minmax()
        scale[start : start + rows] = s.view(-1, n_groups)
        zero[start : start + rows] = (z + (2 ** (bits - 1) if sym else 0)).view(-1, n_groups)
    return scale, zero


@dataclass(frozen=True, slots=True)
class _Best:
    """The best candidate of each lane so far: three [lanes]. ``zero`` counts from 0 of the code range, so it is 0 when symmetric."""

    error: Tensor
    scale: Tensor
    zero: Tensor


class _Lanes:
    """Groups side by side: weights and importance [group_size, lanes]. Candidates are tensors [n, lanes]."""

    def __init__(self, w: Tensor, h: Tensor, bits: int, sym: bool, scale_dtype: torch.dtype) -> None:
        self.w, self.h, self.sym, self.scale_dtype = w, h, sym, scale_dtype
        self.levels = float(2**bits - 1)
        self.lo = -float(2 ** (bits - 1)) if sym else 0.0
        self.hi = self.lo + self.levels
        # Divisors are tensors: on CUDA torch divides by a number through its reciprocal, which rounds twice.
        self.levels_there, self.hi_there = w.new_tensor(self.levels), w.new_tensor(self.hi)
        self.min = w.amin(0).clamp_max(0.0)
        self.max = w.amax(0).clamp_min(0.0)
        self.absmax = torch.maximum(-self.min, self.max)

    def minmax(self) -> tuple[Tensor, Tensor]:
        width = 2.0 * self.absmax if self.sym else self.max - self.min
        scale = self.storable(width / self.levels_there)
        return scale, self.zero_at(self.min, scale)

    def search(self) -> tuple[Tensor, Tensor]:
        scale, zero = self.minmax()
        best = _Best(self.judge(scale[None], zero[None])[0], scale, zero)
        best = self.shrink_symmetric(best) if self.sym else self.move(self.shrink_ends(best))
        for _ in range(N_RESOLVE):
            best = self.better(best, self.resolve(best.scale, best.zero)[None], best.zero[None])
        return best.scale, best.zero

    def shrink_symmetric(self, best: _Best) -> _Best:
        factors = torch.tensor(SYM_SHRINK, device=self.w.device)[:, None]
        scale = (self.absmax / self.hi_there) * factors
        return self.better(best, scale, torch.zeros_like(scale))

    def shrink_ends(self, best: _Best) -> _Best:
        factors = torch.tensor(END_SHRINK, device=self.w.device)[:, None]
        low, high = self.min * factors, self.max * factors  # [10, lanes]
        low = low.repeat_interleave(len(END_SHRINK), 0)
        scale = self.storable((high.repeat(len(END_SHRINK), 1) - low) / self.levels_there)
        return self.better(best, scale, self.zero_at(low, scale))

    def move(self, best: _Best) -> _Best:
        shifts = torch.tensor(MOVE_ZERO, device=self.w.device).repeat_interleave(len(MOVE_SCALE))[:, None]
        factors = torch.tensor(MOVE_SCALE, device=self.w.device).repeat(len(MOVE_ZERO))[:, None]
        return self.better(best, best.scale * factors, (best.zero + shifts).clamp_(0.0, self.levels))

    def storable(self, scale: Tensor) -> Tensor:
        """``scale`` as the file's dtype holds it, above zero; 1 where the group is all zeros."""
        return torch.where(self.absmax == 0, 1.0, scale.to(self.scale_dtype).float().clamp_min(TINY[self.scale_dtype]))

    def zero_at(self, low: Tensor, scale: Tensor) -> Tensor:
        """The zero point that puts code 0 nearest to ``low``."""
        return torch.zeros_like(scale) if self.sym else (-low / scale).round_().clamp_(0.0, self.levels)

    def judge(self, scale: Tensor, zero: Tensor) -> Tensor:
        """The measure of each candidate, with the codes and values of :class:`Grid`."""
        error, offset = torch.zeros_like(scale), -(scale * zero)
        for w, h in zip(self.w, self.h, strict=True):
            d = (w - offset).div_(scale).round_().clamp_(self.lo, self.hi).mul_(scale).add_(offset).sub_(w)
            error += d.mul_(d).mul_(h)
        return error

    def better(self, best: _Best, scale: Tensor, zero: Tensor) -> _Best:
        """The first smallest of ``best`` and the candidates in their order; a NaN never wins."""
        scale = self.storable(scale)
        for e, s, z in zip(self.judge(scale, zero), scale, zero, strict=True):
            less = e < best.error
            best = _Best(torch.where(less, e, best.error), torch.where(less, s, best.scale), torch.where(less, z, best.zero))
        return best

    def resolve(self, scale: Tensor, zero: Tensor) -> Tensor:
        """The scale that minimizes the measure for the codes of (scale, zero): Σ h·k·w / Σ h·k² with k = code − zero."""
        above, below, offset = torch.zeros_like(scale), torch.zeros_like(scale), -(scale * zero)
        for w, h in zip(self.w, self.h, strict=True):
            k = (w - offset).div_(scale).round_().clamp_(self.lo, self.hi).sub_(zero)
            hk = h * k
            above += hk * w
            below += hk.mul_(k)
        return torch.where((above > 0) & (below > 0), above / below, scale)


def _check(W: Tensor, importance: Tensor | None, bits: int, group_size: int) -> None:
    if W.ndim != 2 or W.dtype != torch.float32:
        raise KernelError(f"fit_affine: W is {W.dtype} {list(W.shape)}; expected float32 [out, in]")
    if not 2 <= bits <= 8:
        raise KernelError(f"fit_affine: bits is {bits}; expected 2 to 8")
    if group_size < 1 or W.shape[1] % group_size:
        raise KernelError(f"fit_affine: group_size {group_size} does not divide the {W.shape[1]} inputs of W; expected a divisor or -1")
    check_finite("W", W)
    if importance is None:
        return
    if tuple(importance.shape) != (W.shape[1],):
        raise KernelError(f"fit_affine: importance is {list(importance.shape)}; expected [{W.shape[1]}], one for each input of W")
    check_finite("importance", importance[None])
    if bool((importance < 0).any()):
        raise NumericsError(f"importance is negative at input {int(importance.argmin())}; expected a mean of squares")


def check_finite(name: str, W: Tensor) -> None:
    """Raise :class:`NumericsError` at the first NaN or Inf of ``W`` [rows, columns]."""
    finite = torch.isfinite(W)
    if bool(finite.all()):
        return
    row, column = (~finite).nonzero()[0].tolist()
    raise NumericsError(f"{name} holds {float(W[row, column])} at row {row}, column {column}; expected finite numbers")


def _check_scale(W: Tensor, scale: Tensor, group_size: int, scale_dtype: torch.dtype, basis: Tensor | None = None) -> None:
    largest_scale = torch.finfo(scale_dtype).max
    over = scale > largest_scale
    if not bool(over.any()):
        return
    row, group = over.nonzero()[0].tolist()
    inputs = slice(group * group_size, (group + 1) * group_size)
    largest = float((W[row, inputs] if basis is None else W[row, inputs] * basis[inputs]).abs().max())
    raise NumericsError(
        f"row {row}, group {group}: the largest weight {largest:g} needs a scale above {HELD[scale_dtype]}'s largest, {largest_scale:g}; "
        "expected weights of a sane size, so check the source or keep this tensor in its own dtype"
    )
