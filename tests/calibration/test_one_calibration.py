"""One file of statistics serves every calibrated method: no layer runs again, and the output says what it was calibrated by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from quantcli import recipe as recipes
from quantcli.calibration import calibrate, measuring
from quantcli.calibration.data import Windows
from quantcli.formats import open_checkpoint
from quantcli.forward import HiddenStates, LoadedLayer, run_dtype
from quantcli.forward.hidden import kept_on
from quantcli.passes import gptq
from quantcli.recipe import PassSpec, Recipe
from quantcli.statistics import meter
from quantcli.statistics.stats_file import StatsFile
from quantcli.walk import pipeline
from quantcli.walk.evaluate import compare
from support.tiny_models import TinyLlama

IDS = torch.randint(512, (16, 32), generator=torch.Generator().manual_seed(0))
RECIPES = ("gptq-int4", "awq-int4", "awq-gptq-int4", "smoothquant-w8a8", "smoothquant-w8a8-static", "gptq-nf4", "gptq-q4_k_m")


def recipe_of(name: str) -> Recipe:
    if name != "gptq-q4_k_m":
        return recipes.load(name)
    data = {**recipes.load("q4_k_m").to_dict(), "name": name, "passes": [{p.name: {}} for p in (PassSpec("gptq"),)]}
    return recipes.parse(data, name)


@pytest.fixture(scope="module")
def folder(tiny_llama: TinyLlama) -> Path:
    return tiny_llama()


@pytest.fixture(scope="module")
def stats(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stats") / "stats.safetensors"
    with open_checkpoint(str(folder)) as source:
        list(calibrate.calibrate(source, IDS, path, head=True))
    return path


@pytest.mark.parametrize("name", RECIPES)
def test_a_file_of_statistics_serves_with_no_run_of_the_text(
    folder: Path, stats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    n_tokens: list[int] = []
    run = LoadedLayer.__call__

    def counting(self: LoadedLayer, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        n_tokens.append(ids.numel())
        return run(self, hidden, ids)

    def never(*_args: object) -> None:
        raise AssertionError("statistics were gathered again")

    monkeypatch.setattr(LoadedLayer, "__call__", counting)
    monkeypatch.setattr(meter.StatsMeter, "add", never)
    target = tmp_path / ("out.gguf" if "q4_k" in name else "out")
    with open_checkpoint(str(folder)) as source:
        data = StatsFile(stats)
        list(pipeline.quantize(source, target, recipe_of(name), data=data))
    assert all(n == 24 for n in n_tokens)  # a change of basis tries on that many what can absorb a scale; no text
    assert bool(n_tokens) == recipe_of(name).changes_basis
    if target.is_dir():
        assert json.loads((target / "quantcli.json").read_text())["calibrated_by"] == "statistics"
    monkeypatch.undo()
    with open_checkpoint(str(folder)) as source, open_checkpoint(str(target)) as output:
        assert 0 < compare(output, source, IDS[:4]).kld_mean < 0.2


def test_windows_run_twice_through_each_layer_but_the_last_because_errors_go_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[str] = []
    measure, advance = measuring.measure, HiddenStates.advance

    def noting_measure(layer: LoadedLayer, *rest: Any, **options: Any) -> object:
        passes.append(f"measure {layer.name[-1]}")
        return measure(layer, *rest, **options)

    def noting_advance(states: HiddenStates, layer: LoadedLayer) -> None:
        passes.append(f"advance {layer.name[-1]}")
        advance(states, layer)

    monkeypatch.setattr(measuring, "measure", noting_measure)
    monkeypatch.setattr(HiddenStates, "advance", noting_advance)
    with open_checkpoint(str(folder)) as source:
        list(pipeline.quantize(source, tmp_path / "out", recipes.load("gptq-int4"), data=Windows(IDS)))
    few = ["advance 0", "advance 1"]  # of untouched windows, for familiarity
    assert passes == [few[0], "measure 0", "advance 0", few[1], "measure 1"]
    assert json.loads((tmp_path / "out" / "quantcli.json").read_text())["calibrated_by"] == "windows"


def test_a_tap_is_factorized_once_for_all_that_read_it(folder: Path, stats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    widths: list[int] = []
    factorize = gptq.factorize
    monkeypatch.setattr(gptq, "factorize", lambda H, **options: widths.append(len(H)) or factorize(H, **options))
    with open_checkpoint(str(folder)) as source:
        data = StatsFile(stats)
        list(pipeline.quantize(source, tmp_path / "out", recipes.load("gptq-int4"), data=data))
    assert sorted(widths) == sorted([256, 256, 256, 512] * 2)  # q/k/v, o, gate/up, down of two layers


@pytest.mark.parametrize(
    ("dtype", "device", "expected"), [("bfloat16", "cuda", "bfloat16"), ("float16", "cuda", "float32"), ("bfloat16", "cpu", "float32")]
)
def test_only_a_gpu_measures_in_bfloat16_and_only_what_was_published_in_it(
    tiny_llama: TinyLlama, dtype: str, device: str, expected: str
) -> None:
    with open_checkpoint(str(tiny_llama(dtype=dtype, layers=1))) as source:
        assert run_dtype(source.specs.values(), device) == getattr(torch, expected)


def test_hidden_states_stay_on_a_gpu_that_has_room_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (1000, 2000))
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert [kept_on(gpu, n) for n in (500, 501)] == [gpu, cpu]
    assert kept_on(cpu, 10**15) == cpu


def test_tensor_cores_are_let_only_at_what_they_hold_exactly() -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    for dtype, allowed in ((torch.bfloat16, True), (torch.float16, True), (torch.float32, False)):
        with meter.exact_products(dtype):
            assert (matmul.fp32_precision == "tf32") == allowed
        assert matmul.fp32_precision == before
