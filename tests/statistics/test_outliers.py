"""protect_outliers: figures of inputs choose what stays dense or gets more bits, from a file or from windows, and the output says so."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantcli import recipe as recipes
from quantcli.calibration import calibrate
from quantcli.calibration.data import Windows
from quantcli.errors import RecipeError, UnsupportedError
from quantcli.formats import open_checkpoint
from quantcli.recipe import Recipe
from quantcli.statistics import outliers
from quantcli.statistics.outliers import Figures, Protection, choose, figures_of
from quantcli.statistics.stats_file import StatsFile
from quantcli.tensors import Scheme, Stats
from quantcli.walk import pipeline
from quantcli.walk.events import LayerDone, Planned
from support.runs import run
from support.tiny_models import TinyLlama

IDS = torch.randint(512, (8, 32), generator=torch.Generator().manual_seed(0))
DOWN = "model.layers.1.mlp.down_proj"


def stats_of(X: Tensor) -> Stats:
    X = X.double()
    parts = (X.square().mean(0), X.abs().amax(0), X.mean(0), X.pow(4).mean(0))
    importance, absmax, mean, fourth = (part.float() for part in parts)
    return Stats(importance=importance, absmax=absmax, mean=mean, n_tokens=len(X), fourth=fourth)


def figures(**changes: Any) -> Figures:
    """Those of Gaussian inputs, with ``changes``."""
    calm = figures_of(stats_of(torch.randn(4096, 64, generator=torch.Generator().manual_seed(1))))
    return replace(calm, **changes)


def recipe(protect: dict[str, Any], **words: Any) -> Recipe:
    data = {"format": "gptq", "passes": ["gptq"], "scheme": "int4-g128-sym", "protect_outliers": protect, **words}
    return recipes.parse(data, "protecting")


@pytest.fixture
def loud(tiny_llama: TinyLlama) -> Path:
    """A model whose second down_proj reads inputs with outliers: some rows of up_proj are large."""
    folder = tiny_llama(layers=2)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][::40] *= 60
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def quantize(folder: Path, target: Path, how: Recipe, stats: Path | None = None) -> dict[str, Any]:
    """What quantcli.json says."""
    run(folder, target, how, Windows(IDS) if stats is None else StatsFile(stats))
    return json.loads((target / "quantcli.json").read_text())


def schemes(folder: Path) -> dict[str, str]:
    with open_checkpoint(str(folder)) as output:
        return {name: str(scheme) for name, scheme in output.schemes.items()}


def measure(folder: Path, target: Path) -> Path:
    with open_checkpoint(str(folder)) as source:
        list(calibrate.calibrate(source, IDS, target))
    return target


def test_gaussian_inputs_have_kurtosis_three_and_a_loud_channel_raises_every_figure() -> None:
    X = torch.randn(4096, 64, generator=torch.Generator().manual_seed(1))
    calm = figures_of(stats_of(X))
    assert calm.kurtosis == pytest.approx(3, rel=0.05)
    assert calm.outlier_channels == 0
    X[:, 5] *= 30
    wild = figures_of(stats_of(X))
    assert wild.kurtosis == pytest.approx(float(X.double().pow(4).mean() / X.double().square().mean() ** 2), rel=1e-4)
    assert (wild.outlier_channels, wild.outlier_share) == (1, 1 / 64)
    assert wild.energy_top1pct > 0.9
    assert min(wild.kurtosis, wild.absmax_over_rms) > 2 * max(calm.kurtosis, calm.absmax_over_rms)


@pytest.mark.parametrize(
    ("threshold", "worse", "better"),
    [
        ({"kurtosis": 20.0}, {"kurtosis": 20.0}, {"kurtosis": 19.9}),
        ({"outlier_channels": 2}, {"outlier_channels": 2}, {"outlier_channels": 1}),
        ({"outlier_share": 0.5}, {"outlier_share": 0.6}, {"outlier_share": 0.4}),
        ({"energy_top1pct": 0.5}, {"energy_top1pct": 0.5}, {"energy_top1pct": 0.4}),
        ({"absmax_over_rms": 30.0}, {"absmax_over_rms": 31.0}, {"absmax_over_rms": 29.0}),
        ({"coverage": 0.9}, {"coverage": 0.8}, {"coverage": 1.0}),
        ({"tokens_per_input": 2.0}, {"tokens_per_input": 1.5}, {"tokens_per_input": 2.5}),
        ({"tokens_per_input": 2.0}, {"tokens_per_input": 0.0}, {"tokens_per_input": 2.5}),
    ],
)
def test_what_reaches_a_threshold_or_falls_short_of_it_is_protected(threshold: dict, worse: dict, better: dict) -> None:
    protection = Protection(None, threshold)
    chosen = choose(protection, {"a": figures(**better), "b": figures(**worse)}, {"a": 10, "b": 10})
    assert [unit.taps for unit in chosen] == [("b",)]


def test_a_share_of_the_weights_goes_to_those_furthest_beyond() -> None:
    found = {tap: figures(kurtosis=k) for tap, k in {"a": 30.0, "b": 300.0, "c": 90.0, "d": 60.0}.items()}
    n_weights = {"a": 10, "b": 40, "c": 30, "d": 20}
    order = [unit.taps[0] for unit in choose(Protection(None, {"kurtosis": 20.0}), found, n_weights)]
    assert order == ["b", "c", "d", "a"]
    half = choose(Protection(None, {"kurtosis": 20.0}, share=0.5), found, n_weights)
    assert [unit.taps[0] for unit in half] == ["b", "a"]  # c and d no longer fit
    assert half[0].excess == pytest.approx(15)


def test_experts_of_a_layer_are_protected_together() -> None:
    found = {
        f"layers.0.mlp.experts.{e}.{k}": figures(kurtosis=50.0 if (e, k) == (3, "down_proj") else 3.0)
        for e in range(4)
        for k in ("down_proj", "up_proj")
    }
    (unit,) = choose(
        Protection(None, {"kurtosis": 20.0}),
        {**found, "layers.0.self_attn.q_proj": figures()},
        dict.fromkeys([*found, "layers.0.self_attn.q_proj"], 1),
    )
    assert set(unit.taps) == set(found)
    assert unit.figures.kurtosis == 50.0


@pytest.mark.parametrize("scheme", ["int8-g128-sym", "keep"])
@pytest.mark.parametrize("from_file", [False, True])
def test_loud_inputs_get_more_bits_or_stay_dense_and_the_output_says_why(loud: Path, tmp_path: Path, scheme: str, from_file: bool) -> None:
    stats = measure(loud, tmp_path / "stats.safetensors") if from_file else None
    record = quantize(loud, tmp_path / "out", recipe({"scheme": scheme, "kurtosis": 40}), stats)
    found = schemes(tmp_path / "out")
    assert found.get(f"{DOWN}.weight") == (None if scheme == "keep" else scheme)
    assert {s for name, s in found.items() if DOWN not in name} == {"int4-g128-sym"}
    (unit,) = record["protected"]
    assert unit["taps"] == [DOWN]
    assert unit["figures"]["kurtosis"] > 40
    assert unit["excess"] == pytest.approx(unit["figures"]["kurtosis"] / 40)
    assert record["calibrated_by"] == ("statistics" if from_file else "windows")
    again = recipes.parse(record["recipe"], "again")
    assert again.protect_outliers == Protection.parse({"scheme": scheme, "kurtosis": 40}, "x")


def test_a_rule_goes_before_what_outliers_ask_for(loud: Path, tmp_path: Path) -> None:
    rules = [{"match": "down_proj", "scheme": "int2-g128-asym"}]
    quantize(loud, tmp_path / "out", recipe({"scheme": "keep", "kurtosis": 40}, rules=rules))
    assert schemes(tmp_path / "out")[f"{DOWN}.weight"] == "int2-g128-asym"


def test_the_plan_knows_from_statistics_and_says_that_windows_tell_later(loud: Path, tmp_path: Path) -> None:
    how, stats = recipe({"scheme": "int8-g128-sym", "kurtosis": 40}), StatsFile(measure(loud, tmp_path / "stats.safetensors"))
    for data, words in (
        (stats, f"1 linears in int8-g128-sym: {DOWN}.weight"),
        (Windows(IDS), "known once inputs are measured"),
    ):
        with open_checkpoint(str(loud)) as source:
            (planned,) = pipeline.quantize(source, tmp_path / "out", how, data=data, dry_run=True)
        assert isinstance(planned, Planned)
        assert any(words in note for note in planned.plan.notes)
    assert not (tmp_path / "out").exists()


def test_protection_serves_gguf_and_rounding_to_nearest(loud: Path, tmp_path: Path) -> None:
    words = {"format": "gguf", "passes": ["rtn"], "scheme": None, "mix": "Q4_K_S"}
    how = recipe({"scheme": "q6_k", "kurtosis": 40}, **words)
    with open_checkpoint(str(loud)) as source:
        events = list(pipeline.quantize(source, tmp_path / "out.gguf", how, data=Windows(IDS)))
    assert any(isinstance(event, LayerDone) for event in events)
    assert schemes(tmp_path / "out.gguf")[f"{DOWN}.weight"] == "q6_k"


def test_old_statistics_without_the_fourth_moment_are_refused(loud: Path, tmp_path: Path) -> None:
    path = measure(loud, tmp_path / "stats.safetensors")
    metadata = StatsFile(path).metadata
    save_file({name: tensor for name, tensor in load_file(path).items() if not name.endswith(".fourth")}, path, metadata=metadata)
    assert StatsFile(path)[DOWN].fourth is None
    assert figures_of(StatsFile(path)[DOWN]).kurtosis is None
    with pytest.raises(RecipeError, match="run `quantcli calibrate` again"):
        quantize(loud, tmp_path / "out", recipe({"scheme": "keep", "kurtosis": 40}), path)


@pytest.mark.parametrize(
    "words",
    [
        {"scheme": "keep"},
        {"kurtosis": 40},
        {"scheme": "keep", "kurtosis": 0},
        {"scheme": "keep", "kurtosis": "high"},
        {"scheme": "keep", "kurtosis": 40, "share": 1.5},
        {"scheme": "keep", "loudness": 3},
    ],
)
def test_a_protection_that_says_nothing_or_nonsense_is_refused(words: dict) -> None:
    with pytest.raises(RecipeError, match="protect_outliers"):
        recipe(words)


def test_a_scheme_that_the_format_cannot_hold_is_refused_before_work(loud: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="protect_outliers: the gptq format cannot hold nf4"):
        quantize(loud, tmp_path / "out", recipe({"scheme": "nf4", "kurtosis": 40}))


def test_a_static_scale_of_protected_inputs_is_gathered() -> None:
    how = recipe({"scheme": "int8-channel-sym+int8-tensor", "kurtosis": 40}, format="compressed-tensors")
    assert {"absmax", "fourth", "H"} <= how.needs
    assert Scheme.parse("int8-channel-sym+int8-tensor").static_activations
    assert outliers.THRESHOLDS[0] == "outlier_channels"
