"""HQQ: scales and zero points that suit most weights and ignore outliers, without any data.

Half-Quadratic Quantization (Badri & Shaji 2023, https://mobiusml.github.io/hqq_blog/): instead of the squared error of a group it
minimizes ‖W − Ŵ‖_p^p with p < 1, which a few large errors hardly change. The term W_e absorbs those (eq. 3 there); each round is::

    W_e ← shrink(W − Ŵ),  shrink(x) = sign(x)·max(0, |x| − |x|^(p−1)/β)      eq. 4
    z   ← mean(code − (W − W_e)/s)                                            eq. 5
    β   ← κ·β

Where we differ, and why:

- The engines' zero points are integers. Rounding z of eq. 5 gives back the zero point it started from (on the pico model every group's
  error is then min–max's own). So the same splitting is solved for the *scale*: s ← Σ k·(W − W_e) / Σ k², k = code − z, for the zero point
  of the start and its two neighbours. Where the offset is free (q4_1, q5_1) both are solved, by eq. 5 and then the scale.
- The start is our own search (least squares), and each group keeps the best round by ‖·‖_p^p: never worse than the search in that measure.

β is in units of weights, as in hqq. Its value 10 shrinks the errors of an ordinary layer to zero (|e|^(p−2) > 10 below 0.17): W_e is 0,
the rounds are least squares and p only selects the best one. A β of 300 makes W_e effective; ‖·‖_p^p falls further, and on the pico model
the KL divergence rises (2 bits in groups of 64: 0.29 to 0.40).

Its gain there (test_pass_hqq.py): KL of 4 bits in groups of 64 is 0.0137 by min–max, 0.0130 by this pass, 0.0127 by rtn's
search, so for integer zero points rtn is the better of the two; in Q4_1 it is 0.0096 by ggml's search and 0.0090 by this pass.
With calibration statistics gptq is far better. Cost: 20 rounds of a dozen passes over the weights, 60 where zero points are integers;
memory of one chunk of rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from typing_extensions import override

from quantcli import qtypes
from quantcli.errors import RecipeError, UnsupportedError
from quantcli.passes import Pass
from quantcli.passes.shared import runs
from quantcli.tensors import Grid, Layer, QuantizedTensor, Report, Scheme, Stats

CHUNK_ELEMENTS = 1 << 17
"""Weights solved at once: what a core's cache likes."""

SMALLEST = 1e-4
"""The least error, as a share of a step, that is used in powers: 0^(p−1) is infinite."""


@dataclass(frozen=True, slots=True)
class Options:
    """``p``: of the norm, above 0 and at most 1; ``beta``: of the shrinkage, in weights; ``kappa``: its growth; ``iters``: rounds."""

    p: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    iters: int = 20

    def __post_init__(self) -> None:
        if not (0 < self.p <= 1 and self.beta > 0 and self.kappa >= 1 and self.iters >= 1):
            raise RecipeError(f"hqq: expected 0 < p ≤ 1, beta > 0, kappa ≥ 1, iters ≥ 1, not {self}")


@dataclass(frozen=True, slots=True)
class Solved:
    """A round of each group: three [groups, 1]. ``error`` is the mean of |w − ŵ|^p."""

    scale: Tensor
    zero: Tensor
    error: Tensor


def half_quadratic(V: Tensor, start: Solved, *, lo: int, hi: int, free: bool, options: Options = Options()) -> Solved:
    """The best round of each group of ``V`` [groups, group_size]; weights are ``scale·(code − zero)`` with codes ``lo … hi``.

    ``free``: whether the zero point moves with eq. 5; otherwise the scale alone does.
    """
    scale, zero, best, beta = start.scale, start.zero, start, options.beta
    for _ in range(options.iters):
        X = V / scale
        codes = (X + zero).round_().clamp_(lo, hi)
        E = X.sub_(codes).add_(zero)  # (W − Ŵ)/s
        size = E.abs().clamp_(min=SMALLEST)
        steep = size.pow(options.p - 1)
        best = better(best, Solved(scale, zero, (steep * size).mean(1, keepdim=True) * scale.abs().pow(options.p)))
        shrunk = size.sub_(steep * scale.abs().pow(options.p - 2) / beta).clamp_(min=0)
        target = V - scale * E.sign().mul_(shrunk)  # W − W_e, eq. 4
        if free:
            zero = (codes - target / scale).mean(1, keepdim=True)  # eq. 5
        K = codes - zero
        above, below = (K * target).sum(1, keepdim=True), (K * K).sum(1, keepdim=True)
        scale = torch.where((above > 0) & (below > 0), above / below, scale)
        beta *= options.kappa
    return best


def better(one: Solved, other: Solved) -> Solved:
    """Group by group the smaller error, the first one where they are equal; NaN never wins."""
    less = other.error < one.error
    pairs = ((one.scale, other.scale), (one.zero, other.zero), (one.error, other.error))
    return Solved(*(torch.where(less, b, a) for a, b in pairs))


def solve(W: Tensor, grid: Grid, scheme: Scheme, options: Options = Options()) -> Grid:
    """``grid`` of ``W`` [out, in] float32, each group moved to where ‖W − Ŵ‖_p^p is smallest, or left where it was."""
    moved = qtypes.of(scheme.qtype).moved
    step = max(1, CHUNK_ELEMENTS // W.shape[1])
    pieces = []
    for first in range(0, W.shape[0], step):
        V, here = W[first : first + step], rows_of(grid, slice(first, first + step))
        scale, offset = solve_rows(V, here, options)
        pieces.append(keep_better(V, here, moved(here, scale, offset, scheme), options.p))
    return joined(pieces)


def solve_rows(W: Tensor, grid: Grid, options: Options) -> tuple[Tensor, Tensor | None]:
    """Scale and offset [rows, n_groups] of ``W`` [rows, in], not yet rounded to what the file holds."""
    V = W.reshape(-1, grid.group_size)
    scale = torch.where(grid.scale == 0, 1.0, grid.scale).view(-1, 1)
    zero = torch.zeros_like(scale) if grid.offset is None else -grid.offset.view(-1, 1) / scale
    free = grid.offset is not None and "zero" not in grid.parts
    shifts = (0.0, -1.0, 1.0) if grid.offset is not None and not free else (0.0,)
    nothing = torch.full_like(scale, torch.inf)
    best = Solved(scale, zero, nothing)
    for shift in shifts:
        start = Solved(scale, zero if len(shifts) == 1 else (zero.round() + shift).clamp_(grid.lo, grid.hi), nothing)
        best = better(best, half_quadratic(V, start, lo=grid.lo, hi=grid.hi, free=free, options=options))
    offset = None if grid.offset is None else -(best.scale * best.zero).view(grid.scale.shape)
    return best.scale.view(grid.scale.shape), offset


def keep_better(W: Tensor, one: Grid, other: Grid, p: float) -> Grid:
    """Group by group the grid with the smaller ‖W − Ŵ‖_p^p."""

    def error(grid: Grid) -> Tensor:
        return (W - grid.decode(grid.encode(W))).abs().pow(p).view(len(W), -1, grid.group_size).sum(2)

    less = error(other) < error(one)
    offset = None if one.offset is None or other.offset is None else torch.where(less, other.offset, one.offset)
    parts = {name: torch.where(less, other.parts[name], part) for name, part in one.parts.items()}
    return replace(one, scale=torch.where(less, other.scale, one.scale), offset=offset, parts=parts)


def rows_of(grid: Grid, rows: slice) -> Grid:
    parts = {name: part[rows] for name, part in grid.parts.items()}
    return replace(grid, scale=grid.scale[rows], offset=None if grid.offset is None else grid.offset[rows], parts=parts)


def joined(pieces: list[Grid]) -> Grid:
    offsets = [piece.offset for piece in pieces if piece.offset is not None]
    parts = {name: torch.cat([piece.parts[name] for piece in pieces]) for name in pieces[0].parts}
    return replace(pieces[0], scale=torch.cat([p.scale for p in pieces]), offset=torch.cat(offsets) if offsets else None, parts=parts)


def quantize(W: Tensor, scheme: Scheme, options: Options = Options()) -> QuantizedTensor:
    """One weight matrix ``W``: [out, in] float32; :class:`UnsupportedError` for a number format whose grid cannot be moved."""
    qtype = qtypes.of(scheme.qtype)
    if not qtype.can_rescale:
        able = ", ".join(name for name in qtypes.names() if qtypes.of(name).can_rescale)
        raise UnsupportedError(f"hqq solves for scales and zero points, which {scheme} does not allow; it supports {able}")
    grid = solve(W, qtype.fit(W, scheme), scheme, options)
    return qtype.pack(grid.encode(W), grid, scheme)


class Hqq(Pass[Options]):
    """Moves scales and zero points to suit the bulk of the weights."""

    name = "hqq"
    options_type = Options
    needs_grid = True  # whose scales it moves

    @override
    def needs(self, options: Options) -> frozenset[str]:
        return frozenset()

    @override
    def run(self, layer: Layer, stats: Mapping[str, Stats], options: Options = Options()) -> Report:
        """Quantize every tensor of ``layer.schemes``; ``stats`` are not used."""
        return Report(tuple(runs.code(layer, name, partial(quantize, options=options)) for name in layer.schemes))


PASS = Hqq()
