"""GPTQ: round a layer's weights column by column and compensate each error in the columns not yet rounded.

Frantar, Ashkboos, Hoefler, Alistarh: "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
arXiv 2210.17323, algorithm 1. With H = mean of x·xᵀ over the inputs of a tap and H⁻¹ = Uᵀ·U, U upper triangular, for each column j:

    q_j = encode(w_j)
    e_j = (w_j − decode(q_j)) / U_jj
    W_:,k ← W_:,k − e_j · U_jk   for k > j                                        (eq. 3, in Cholesky form)

A chunk of columns is solved by one kernel (:func:`quantcli.ops.gptq_chunk`); the rest of the matrix gets its error in one product.

Where we differ:

- U comes from one Cholesky factor of H taken backwards, from the last column solved to the first (H = R·Rᵀ, R upper, U = R⁻¹): half the
  work of inverting H, and no explicit inverse whose rounding must be repaired.
- The grid is fitted once, to the weights as they are, minimizing Σ_j H_jj·(w_j − ŵ_j)² ("static groups"). So columns can be solved in
  order of falling H_jj while groups stay contiguous, and the engine needs no ``g_idx``. Any qtype will do: affine integers, k-quants.
- Types that take runs of weights from a code book (IQ2, IQ3) hand errors on by super-blocks (:mod:`quantcli.passes.shared.block_ldlq`).
- A scheme with ``desc_act`` forms its groups along the solving order instead and stores each input's group (``g_idx``).
- An input that was always zero in calibration has a zero row in H: it takes no part in the compensation, and its weights are rounded to
  nearest rather than set to zero, because they may matter on other text. A tap that read nothing but zeros is rounded to nearest whole.

Asymmetric calibration (``gptaq_alpha`` above 0): Li, Yin, Lee, Xiao, Panda, "GPTAQ: Efficient Finetuning-Free Quantization for
Asymmetric Calibration", arXiv 2504.02692. The layers before have been quantized, so a tap reads x where the original model read x₀, and
Ŵ·x should equal W·x₀. Once a column is quantized, the later ones also compensate its share w_j·(x₀ − x)_j of the difference::

    P = α · striu(M·Uᵀ)·U,  M = mean of (x₀ − x)·xᵀ,  striu: what is above the diagonal
    W_:,k ← W_:,k − e_j · U_jk + w_j · P_jk   for k > j,  w_j as it is when its turn comes

That is GPTQ with other inputs, and so the same kernel: the w_j are the columns of (W − E·striu(U))·(I − P)⁻¹, so the solver is given
W·T and diag(U) + striu(U)·T with T = (I − P)⁻¹, which is upper triangular with ones on its diagonal. α = 1 is the equation as derived,
0.25 what its authors run: M is of the calibration text alone, and all of it overfits.

Then codes and scales move by coordinate descent in the norm of the damped H (:mod:`quantcli.passes.shared.descent`), ``sweeps`` times:
each was chosen before the errors of the later columns were known.

Time O(out·in²) + O(in³/3) for each tap, memory 3·in² + 3·out·in float32; asymmetric 2·in³ more and a second walk of the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from typing_extensions import override

from quantcli import ops, qtypes
from quantcli.errors import NumericsError, RecipeError, about
from quantcli.passes import Pass
from quantcli.passes.shared import descent, runs
from quantcli.passes.shared.block_ldlq import solve_blocks
from quantcli.passes.shared.fused import fused_parts
from quantcli.tensors import Grid, Layer, QuantizedTensor, Report, Scheme, Stats, TensorReport

DAMP_LADDER: tuple[float, ...] = (1.0, 2.0, 5.0, 10.0, 30.0, 100.0)
"""Multiples of ``damp_ratio`` that are tried in turn when H is not positive definite."""

PANEL = 128
"""Columns of H that are factorized at once."""


@dataclass(frozen=True, slots=True)
class Options:
    """``damp_ratio``: λ added to the diagonal of H, as a share of its mean. ``act_order``: solve columns in order of falling H_jj
    rather than from left to right. ``chunk``: columns solved between two updates of the rest; it changes the speed and nothing else.
    ``gptaq_alpha``: the share α of asymmetric calibration, 0 for none. ``sweeps``: of coordinate descent after the solve, 0 for none."""

    damp_ratio: float = 0.01
    act_order: bool = True
    chunk: int = 128
    gptaq_alpha: float = 0.0
    sweeps: int = 3

    def __post_init__(self) -> None:
        if not 0 < self.damp_ratio <= 1:
            raise RecipeError(f"gptq: damp_ratio is a share of the mean of diag(H), in (0, 1], not {self.damp_ratio}")
        if self.chunk < 1:
            raise RecipeError(f"gptq: chunk is a number of columns, not {self.chunk}")
        if not 0 <= self.gptaq_alpha <= 1:
            raise RecipeError(f"gptq: gptaq_alpha is a share in [0, 1], not {self.gptaq_alpha}")
        if not 0 <= self.sweeps <= 100:
            raise RecipeError(f"gptq: sweeps is a number of descents from 0 to 100, not {self.sweeps}")


@dataclass(frozen=True, slots=True)
class Factor:
    """The solving order of a tap and what its solver needs.

    ``order``: [in] int64, column solved at each step; ``U``: [in, in] float32 upper factor of H⁻¹ in that order;
    ``damp_ratio``: the one that worked; ``n_dead``: inputs that were always zero in calibration; ``T``: [in, in] float32 upper, by which
    asymmetric calibration multiplies the weights in that order before they are solved with its own ``U``, and ``M``: [in, in], its α·M in
    the inputs' own order.
    """

    order: Tensor
    U: Tensor
    damp_ratio: float
    n_dead: int
    T: Tensor | None = None
    M: Tensor | None = None


def upper_factor(H: Tensor, order: Tensor, damp: float) -> Tensor | None:
    """U, upper triangular with (H + damp·I)⁻¹ = Uᵀ·U in ``order``, for ``H``: [in, in]; None when that is not positive definite.

    Memory beside H: two matrices of its size at a time.
    """
    backwards = order.flip(0)
    A = H.index_select(0, backwards).index_select(1, backwards)
    A.diagonal().add_(damp)
    if not cholesky_(A):
        return None
    L_inv = torch.eye(len(H), dtype=H.dtype, device=H.device)
    torch.linalg.solve_triangular(A, L_inv, upper=False, out=L_inv)
    del A
    return L_inv.flip(0, 1) if bool(torch.isfinite(L_inv).all()) else None


def cholesky_(A: Tensor) -> bool:
    """Put L, lower with A = L·Lᵀ, into the lower triangle of ``A`` [n, n]; False when A is not positive definite.

    By panels: LAPACK's own factor of a larger matrix rounds differently with another number of threads, float32 products do not.
    """
    for start in range(0, len(A), PANEL):
        now = slice(start, start + PANEL)
        A[start:, now].addmm_(A[start:, :start], A[now, :start].T, alpha=-1)
        L, info = torch.linalg.cholesky_ex(A[now, now])
        if info.item():
            return False
        A[now, now] = L
        A[start + PANEL :, now] = torch.linalg.solve_triangular(L.T, A[start + PANEL :, now], upper=True, left=False)
    return True


def factorize(H: Tensor, *, damp_ratio: float, act_order: bool = True) -> Factor:
    """Factor of one tap from ``H``: [in, in] float32, mean of x·xᵀ.

    Damping is raised along :data:`DAMP_LADDER` when the factorization fails, each value being tried in float64 too; when the last one
    fails, or H has NaN or Inf, it is a :class:`NumericsError`.
    """
    diagonal = H.diagonal()
    if not bool(torch.isfinite(diagonal).all()):
        raise NumericsError("the Hessian has NaN or Inf; the calibration text drives this model's activations out of range")
    mean = float(diagonal.double().mean())
    if mean == 0:
        raise NumericsError("the Hessian is zero: the inputs of this tap were zero on every token of the calibration text")
    order = torch.arange(len(H), device=H.device)
    if act_order:
        order = torch.argsort(diagonal, descending=True, stable=True)
    for step in DAMP_LADDER:
        damp_used = step * damp_ratio
        for dtype in (torch.float32, torch.float64):
            if (U := upper_factor(H.to(dtype), order, damp_used * mean)) is not None:
                return Factor(order, U.float(), damp_used, int((diagonal == 0).sum()))
    raise NumericsError(f"the Hessian is not positive definite even with damp_ratio {damp_used:g}; calibrate with more or other text")


def asymmetric(factor: Factor, dXXT: Tensor, alpha: float) -> Factor:
    """``factor`` for asymmetric calibration with ``dXXT``: [in, in], mean of (x₀ − x)·xᵀ in the inputs' own order.

    :class:`NumericsError` when (I − P)⁻¹ is beyond float32: x has little to do with x₀.
    """
    U, M = factor.U, dXXT.to(factor.U.dtype)[factor.order][:, factor.order]
    P = alpha * (M @ U.T).triu_(1) @ U
    eye = torch.eye(len(U), dtype=U.dtype, device=U.device)
    T = torch.linalg.solve_triangular(eye - P, eye, upper=True, unitriangular=True)
    if not bool(torch.isfinite(T).all()):
        raise NumericsError(f"asymmetric calibration diverges with gptaq_alpha {alpha:g}; use a smaller one, or 0")
    return replace(factor, U=U.diagonal().diag() + U.triu(1) @ T, T=T, M=alpha * dXXT.to(U.dtype))


def solve(W: Tensor, grid: Grid, factor: Factor, *, chunk: int = 128) -> Tensor:
    """Codes [out, in] (int8, or uint8 where ``grid.hi`` > 127) of ``W``: [out, in] float32 by GPTQ on ``grid``.

    The groups of ``grid`` are those of W's own column order. ``chunk`` changes the speed, and the result by rounding only.
    """
    W = W[:, factor.order]  # a copy: it takes the errors
    W = W if factor.T is None else W @ factor.T
    group = (factor.order // grid.group_size).int()
    codes = torch.empty(W.shape, dtype=torch.uint8 if grid.hi > 127 else torch.int8, device=W.device)
    for start in range(0, W.shape[1], chunk):
        now = slice(start, min(start + chunk, W.shape[1]))
        U = factor.U[now, now].contiguous()
        part, E = ops.gptq_chunk(W[:, now].contiguous(), U, grid.scale, grid.offset, group[now].contiguous(), grid.lo, grid.hi, grid.book)
        codes[:, now] = part
        W[:, now.stop :].addmm_(E, factor.U[now, now.stop :], alpha=-1)
    out = torch.empty_like(codes)
    out[:, factor.order] = codes
    return out


def quantize(
    W: Tensor,
    scheme: Scheme,
    H: Tensor,
    factor: Factor,
    options: Options = Options(),
    *,
    fused: Mapping[str, Tensor] | None = None,
) -> QuantizedTensor:
    """One weight matrix ``W``: [out, in] float32 with its tap's ``H`` and ``factor``; ``fused``: parts it shares with others of the tap.

    The factor of a type that codes runs of weights is one in the inputs' own order (``act_order=False``).
    """
    qtype = qtypes.of(scheme.qtype)
    H = damped(H, factor)
    if qtype.run > 1:
        codes, grid = solve_blocks(W.clone() if factor.T is None else W @ factor.T, qtype, scheme, H.diagonal().contiguous(), factor.U)
        return qtype.pack(*_descended(W, codes, grid, scheme, H, factor, options), scheme)
    if not scheme.get("desc_act", False):
        grid = qtype.fit(W, scheme, H.diagonal().contiguous(), fused=fused)
        return qtype.pack(*_solved(W, grid, scheme, H, factor, options), scheme)
    order = factor.order
    in_order = replace(factor, order=torch.arange(len(order), device=W.device), M=None if factor.M is None else factor.M[order][:, order])
    W, H = W[:, order].contiguous(), H[order][:, order]
    grid = qtype.fit(W, scheme, H.diagonal().contiguous())
    codes, grid = _solved(W, grid, scheme, H, in_order, options)
    step = torch.argsort(order)  # input → when it was solved
    g_idx = (step // grid.group_size).int()
    return qtype.pack(codes[:, step].contiguous(), replace(grid, parts={**grid.parts, "g_idx": g_idx}), scheme)


def damped(H: Tensor, factor: Factor) -> Tensor:
    """A copy of ``H`` [in, in] with the diagonal that ``factor`` was made with."""
    H = H.clone()
    H.diagonal().add_(factor.damp_ratio * H.diagonal().mean())
    return H


def _solved(W: Tensor, grid: Grid, scheme: Scheme, H: Tensor, factor: Factor, options: Options) -> tuple[Tensor, Grid]:
    """Codes [out, in] and the grid they belong to, ``H`` damped."""
    return _descended(W, solve(W, grid, factor, chunk=options.chunk), grid, scheme, H, factor, options)


def _descended(W: Tensor, codes: Tensor, grid: Grid, scheme: Scheme, H: Tensor, factor: Factor, options: Options) -> tuple[Tensor, Grid]:
    missing = None if factor.M is None else W @ factor.M
    return descent.descend(W, codes, grid, H, scheme, sweeps=options.sweeps, missing=missing)


def nearest(W: Tensor, scheme: Scheme, *, fused: Mapping[str, Tensor] | None = None) -> QuantizedTensor:
    """One weight matrix ``W``: [out, in] float32 whose inputs tell nothing, rounded to nearest by its weights alone."""
    qtype = qtypes.of(scheme.qtype)
    alike = torch.ones(W.shape[1], device=W.device) if qtype.needs_importance else None
    return qtype.encode(W, scheme, alike, fused=fused)


class Gptq(Pass[Options]):
    """Rounds column by column, with feedback."""

    name = "gptq"
    options_type = Options

    @override
    def needs(self, options: Options) -> frozenset[str]:
        return frozenset({"H", "dXXT"} if options.gptaq_alpha else {"H"})

    @override
    def run(self, layer: Layer, stats: Mapping[str, Stats], options: Options = Options()) -> Report:
        """Quantize every tensor of ``layer.schemes``, those of one tap with one factorization.

        ``layer.taps`` names the tap of each; a tap without statistics is a :class:`RecipeError`.
        """
        by_tap = runs.by_tap(layer, stats).items()
        return Report(tuple(report for tap, members in by_tap for report in _run_tap(layer, tap, members, stats[tap], options)))


PASS = Gptq()


def _run_tap(layer: Layer, tap: str, members: Sequence[str], stats: Stats, options: Options) -> list[TensorReport]:
    H = runs.hessian(tap, stats, layer.tensors[members[0]].device, "gptq")
    shared = fused_parts(layer)
    if not bool(H.any()):
        return [runs.code(layer, name, partial(nearest, fused=shared.get(name)), notes=(runs.silent(stats),)) for name in members]
    one_by_one = [name for name in members if qtypes.of(layer.schemes[name].qtype).run == 1]
    in_runs = [name for name in members if name not in one_by_one]
    reports = []
    for names, act_order in ((one_by_one, options.act_order), (in_runs, False)):
        if names:
            factor, notes = _factor(tap, H, stats, replace(options, act_order=act_order))
            code = partial(quantize, H=H, factor=factor, options=options)
            reports += [runs.code(layer, name, partial(code, fused=shared.get(name)), H, notes=notes) for name in names]
    return reports


def _factor(tap: str, H: Tensor, stats: Stats, options: Options) -> tuple[Factor, tuple[str, ...]]:
    """The factor of a tap, and what to note of it."""
    with about(tap):
        factor = factorize(H, damp_ratio=options.damp_ratio, act_order=options.act_order)
    notes = []
    if factor.damp_ratio != options.damp_ratio:
        notes.append(f"damping raised to {factor.damp_ratio:g}: H was not positive definite at {options.damp_ratio:g}")
    if factor.n_dead:
        notes.append(f"{factor.n_dead} of {len(H)} inputs were never active: rounded to nearest")
    if options.gptaq_alpha:
        factor, note = _asymmetric(tap, factor, stats, options)
        notes += note
    return factor, tuple(notes)


def _asymmetric(tap: str, factor: Factor, stats: Stats, options: Options) -> tuple[Factor, list[str]]:
    """``factor`` for asymmetric calibration, or unchanged and with a note where ``stats`` has no inputs of the original model."""
    if stats.dXXT is None:
        return factor, ["plain GPTQ: its tokens are the router's choice, which is not the same before and after quantization"]
    with about(tap):
        return asymmetric(factor, stats.dXXT.to(factor.U.device), options.gptaq_alpha), []
