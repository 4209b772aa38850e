"""What the calibrated passes learn from: token windows, or a file of statistics that is checked against plan and recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from quantcli import outliers, overlap
from quantcli.errors import RecipeError, about
from quantcli.outliers import Protected
from quantcli.plan import Plan
from quantcli.recipe import Recipe
from quantcli.stats_file import StatsFile

if TYPE_CHECKING:
    from quantcli.forward import Forward


@dataclass(frozen=True, slots=True)
class Calibrated:
    """What the calibrated passes learn from: token windows to run through the model, or statistics gathered before.

    ``windows``: [n, seq_len] int64; ``stats``: tap → Stats; exactly one of them. ``dataset_sha256`` is of the token ids.
    """

    dataset_sha256: str
    windows: Tensor | None = None
    stats: StatsFile | None = None

    @property
    def kind(self) -> str:
        """What it is: "windows", run behind quantized layers, or "statistics", gathered before on the source."""
        return "statistics" if self.stats is not None else "windows"

    def provenance(self) -> dict[str, str]:
        """What an output says of the text: ``dataset_sha256``, ``dataset_sketch`` by which another text is compared with
        it, and ``calibrated_by``: :attr:`kind`."""
        sketch = overlap.sketch(self.windows) if self.windows is not None else self.stats and self.stats.dataset_sketch
        return {"dataset_sha256": self.dataset_sha256, "calibrated_by": self.kind} | ({"dataset_sketch": sketch} if sketch else {})


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


def checked(plan: Plan, calibrate: Callable[[], Calibrated] | None) -> Calibrated:
    """What the passes learn from; :class:`RecipeError` where there is none, or statistics do not fit."""
    if calibrate is None:
        raise RecipeError(f"recipe '{plan.recipe.name}' needs calibration data; give a dataset or --stats")
    data = calibrate()
    if data.stats is not None:
        check_stats(plan, data.stats)
        check_moe(plan.recipe, data.stats)
    return data


def protected_by(plan: Plan, data: Calibrated, forward: Forward | None) -> list[Protected]:
    """What the recipe's ``protect_outliers`` protects: by statistics gathered before, else by a walk of the windows through the source."""
    assert plan.recipe.protect_outliers is not None
    n_weights: dict[str, int] = {}
    for tensor in plan.tensors:
        if tensor.is_solved and tensor.tap is not None:
            n_weights[tensor.tap] = n_weights.get(tensor.tap, 0) + tensor.source.n_elements
    if data.stats is not None:
        figures = {tap: outliers.figures_of(data.stats.diagonals(tap)) for tap in n_weights}
    else:
        from quantcli.measuring import figures_by_tap

        assert forward is not None
        assert data.windows is not None
        figures = {tap: f for tap, f in figures_by_tap(forward, data.windows).items() if tap in n_weights}
    return outliers.choose(plan.recipe.protect_outliers, figures, n_weights)
