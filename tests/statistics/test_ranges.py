"""The range of a static scale: bins count what is there, and each method finds what its definition says, by a search over the inputs."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from quantcli import recipe
from quantcli.calibration.calibrate import calibrate
from quantcli.calibration.data import Windows
from quantcli.errors import RecipeError
from quantcli.formats import open_checkpoint
from quantcli.passes.shared import basis
from quantcli.planning.arrange import open_forward
from quantcli.recipe import PassSpec, Recipe
from quantcli.statistics import ranges
from quantcli.statistics.ranges import find_range
from quantcli.statistics.stats_file import StatsFile
from quantcli.tensors import Layer
from quantcli.walk import pipeline
from support.tiny_models import TinyLlama

ACTS = ("int8-tensor", "fp8-tensor")


def inputs() -> Tensor:
    """200,000 inputs: a normal bulk, and few that are much larger."""
    X = torch.randn(1000, 200, generator=torch.Generator().manual_seed(3))
    X[::101, 5] *= 30
    return X


def histogram(X: Tensor) -> Tensor:
    counts = ranges.count(X)
    return (counts / counts.sum()).float()


def found(method: str, act: str, X: Tensor) -> float:
    return find_range(method, act, X.abs().amax(0), histogram(X))


def test_every_input_is_in_the_bin_that_holds_its_magnitude() -> None:
    X = torch.cat((inputs().flatten(), torch.tensor([0.0, -0.0, 1e-30, 1.0, -1.0, 3e38, 2.0**-16, 65535.0])))
    limits = ranges.edges()
    expected = torch.histogram(X.abs().double().clamp(max=65535), limits.double()).hist.long()
    assert torch.equal(ranges.count(X), expected)
    assert ranges.count(X).sum() == len(X)


def test_counts_of_batches_add_up() -> None:
    X = inputs()
    assert torch.equal(ranges.count(X[:300]) + ranges.count(X[300:]), ranges.count(X))


@pytest.mark.parametrize("act", ACTS)
def test_minmax_is_the_largest_input(act: str) -> None:
    X = inputs()
    assert found("minmax", act, X) == float(X.abs().max())
    assert find_range("minmax", act, X.abs().amax(0), None) == float(X.abs().max())


def test_percentile_leaves_one_of_ten_thousand_inputs_out() -> None:
    X = inputs()
    r = found("percentile", "int8-tensor", X)
    magnitudes = X.abs().flatten().sort().values
    exact = float(magnitudes[math.ceil(0.9999 * len(magnitudes)) - 1])
    assert exact <= r < 1.005 * exact
    assert r < 0.5 * float(magnitudes[-1])


@pytest.mark.parametrize("act", ACTS)
def test_mse_loses_no_more_than_any_range_tried_on_the_inputs_themselves(act: str) -> None:
    X = inputs()

    def loss(r: float) -> float:
        scale = r / ranges.LARGEST_CODE[act]
        if act == "int8-tensor":
            rounded = (X / scale).round().clamp(-128, 127) * scale
        else:
            rounded = (X / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
        return float((X - rounded).double().square().sum())

    peak = float(X.abs().max())
    least = min(loss(peak * k / 200) for k in range(8, 201))
    assert loss(found("mse", act, X)) < 1.03 * least
    assert loss(found("mse", act, X)) <= loss(peak)


def test_entropy_keeps_the_shape_of_the_bulk() -> None:
    """Uniform inputs lose shape with every cut; a bulk with one far outlier gains steps by cutting it off."""
    uniform = torch.rand(400, 500, generator=torch.Generator().manual_seed(4))
    assert found("entropy", "int8-tensor", uniform) > 0.9
    bulk = torch.randn(400, 500, generator=torch.Generator().manual_seed(4))
    bulk[0, 0] = 80
    assert 2 < found("entropy", "int8-tensor", bulk) < 12


def test_inputs_that_are_all_zero_have_no_range() -> None:
    X = torch.zeros(4, 8)
    assert [found(method, "int8-tensor", X) for method in ranges.METHODS] == [0, 0, 0, 0]


def test_the_scale_that_places_nvfp4s_own_is_always_minmaxs() -> None:
    X = inputs()
    assert found("mse", "nvfp4-g16", X) == float(X.abs().max())


def test_a_range_without_its_histogram_is_an_error() -> None:
    with pytest.raises(RecipeError, match="input_range mse needs a histogram"):
        find_range("mse", "int8-tensor", torch.ones(4), None)


@pytest.fixture(scope="module")
def model(tiny_llama: TinyLlama) -> Path:
    return tiny_llama(hidden=64, intermediate=128, layers=1, dtype="float32")


def static_recipe(method: str) -> Recipe:
    return recipe.parse(
        {
            "format": "compressed-tensors",
            "passes": ["rtn"],
            "scheme": "int8-channel-sym+int8-tensor",
            "calibration": {"input_range": method},
        },
        "static",
    )


@pytest.mark.parametrize("method", ranges.METHODS)
def test_the_scale_in_the_file_spans_the_range_that_the_recipe_asks_for(model: Path, tmp_path: Path, method: str) -> None:
    ids = torch.randint(2, 500, (6, 64), generator=torch.Generator().manual_seed(5))
    seen: dict[str, Tensor] = {}
    with open_checkpoint(str(model)) as source:
        list(pipeline.quantize(source, tmp_path / "out", static_recipe(method), data=Windows(ids)))
        forward = open_forward(source)
        with forward.layer(0) as layer:
            layer.inputs(forward.embed(ids), ids, lambda tap, X: seen.__setitem__(tap, X.clone()))
        taps = dict(forward.taps)
    with open_checkpoint(str(tmp_path / "out")) as written:
        for name, tap in taps.items():
            scale = float(written.quantized(name).parts["input_scale"])
            assert scale == pytest.approx(found(method, "int8-tensor", seen[tap]) / 127, rel=1e-2)


def test_statistics_from_a_file_serve_as_well_and_say_when_they_lack_the_histogram(model: Path, tmp_path: Path) -> None:
    ids = torch.randint(2, 500, (6, 64), generator=torch.Generator().manual_seed(5))
    with open_checkpoint(str(model)) as source:
        for name, wanted in (("with", True), ("without", False)):
            list(calibrate(source, ids, tmp_path / f"{name}.safetensors", hessian=False, histograms=wanted))
        direct, stored = Windows(ids), StatsFile(tmp_path / "with.safetensors")
        for name, data in (("direct", direct), ("stored", stored)):
            list(pipeline.quantize(source, tmp_path / name, static_recipe("mse"), data=data))
        poor = StatsFile(tmp_path / "without.safetensors")
        with pytest.raises(RecipeError, match=r"has no histogram of tap .* calibrate with --histograms"):
            list(pipeline.quantize(source, tmp_path / "no", static_recipe("mse"), data=poor))
        list(pipeline.quantize(source, tmp_path / "minmax", static_recipe("minmax"), data=poor))
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("direct", "stored")]
    assert all(torch.allclose(files[0][name].float(), tensor.float(), rtol=1e-6) for name, tensor in files[1].items())


@pytest.mark.parametrize("method", ranges.METHODS)
@pytest.mark.parametrize("name", ["smoothquant", "awq"])
def test_ranges_are_of_the_inputs_as_a_change_of_basis_leaves_them(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, name: str
) -> None:
    ids = torch.randint(2, 500, (6, 64), generator=torch.Generator().manual_seed(5))
    seen: dict[str, Tensor] = {}
    folded: dict[str, Tensor] = {}

    def fold(layer: Layer, tap: str, s: Tensor) -> Tensor:
        s = real(layer, tap, s)
        if layer.name:  # not a trial of what can absorb a scale
            folded[tap] = s
        return s

    real = basis.fold
    monkeypatch.setattr(basis, "fold", fold)
    how = replace(static_recipe(method), passes=(PassSpec(name, {"alpha": 0.7} if name == "smoothquant" else {}), PassSpec("rtn")))
    with open_checkpoint(str(model)) as source:
        list(pipeline.quantize(source, tmp_path / "out", how, data=Windows(ids)))
        forward = open_forward(source)
        with forward.layer(0) as layer:
            layer.inputs(forward.embed(ids), ids, lambda tap, X: seen.__setitem__(tap, X.clone()))
        taps = dict(forward.taps)
    assert folded.keys() == set(taps.values()) if name == "smoothquant" else folded  # awq leaves taps that a scale does not help
    with open_checkpoint(str(tmp_path / "out")) as written:
        for weight, tap in taps.items():
            scale = float(written.quantized(weight).parts["input_scale"])
            expected, before = (
                found(method, "int8-tensor", X) / 127 for X in (seen[tap] / folded.get(tap, torch.ones(1)).float(), seen[tap])
            )
            assert scale == pytest.approx(expected, rel=1e-2)
            assert name == "awq" or abs(before / expected - 1) > 0.05


def test_counts_in_a_file_are_refused_where_a_pass_would_move_them(model: Path, tmp_path: Path) -> None:
    ids = torch.randint(2, 500, (6, 64), generator=torch.Generator().manual_seed(5))
    how = replace(static_recipe("mse"), passes=(PassSpec("smoothquant"), PassSpec("rtn")))
    with open_checkpoint(str(model)) as source:
        list(calibrate(source, ids, tmp_path / "stats.safetensors", histograms=True))
        data = StatsFile(tmp_path / "stats.safetensors")
        with pytest.raises(RecipeError, match="smoothquant scales each for itself; take input_range minmax, or give --dataset"):
            list(pipeline.quantize(source, tmp_path / "out", how, data=data))


def test_a_range_that_is_none_is_refused() -> None:
    with pytest.raises(RecipeError, match="input_range is one of minmax, percentile, mse, entropy, not 'median'"):
        static_recipe("median")
