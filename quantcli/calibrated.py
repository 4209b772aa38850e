"""What the calibrated passes learn from: token windows, or a file of statistics that is checked against plan and recipe."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from quantcli import overlap
from quantcli.errors import RecipeError, about
from quantcli.plan import Plan
from quantcli.recipe import Recipe
from quantcli.stats_file import StatsFile


@dataclass(frozen=True, slots=True)
class Calibrated:
    """What the calibrated passes learn from: token windows to run through the model, or statistics gathered before.

    ``windows``: [n, seq_len] int64; ``stats``: tap → Stats; exactly one of them. ``dataset_sha256`` is of the token ids.
    """

    dataset_sha256: str
    windows: Tensor | None = None
    stats: StatsFile | None = None

    def provenance(self) -> dict[str, str]:
        """What an output says of the text: ``dataset_sha256``, ``dataset_sketch`` by which another text is compared with
        it, and ``calibrated_by`` "windows", run behind quantized layers, or "statistics", gathered before on the source."""
        sketch = overlap.sketch(self.windows) if self.windows is not None else self.stats and self.stats.dataset_sketch
        how = "statistics" if self.stats is not None else "windows"
        return {"dataset_sha256": self.dataset_sha256, "calibrated_by": how} | ({"dataset_sketch": sketch} if sketch else {})


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


def check_moe(recipe: Recipe, stats: StatsFile) -> None:
    """Raise :class:`RecipeError` when experts were measured on other tokens than the recipe says."""
    measured, wanted = stats.metadata.get("moe"), recipe.calibration.moe
    if measured is not None and measured != wanted:
        raise RecipeError(
            f"{stats.path}: experts were measured with moe: {measured}, the recipe says {wanted}; run `quantcli calibrate --moe {wanted}`, "
            f"or say --moe {measured}"
        )
