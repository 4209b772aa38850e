"""Figures of a tap's inputs: outliers, kurtosis, energy, coverage; and what a recipe protects by them.

Of inputs x of a tap, [n_tokens, in], from its Stats alone::

    outlier_channels   channels that reach 6.0, LLM.int8's threshold; outlier_share: of all channels
    kurtosis           mean x⁴ / (mean x²)² over all of them: 3 for a Gaussian, hundreds where few inputs are far beyond the rest
    energy_top1pct     share of Σ x² in the 1 % of channels that have most of it
    absmax_over_rms    the range that one scale must span, relative to the typical input
    coverage           share of channels that were ever anything but zero
    tokens_per_input   tokens for each of the Hessian's rows: below 1 it is singular, below 2 GPTQ gains nothing (docs/log.md)

``protect_outliers`` of a recipe names some of these with a threshold each, and a scheme or ``keep``: taps that reach one of them (fall
short of it, for the last two) get that scheme. With ``share`` no more of the linears' weights do, those furthest beyond first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from quantcli.errors import RecipeError
from quantcli.experts import expert_of
from quantcli.ops.activations import OUTLIER
from quantcli.tensors import KEEP, Scheme, Stats

TOP_SHARE = 0.01
"""The share of channels whose energy ``energy_top1pct`` adds up."""

SHORTFALLS = ("coverage", "tokens_per_input")
"""Figures of which too little is what matters."""


@dataclass(frozen=True, slots=True)
class Figures:
    """Figures of the inputs of one tap, or of several similar ones; ``kurtosis`` is None where an old file lacks the moment."""

    in_features: int
    n_tokens: int
    absmax: float
    rms: float
    absmax_over_rms: float
    kurtosis: float | None
    outlier_channels: int
    outlier_share: float
    energy_top1pct: float
    dead: int
    coverage: float
    tokens_per_input: float


THRESHOLDS = ("outlier_channels", "outlier_share", "kurtosis", "energy_top1pct", "absmax_over_rms", *SHORTFALLS)
"""The figures that a recipe may protect by."""


def figures_of(stats: Stats) -> Figures:
    """The figures of one tap; H is not needed."""
    n = len(stats.importance)
    energy = stats.importance.double().sort(descending=True).values
    total = float(energy.sum())
    rms = math.sqrt(total / n)
    absmax = float(stats.absmax.max())
    dead = int((stats.absmax == 0).sum())
    n_outliers = int((stats.absmax >= OUTLIER).sum())
    fourth = None if stats.fourth is None else float(stats.fourth.double().mean())
    return Figures(
        in_features=n,
        n_tokens=stats.n_tokens,
        absmax=absmax,
        rms=rms,
        absmax_over_rms=absmax / rms if rms else 0.0,
        kurtosis=None if fourth is None else fourth / rms**4 if rms else 0.0,
        outlier_channels=n_outliers,
        outlier_share=n_outliers / n,
        energy_top1pct=float(energy[: math.ceil(TOP_SHARE * n)].sum()) / total if total else 0.0,
        dead=dead,
        coverage=1 - dead / n,
        tokens_per_input=stats.n_tokens / n,
    )


@dataclass(frozen=True, slots=True)
class Protection:
    """A recipe's ``protect_outliers``: ``scheme`` (None: not quantized) for taps beyond one of ``thresholds``, figure → value; at most
    ``share`` of the linears' weights."""

    scheme: Scheme | None
    thresholds: Mapping[str, float] = field(default_factory=dict)
    share: float = 1.0

    @classmethod
    def parse(cls, data: Mapping[str, Any], recipe: str) -> Protection:
        """From a recipe's YAML; :class:`RecipeError` for invalid keys or values."""
        where = f"recipe '{recipe}': protect_outliers"
        known = ("scheme", "share", *THRESHOLDS)
        if unknown := sorted(set(map(str, data)) - set(known)):
            raise RecipeError(f"{where} takes {', '.join(known)}, not '{unknown[0]}'")
        numbers = {key: value for key, value in data.items() if key != "scheme" and value is not None}
        for key, value in numbers.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise RecipeError(f"{where}: {key} is a number above zero, not {value!r}")
        share = float(numbers.pop("share", 1.0))
        if share > 1 or not numbers or "scheme" not in data:
            raise RecipeError(f"{where} needs a scheme (or '{KEEP}'), one or more of {', '.join(THRESHOLDS)}, and a share of at most 1")
        scheme = None if data["scheme"] == KEEP else Scheme.parse(str(data["scheme"]))
        return cls(scheme, {key: float(value) for key, value in numbers.items()}, share)

    def to_dict(self) -> dict[str, Any]:
        """What :meth:`parse` reads back."""
        return {"scheme": KEEP if self.scheme is None else str(self.scheme), "share": self.share, **self.thresholds}

    def excess(self, figures: Figures) -> float:
        """The largest ratio of a figure to its threshold: 1 and more is protected."""
        found = asdict(figures)
        ratios = [0.0]
        for key, threshold in self.thresholds.items():
            value = found[key]
            if value is None:
                raise RecipeError(f"the statistics have no fourth moments, which {key} needs; run `quantcli calibrate` again")
            ratios.append(threshold / max(value, 1e-9) if key in SHORTFALLS else value / threshold)
        return max(ratios)


@dataclass(frozen=True, slots=True)
class Protected:
    """A protected unit: its taps, the largest ratio of a figure to its threshold, and the figures."""

    taps: tuple[str, ...]
    excess: float
    figures: Figures

    def to_dict(self) -> dict[str, Any]:
        return {"taps": list(self.taps), "excess": self.excess, "figures": asdict(self.figures)}


def choose(protection: Protection, figures: Mapping[str, Figures], n_weights: Mapping[str, int]) -> list[Protected]:
    """What ``protection`` protects, largest excess first. ``figures``: of each tap; ``n_weights``: how many weights read it.

    The experts of a layer are one unit, because engines run them as one; the figures of the one with the largest excess count for all.
    """
    units: dict[str, list[str]] = {}
    for tap in figures:
        at = expert_of(tap)
        units.setdefault(at.stack if at else tap, []).append(tap)
    found = []
    for taps in units.values():
        worst = max(taps, key=lambda tap: protection.excess(figures[tap]))
        found.append(Protected(tuple(taps), protection.excess(figures[worst]), figures[worst]))
    budget = protection.share * sum(n_weights[tap] for tap in figures)
    chosen = []
    for unit in sorted(found, key=lambda unit: unit.excess, reverse=True):
        n = sum(n_weights[tap] for tap in unit.taps)
        if unit.excess >= 1 and n <= budget:
            chosen.append(unit)
            budget -= n
    return chosen
