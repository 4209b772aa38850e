"""What a change of basis does to one layer's files: dense tensors it touched are written changed, what must stay stays."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from quantcli import recipe as recipes
from quantcli.calibration.calibrate import calibrate
from quantcli.calibration.data import Windows
from quantcli.formats import open_checkpoint
from quantcli.recipe import Rule
from quantcli.statistics.stats_file import StatsFile
from quantcli.walk import pipeline
from quantcli.walk.evaluate import compare
from quantcli.walk.pipeline import LayerDone
from support.runs import run
from support.tiny_models import TinyLlama

IDS = torch.randint(512, (16, 32), generator=torch.Generator().manual_seed(0))
LAYER = "model.layers.0"


def quantize(folder: Path, target: Path, recipe: recipes.Recipe, stats: StatsFile | None = None) -> list[pipeline.Event]:
    return run(folder, target, recipe, stats or Windows(IDS))


def divergence(target: Path, folder: Path) -> float:
    with open_checkpoint(str(target)) as output, open_checkpoint(str(folder)) as source:
        return compare(output, source, IDS, activations=False).kld_mean


def with_rules(name: str, *rules: tuple[str, str]) -> recipes.Recipe:
    return replace(recipes.load(name), rules=tuple(Rule.parse(*rule) for rule in rules))


def written(target: Path) -> dict[str, Tensor]:
    return load_file(target / "model.safetensors")


@pytest.mark.parametrize("recipe", ["awq-int4", "awq-gptq-int4", "smoothquant-w8a8"])
@pytest.mark.parametrize("options", [{"bias": True, "kv_heads": 1}, {"tied": True, "dtype": "float16"}])
def test_eight_bits_in_the_new_basis_are_nearly_the_model(tiny_llama: TinyLlama, tmp_path: Path, recipe: str, options: dict) -> None:
    """What a fold leaves out would show: a norm that is not divided costs a KL of 0.1 and more."""
    folder = tiny_llama(**options)
    chosen = recipes.load(recipe)
    chosen = replace(chosen, format="compressed-tensors", scheme=chosen.scheme.with_options(bits=8, group_size=32, sym=True, act=""))
    quantize(folder, tmp_path / "out", chosen)
    before, after = load_file(folder / "model.safetensors"), written(tmp_path / "out")
    assert any(not torch.equal(before[name], after[name]) for name in after if name.endswith("norm.weight"))
    assert divergence(tmp_path / "out", folder) < 1e-3


def test_a_dense_linear_that_reads_a_scaled_input_is_scaled_too(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    folder = tiny_llama(layers=1)
    recipe = replace(with_rules("awq-w4a16", (r"gate_proj|up_proj", "keep")), scheme=recipes.Scheme.parse("int8-g32-sym"))
    quantize(folder, tmp_path / "out", recipe)
    before, after = load_file(folder / "model.safetensors"), written(tmp_path / "out")
    names = [f"{LAYER}.mlp.{name}_proj.weight" for name in ("gate", "up")]
    assert all(before[name].dtype == after[name].dtype for name in names)
    assert torch.equal(before[names[0]], after[names[0]])  # no coded linear reads its input, which keeps its basis
    assert not torch.equal(before[names[1]], after[names[1]])  # its rows absorb the scale of down_proj's input
    assert divergence(tmp_path / "out", folder) < 1e-4


def test_statistics_from_a_file_give_the_same_bytes(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    folder = tiny_llama(layers=1)
    with open_checkpoint(str(folder)) as source:
        list(calibrate(source, IDS, tmp_path / "stats.safetensors"))
    stats = StatsFile(tmp_path / "stats.safetensors")
    for name in ("awq-int4", "smoothquant-w8a8"):
        quantize(folder, tmp_path / f"{name}-a", recipes.load(name))
        quantize(folder, tmp_path / f"{name}-b", recipes.load(name), stats)
        a, b = written(tmp_path / f"{name}-a"), written(tmp_path / f"{name}-b")
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_notes_and_settings_of_all_passes_are_recorded(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    events = quantize(tiny_llama(layers=1), tmp_path / "out", recipes.load("awq-gptq-int4"))
    (layer,) = (event for event in events if isinstance(event, LayerDone) and event.name == LAYER)
    assert len({report.name for report in layer.tensors}) == len(layer.tensors) == 7
    assert all({"awq_ratio", "awq_loss"} <= report.settings.keys() for report in layer.tensors)
