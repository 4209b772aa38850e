"""SmoothQuant: move the outliers of a linear's inputs into its weights, so that both can be 8-bit integers.

Xiao, Lin, Seznec, Wu, Demouth, Han: "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models",
arXiv 2211.10438, eq. 4. For the linears W that share a tap with inputs x::

    s_j = max|x_j|^α / max|W_:,j|^(1−α)
    W   ← W·diag(s),  x ← x/s                         folded into the norm or linear that makes x

α is the recipe's, or each tap's own: ``alpha: auto`` takes the α of 0 (s = 1), 0.1, 0.15 … 0.9 with the smallest expected output error::

    tr(E·H·Eᵀ) + E_t[Δ_t²]/12 · ‖W·diag(s)‖²          E = W − Q(W·diag(s))·diag(1/s),  Δ_t the step of the inputs' integers at token t

The second term is that of independent rounding errors. A static scale (``int8-tensor``) is known: Δ = max_j(max|x_j|/s_j)/127.
A scale for each token depends on which channels are large together, which the statistics only bound; we take the 6-norm of the channels,
each with the largest sixth moment r²·a⁴ that its mean square r² and largest magnitude a allow: E_t[max_j x_tj²] ≈ (Σ_j r_j²·a_j⁴)^(1/3).
On the pico model that is two to four times too large, by about the same factor for all α: on every tap behind a norm, and on o_proj's, the
α found costs at most 3 % more than the best found by running the inputs themselves. Behind the product of two outputs (up → down) it may
not notice that only few tokens are large, where leaving the basis is best. The paper folds into norms only; with linears too (v → o with
grouped-query heads, up → down) the KL divergence of the pico model falls from 0.0017 to 0.0015, so ``linears`` is on by default.

The pass chooses no codes: rtn or gptq follow. Time for a tap: 18 roundings and products of [rows, in]·[in, in].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from quantcli.errors import RecipeError, about
from quantcli.passes import Pass
from quantcli.passes.shared import basis, runs
from quantcli.tensors import Layer, Report, Scheme, Stats, TensorReport, ordered_sum

ALPHAS = tuple(i / 20 for i in range(2, 19))
"""What ``alpha: auto`` tries besides leaving the basis as it is."""

AUTO = "auto"


@dataclass(frozen=True, slots=True)
class Options:
    """``alpha``: share of the outliers that the weights take, 0 … 1, or "auto". ``linears``: fold scales into linears too (v → o,
    up → down)."""

    alpha: float | str = AUTO
    linears: bool = True

    def __post_init__(self) -> None:
        if self.alpha != AUTO and not (isinstance(self.alpha, (int, float)) and 0 <= self.alpha <= 1):
            raise RecipeError(f"smoothquant: alpha is a share, 0 to 1, or {AUTO}, not {self.alpha!r}")


def input_scales(absmax: Tensor, largest: Tensor, alpha: float) -> Tensor:
    """s [in] from the largest magnitudes of inputs and of weights' columns, [in] each; 1 where either is zero throughout."""
    s = absmax.pow(alpha) / largest.pow(1 - alpha)
    return torch.where((absmax > 0) & (largest > 0), s, torch.ones_like(s))


def step_squared(stats: Stats, s: Tensor, act: str) -> Tensor:
    """A number, float64: E_t[Δ_t²] of inputs over ``s`` [in] that an engine quantizes as ``act``; 0 where they do not become integers."""
    if not act.startswith("int8"):
        return torch.zeros((), dtype=torch.float64, device=s.device)
    largest = (stats.absmax / s).square().double()
    if act.endswith("-tensor"):
        return largest.max() / 127**2
    return (stats.importance / s.square() * largest.square()).sum() ** (1 / 3) / 127.5**2


def expected_error(Ws: Mapping[Scheme, list[Tensor]], s: Tensor, stats: Stats) -> Tensor:
    """A number, float64: the mean over tokens of the output error of one tap, weights ``Ws`` [out, in] float32 by scheme and inputs
    rounded in basis ``s``."""
    assert stats.H is not None
    total = basis.rounding_error(Ws, s, stats.importance, stats.H)
    for scheme, weights in Ws.items():
        step = step_squared(stats, s, str(scheme.get("act", "")))
        for W in weights:
            total += step / 12 * ordered_sum((W * s).square())
    return total


def search(reads: Sequence[basis.Read], absmax: Tensor, largest: Tensor) -> tuple[float, Tensor]:
    """The α with the smallest expected error over the taps ``reads`` and its scales; 0 and ones where no α does better than the basis as
    it is."""

    def error(s: Tensor) -> Tensor:
        return torch.stack([read.share * expected_error(read.Ws, s, read.stats) for read in reads]).sum()

    candidates = [(0.0, torch.ones_like(absmax)), *((alpha, input_scales(absmax, largest, alpha)) for alpha in ALPHAS)]
    errors = torch.stack([error(s) for _, s in candidates]).tolist()  # a GPU is waited for once
    return candidates[min(range(len(errors)), key=errors.__getitem__)]


class SmoothQuant(Pass[Options]):
    """Moves outliers of the inputs into the weights; chooses no codes."""

    name = "smoothquant"
    options_type = Options
    changes_basis = True
    chooses_codes = False

    @override
    def needs(self, options: Options) -> frozenset[str]:
        return frozenset({"H", "absmax"})

    @override
    def run(self, layer: Layer, stats: Mapping[str, Stats], options: Options = Options()) -> Report:
        """Change the basis of every tap of ``layer.absorbers``, behind linears only with ``options.linears``. Quantizes nothing."""
        reports = []
        settings: dict[str, dict[str, float]] = {}
        for tap, names in runs.by_tap(layer, stats).items():
            notes = basis.notes(layer, tap, "smoothquant")
            absorber = layer.absorbers.get(tap)
            if absorber and tap not in settings and (options.linears or layer.tensors[absorber.names[0]].ndim == 1):
                with about(tap):
                    alpha, s = scales(layer, tap, stats, options.alpha)
                settings |= {each: {"smoothquant_alpha": alpha} for each in absorber.taps(tap)}
                if bool((s != 1).any()):
                    basis.fold(layer, tap, s)
            reports += [TensorReport(name, 0.0, notes, settings=settings.get(tap, {})) for name in names]
        return Report(tuple(reports))


PASS = SmoothQuant()


def scales(layer: Layer, tap: str, stats: Mapping[str, Stats], alpha: float | str) -> tuple[float, Tensor]:
    """α and s [in] of ``tap``, and of the taps that share its absorber."""
    absorber, reads = layer.absorbers[tap], basis.reads(layer, tap, stats)
    names = [name for each in absorber.taps(tap) for name in basis.to_quantize(layer, each)]
    absmax = basis.shared(torch.stack([read.stats.absmax for read in reads]).amax(0), absorber, "amax")
    columns = torch.stack([layer.tensors[name].abs().amax(0).float() for name in names]).amax(0)
    largest = basis.shared(columns, absorber, "amax")
    if alpha != AUTO:
        return float(alpha), input_scales(absmax, largest, float(alpha))
    if any(read.stats.H is None for read in reads):
        raise RecipeError(f"{names[0]}: alpha: auto needs the Hessian, and these statistics were gathered with --no-hessian")
    return search(reads, absmax, largest)
