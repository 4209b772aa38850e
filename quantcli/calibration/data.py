"""Calibration data: token windows, statistics or an importance matrix, checked against plan and recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor

from quantcli import formats
from quantcli.errors import RecipeError, about
from quantcli.experts import expert_of
from quantcli.importance import Importance, ImportanceSource
from quantcli.planning.plan import Plan
from quantcli.recipe import Recipe
from quantcli.statistics import outliers
from quantcli.statistics.outliers import Protected
from quantcli.statistics.stats_file import StatsFile
from quantcli.text import overlap, texts
from quantcli.text.documents import Rows

if TYPE_CHECKING:
    from quantcli.forward import Forward


@dataclass(frozen=True, slots=True)
class Windows:
    """Token windows, ``ids``: [n, seq_len] int64, that are run through the model behind the layers already quantized; ``held_out``:
    [k, T] int64, others that follow them only to measure errors on, None where there are none; ``rows``: of the datasets that they were
    cut from."""

    ids: Tensor
    held_out: Tensor | None = None
    rows: tuple[Rows, ...] = ()

    @property
    def dataset_sha256(self) -> str:
        return texts.sha256(self.ids)


Data = Windows | StatsFile | ImportanceSource
"""What a run learns from: token windows, statistics gathered before on the source, or an importance matrix for plain rounding."""


@dataclass(frozen=True, slots=True)
class Learned:
    """Data that was checked against a plan: exactly one of the three, or ``importance`` beside nothing else.

    ``windows`` and ``stats`` calibrate the recipe's passes; ``importance`` weighs the rounding of a recipe whose passes read nothing.
    """

    windows: Windows | None = None
    stats: StatsFile | None = None
    importance: Importance | None = None

    @property
    def kind(self) -> str | None:
        """What calibrated: "windows", run behind quantized layers, or "statistics", gathered before on the source."""
        if self.stats is not None:
            return "statistics"
        return None if self.windows is None else "windows"

    @property
    def dataset_sha256(self) -> str | None:
        """Of the token ids; None where nothing was calibrated."""
        known = self.stats or self.windows
        return None if known is None else known.dataset_sha256

    @property
    def fingerprint(self) -> str | None:
        """sha256 of all that the run learns from; None where that is nothing."""
        if self.windows is not None:
            return self.windows.dataset_sha256
        if self.stats is not None:
            return self.stats.fingerprint()
        return None if self.importance is None else self.importance.fingerprint()

    def provenance(self) -> dict[str, str]:
        """What an output says of the text: ``dataset_sha256``, ``dataset_sketch`` by which another text is compared with
        it, and ``calibrated_by``: :attr:`kind`."""
        if self.dataset_sha256 is None or self.kind is None:
            return {}
        sketch = overlap.sketch(self.windows.ids) if self.windows is not None else self.stats and self.stats.dataset_sketch
        return {"dataset_sha256": self.dataset_sha256, "calibrated_by": self.kind} | ({"dataset_sketch": sketch} if sketch else {})


def is_importance(data: Data | Callable[[], Data] | None, recipe: Recipe) -> TypeGuard[ImportanceSource]:
    """Whether ``data`` weighs the rounding of ``recipe`` rather than calibrate its passes: an importance matrix always, statistics where no
    pass reads any and the format's types are rounded by importance."""
    if data is None or callable(data) or isinstance(data, Windows):
        return False
    return not isinstance(data, StatsFile) or (not recipe.is_calibrated and formats.of(recipe.format).has_mixes)


def weighed(plan: Plan, data: ImportanceSource) -> Learned:
    """The importance that ``data`` gives the weights of ``plan``; :class:`RecipeError` where passes would have to read it."""
    if plan.recipe.needs:
        raise RecipeError("an importance matrix weighs plain rounding; this recipe's passes learn from --dataset or --stats: leave one out")
    schemes = {t.name: t.scheme for t in plan.tensors if t.scheme is not None}
    return Learned(importance=plan.layout.importance(data, plan.source, schemes))


def check_stats(plan: Plan, stats: StatsFile) -> None:
    """Raise :class:`RecipeError` where statistics are missing or do not fit, before any work is done."""
    if "dXXT" in plan.recipe.needs:
        raise RecipeError(
            f"{stats.path}: asymmetric calibration compares what a layer reads with what it read before quantization, which no statistics "
            "gathered beforehand can tell; give --dataset in place of --stats, or leave gptaq_alpha out"
        )
    for tensor in plan.tensors:
        if tensor.is_solved:
            assert tensor.tap is not None
            with about(tensor.name):
                stats.check_tap(tensor.tap, tensor.source.shape[-1], needs=plan.recipe.needs)
    widths = {tap: width for layer in plan.layers for one in layer.caches for tap, width in one.cache.widths.items()}
    for tap, width in widths.items():
        stats.check_tap(tap, width, needs=plan.recipe.cache_needs)
    counted = plan.recipe.needs | (plan.recipe.cache_needs if widths else frozenset())
    if plan.recipe.changes_basis and "histogram" in counted:
        raise RecipeError(
            f"{stats.path}: counts the magnitudes of all inputs of a tap together, and {plan.recipe.passes[0].name} scales each for "
            "itself; take input_range minmax, or give --dataset in place of --stats"
        )


def check_moe(recipe: Recipe, stats: StatsFile) -> None:
    """Raise :class:`RecipeError` when experts were measured on other tokens than the recipe says."""
    measured, wanted = stats.metadata.get("moe"), recipe.calibration.moe
    if measured is not None and measured != wanted:
        raise RecipeError(
            f"{stats.path}: experts were measured with moe: {measured}, the recipe says {wanted}; run `quantcli calibrate --moe {wanted}`, "
            f"or say --moe {measured}"
        )


def checked(plan: Plan, data: Data | Callable[[], Data] | None) -> Learned:
    """What the passes learn from; :class:`RecipeError` where there is none, or statistics do not fit."""
    if data is None:
        raise RecipeError(f"recipe '{plan.recipe.name}' needs calibration data; give a dataset or --stats")
    if callable(data):
        data = data()
    if isinstance(data, Windows):
        return Learned(windows=data)
    if not isinstance(data, StatsFile):
        return weighed(plan, data)
    check_stats(plan, data)
    check_moe(plan.recipe, data)
    return Learned(stats=data)


def too_little(plan: Plan, learned: Learned) -> str:
    """A warning where a tap of ``plan`` has more inputs than it was given tokens; empty otherwise.

    Experts are not looked at: how many tokens reach them is the router's choice, and told of each (``min_tokens``).
    """
    widths = {t.tap: t.source.shape[-1] for t in plan.tensors if t.is_solved and t.tap and not expert_of(t.tap)}
    known = learned.stats
    n_tokens = {tap: known.n_tokens(tap) if known is not None and tap in known else 0 for tap in widths}
    if learned.windows is not None:
        n_tokens = dict.fromkeys(widths, learned.windows.ids.numel())
    return few_tokens(widths, n_tokens)


def few_tokens(widths: Mapping[str, int], n_tokens: Mapping[str, int]) -> str:
    """The same of taps by their ``widths`` and by how many tokens each was given."""
    short = [tap for tap, width in widths.items() if 0 < n_tokens[tap] < width]
    if not short:
        return ""
    worst = min(short, key=lambda tap: n_tokens[tap] / widths[tap])
    return (
        f"{n_tokens[worst]} calibration tokens are fewer than the {widths[worst]} inputs of {worst}: what is learned of them holds for "
        "this text alone, and may be worse than plain rounding on other text; raise --samples or --seq-len, or give more text"
    )


def protected_by(plan: Plan, data: Learned, forward: Forward | None) -> list[Protected]:
    """What the recipe's ``protect_outliers`` protects: by statistics gathered before, else by a walk of the windows through the source."""
    assert plan.recipe.protect_outliers is not None
    n_weights: dict[str, int] = {}
    for tensor in plan.tensors:
        if tensor.is_solved and tensor.tap is not None:
            n_weights[tensor.tap] = n_weights.get(tensor.tap, 0) + tensor.source.n_elements
    if data.stats is not None:
        figures = {tap: outliers.figures_of(data.stats.diagonals(tap)) for tap in n_weights}
    else:
        from quantcli.calibration.measuring import figures_by_tap

        assert forward is not None
        assert data.windows is not None
        figures = {tap: f for tap, f in figures_by_tap(forward, data.windows.ids).items() if tap in n_weights}
    return outliers.choose(plan.recipe.protect_outliers, figures, n_weights)
