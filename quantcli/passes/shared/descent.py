"""Coordinate descent after a solver: codes and stored scales move, one by one, to where the output's error is least.

With D the decoded weights and H the mean of x·xᵀ, a row's error of output is (w − d)·H·(w − d)ᵀ. Written with G = (W − D)·H, each number
that a file stores has a best value while all others stay:

    code j:     the code nearest to d_j + G_j / H_jj
    a factor p  (a scale, a minimum, a super-block's scale) along whose direction v = ∂d/∂p the weights move:
                p + (G·v) / (v·H·v), rounded to what the file can hold, and taken where the error falls:  2·δ·(G·v) − δ²·(v·H·v) > 0

after which G loses δ·v·H. So no step makes the error larger, but for rounding in float32. A sweep goes through the inputs in chunks: the
factors of a chunk, then its codes in one kernel (:func:`quantcli.ops.solve.gptq_chunk` with ``D``), then one product that brings G up to
date. GPTQ chooses each code once, on scales that were fitted before any error flowed; this mends both (Zhang, Hooper, Gholami, Keutzer et
al.'s CDQuant, arXiv 2406.17542, does so for codes).

A sweep costs a product [out, in] · [in, in], twice what GPTQ's own feedback costs, and the memory of three matrices of W's size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantcli import ops, qtypes
from quantcli.qtypes import QType
from quantcli.tensors import Factors, Grid, Scheme

CHUNK = 256
"""Inputs between two products with H: a super-block of the k-quants."""


def descend(
    W: Tensor, codes: Tensor, grid: Grid, H: Tensor, scheme: Scheme, *, sweeps: int, missing: Tensor | None = None
) -> tuple[Tensor, Grid]:
    """``codes`` [out, in] and ``grid`` of ``W`` [out, in] float32 after ``sweeps`` of coordinate descent under ``H`` [in, in], damped as
    the solver's was. ``missing``: [out, in], what G has beside (W − D)·H where the original model read other inputs (GPTAQ)."""
    if not sweeps:
        return codes, grid
    state = _State(W, codes.clone(), grid, H, qtypes.of(scheme.qtype), scheme)
    if missing is not None:
        state.G += missing
    for _ in range(sweeps):
        for name in state.wide():
            state.move_everywhere(name)
        for start in range(0, W.shape[1], state.chunk):
            state.descend_chunk(slice(start, min(start + state.chunk, W.shape[1])))
    return state.codes, state.grid


class _State:
    """What a descent holds: codes, decoded weights D, G, and the factors of the grid."""

    def __init__(self, W: Tensor, codes: Tensor, grid: Grid, H: Tensor, qtype: QType, scheme: Scheme) -> None:
        self.codes, self.grid, self.H, self.qtype, self.scheme = codes, grid, H, qtype, scheme
        self.n = W.shape[1]
        self.D = grid.decode(codes)
        self.G = (W - self.D) @ H
        factors = qtype.factors(grid, scheme)
        self.factors = None if factors is None else _Stored(factors, self.n)
        narrow = [] if self.factors is None else [span for span in self.factors.spans.values() if span <= CHUNK]
        unit = max([grid.group_size if grid.group_size <= CHUNK else 1, *narrow])
        self.chunk = max(1, CHUNK // unit) * unit

    def wide(self) -> list[str]:
        """Factors that serve more inputs than a chunk has."""
        return [] if self.factors is None else [name for name in self.factors.moves if self.factors.spans[name] > self.chunk]

    def move_everywhere(self, name: str) -> None:
        """One step of every value of a wide factor."""
        assert self.factors is not None
        span = self.factors.spans[name]
        for start in range(0, self.n, span):
            now = slice(start, start + span)
            v = self.factors.direction(name, self.codes, self.grid, now)
            if (step := self._step(name, v, self.G[:, now], self.H[now, now], start // span)) is not None:
                self.D[:, now] += step
                self.G -= step @ self.H[now]
        self.grid = self.qtype.of_factors(self.grid, self.factors.values, self.scheme)

    def descend_chunk(self, now: slice) -> None:
        """One step of every factor and code of the inputs in ``now``."""
        H = self.H[now, now].contiguous()
        before, G = self.D[:, now].clone(), self.G[:, now].clone()
        if self.factors is not None:
            self._move_factors(now, H, G)
        if self.qtype.run > 1:
            self._choose_runs(now, H, G)
        else:
            self._choose_codes(now, H, G)
        self.G -= (self.D[:, now] - before) @ self.H[now]

    def _choose_runs(self, now: slice, H: Tensor, G: Tensor) -> None:
        """The nearest points of the code book for each run of the inputs in ``now``, where they lower the error."""
        for start in range(now.start, now.stop, self.qtype.run):
            part, here = slice(start, start + self.qtype.run), slice(start - now.start, start - now.start + self.qtype.run)
            block, scale = H[here, here], self.grid.scale[:, start // self.grid.group_size]
            codes = self.qtype.nearest(self.D[:, part] + torch.linalg.solve(block, G[:, here], left=False), block, scale)
            step = scale[:, None] * codes.float() - self.D[:, part]
            takes = 2 * (step * G[:, here]).sum(1) - ((step @ block) * step).sum(1) > 0
            step = torch.where(takes[:, None], step, 0.0)
            self.codes[:, part] = torch.where(takes[:, None], codes, self.codes[:, part])
            self.D[:, part] += step
            G -= step @ H[here]

    def _choose_codes(self, now: slice, H: Tensor, G: Tensor) -> None:
        """The nearest code for each of the inputs in ``now``."""
        grid, D = self.grid, self.D[:, now].contiguous()
        best = H.diagonal()
        group = (torch.arange(now.start, now.stop, device=D.device) // grid.group_size).int()
        U = H.triu(1) / best
        U.diagonal().fill_(1.0)
        codes, _ = ops.gptq_chunk(D + G / best, U, grid.scale, grid.offset, group, grid.lo, grid.hi, grid.book, D=D)
        self.codes[:, now] = codes
        self.D[:, now] = _decoded(codes, grid, group)

    def _move_factors(self, now: slice, H: Tensor, G: Tensor) -> None:
        """Moves of the factors within ``now``, with D and the chunk's own ``G`` kept up to date; the grid follows."""
        assert self.factors is not None
        for name in self.factors.moves:
            span = self.factors.spans[name]
            if span > self.chunk:
                continue
            for start in range(now.start, now.stop, span):
                part, here = slice(start, start + span), slice(start - now.start, start - now.start + span)
                v = self.factors.direction(name, self.codes, self.grid, part)
                if (step := self._step(name, v, G[:, here], H[here, here], start // span)) is not None:
                    self.D[:, part] += step
                    G -= step @ H[here]
        self.grid = self.qtype.of_factors(self.grid, self.factors.values, self.scheme)

    def _step(self, name: str, v: Tensor, G: Tensor, H: Tensor, column: int) -> Tensor | None:
        """How the weights move when the values of ``name`` in ``column`` take their best step along ``v`` [out, k]; None when none does."""
        assert self.factors is not None
        values = self.factors.values[name]
        slope, curvature = (G * v).sum(1), ((v @ H) * v).sum(1)
        old = values[:, column]
        new = self.qtype.stored(name, old + slope / curvature, self.scheme)
        delta = new - old
        takes = 2 * delta * slope - delta.square() * curvature > 0  # False of NaN
        if not bool(takes.any()):
            return None
        values[:, column] = torch.where(takes, new, old)
        return torch.where(takes, delta, 0.0)[:, None] * v


@dataclass(slots=True)
class _Stored:
    """The factors of a grid, with values of their own that may be written to."""

    values: dict[str, Tensor]
    spans: dict[str, int]
    terms: tuple[tuple[float, tuple[str, ...], bool], ...]
    moves: tuple[str, ...]

    def __init__(self, factors: Factors, n: int) -> None:
        self.values = {name: value.clone() for name, value in factors.values.items()}
        self.spans = {name: n // value.shape[1] for name, value in factors.values.items()}
        self.terms, self.moves = factors.terms, factors.moves

    def direction(self, name: str, codes: Tensor, grid: Grid, now: slice) -> Tensor:
        """∂d/∂(factor ``name``) of the inputs in ``now``, which one value of it serves: [out, k] float32."""
        q = codes[:, now].float() if grid.book is None else grid.book[codes[:, now].long()]
        v = torch.zeros_like(q)
        for weight, names, has_code in self.terms:
            if name in names:
                term = weight * q if has_code else torch.full_like(q, weight)
                for other in names:
                    if other != name:
                        term = term * self._spread(other, now)
                v = v + term
        return v

    def _spread(self, name: str, now: slice) -> Tensor:
        """The values of factor ``name`` at the inputs in ``now``: [out, k], or [out, 1] where they share one."""
        span = self.spans[name]
        values = self.values[name][:, now.start // span : (now.stop - 1) // span + 1]
        return values if values.shape[1] == 1 else values.repeat_interleave(span, 1)


def _decoded(codes: Tensor, grid: Grid, group: Tensor) -> Tensor:
    """Weights of a chunk's ``codes`` [out, k], by the same operations as :meth:`Grid.decode`."""
    q = codes.float() if grid.book is None else grid.book[codes.long()]
    W = q * grid.scale[:, group]
    return W if grid.offset is None else W + grid.offset[:, group]
