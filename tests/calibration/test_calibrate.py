"""Stats equal sums over the whole model's inputs; the stats file holds them; nothing half-written stays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from quantcli.calibration.calibrate import LayerMeasured, calibrate
from quantcli.calibration.measuring import measure
from quantcli.calibration.resume import Resumed
from quantcli.calibration.text_check import TextCheck
from quantcli.errors import NumericsError, RecipeError
from quantcli.formats import open_checkpoint
from quantcli.forward import HiddenStates
from quantcli.forward import hidden as hidden_states
from quantcli.planning.arrange import open_forward
from quantcli.statistics.meter import StatsMeter
from quantcli.statistics.stats_file import StatsFile
from quantcli.tensors import Stats
from support.tiny_models import TinyLlama
from support.whole_models import inputs_of

IDS = torch.randint(2, 512, (11, 40), generator=torch.Generator().manual_seed(3))
TAPS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
CACHES = ("self_attn.k_cache", "self_attn.v_cache")


@pytest.fixture(scope="module")
def folder(tiny_llama: TinyLlama) -> Path:
    return tiny_llama(hidden=64, intermediate=320, layers=3, dtype="float32")  # 320: more than one block of H


@pytest.fixture(scope="module")
def inputs(folder: Path) -> dict[str, Tensor]:
    """What every linear of the whole model reads for IDS, [n_tokens, in] float64: the judge."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return {name: X.double() for name, X in inputs_of(model, IDS).items()}


def check(stats: Stats, X: Tensor, *, hessian: bool = True, times: int = 1) -> None:
    n = len(X)
    assert stats.n_tokens == n * times
    torch.testing.assert_close(stats.mean.double(), X.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stats.absmax.double(), X.abs().amax(0), rtol=1e-5, atol=0)
    torch.testing.assert_close(stats.importance.double(), X.square().mean(0), rtol=1e-4, atol=1e-9)
    assert stats.fourth is not None
    torch.testing.assert_close(stats.fourth.double(), X.pow(4).mean(0), rtol=1e-4, atol=1e-9)
    if not hessian:
        assert stats.H is None
        return
    assert stats.H is not None
    assert torch.equal(stats.H, stats.H.T)
    torch.testing.assert_close(stats.H.double(), X.T @ X / n, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("hessian", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("in_features", [1, 7, 256, 257, 600])
def test_a_meter_equals_sums_in_float64_for_any_width_dtype_and_batches(in_features: int, dtype: torch.dtype, hessian: bool) -> None:
    generator = torch.Generator().manual_seed(in_features)
    X = (torch.randn(1000, in_features, generator=generator) * 5 + 1).to(dtype)
    meter = StatsMeter(in_features, hessian)
    for batch in X.split(173):
        meter.add(batch)
    check(meter.stats(), X.double(), hessian=hessian)


def test_a_million_tokens_lose_no_precision() -> None:
    """Equal tokens round the same way each time, so a careless float32 sum drifts by a percent."""
    meter = StatsMeter(3, True)
    X = torch.tensor([0.1, 1.0, -0.01]).half().expand(4096, 3)
    for _ in range(256):
        meter.add(X)
    check(meter.stats(), X.double(), times=256)


def test_stats_of_every_tap_equal_those_of_the_whole_models_inputs(
    folder: Path, inputs: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hidden_states, "BATCH_TOKENS", 100)  # batches of two windows, the last of one
    with open_checkpoint(str(folder)) as checkpoint:
        *events, known = calibrate(checkpoint, IDS, tmp_path / "stats.safetensors", head=True)
    assert isinstance(known, TextCheck)
    assert [e.name for e in events] == ["model.layers.0", "model.layers.1", "model.layers.2", "lm_head"]
    assert [(e.index, e.n_layers, e.n_taps) for e in events] == [(0, 4, 4), (1, 4, 4), (2, 4, 4), (3, 4, 1)]
    stats = StatsFile(tmp_path / "stats.safetensors")
    assert set(stats) == {f"model.layers.{i}.{tap}" for i in range(3) for tap in (*TAPS, *CACHES)} | {"lm_head"}
    for tap in stats:
        if not tap.endswith(CACHES):  # which test_caches.py looks into
            check(stats[tap], inputs[tap])


def test_without_hessian_the_file_has_only_diagonals(folder: Path, inputs: dict[str, Tensor], tmp_path: Path) -> None:
    with open_checkpoint(str(folder)) as checkpoint:
        list(calibrate(checkpoint, IDS, tmp_path / "stats.safetensors", hessian=False))
    stats = StatsFile(tmp_path / "stats.safetensors")
    check(stats["model.layers.2.mlp.down_proj"], inputs["model.layers.2.mlp.down_proj"], hessian=False)
    assert (tmp_path / "stats.safetensors").stat().st_size < 40_000


def test_the_same_run_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        with open_checkpoint(str(folder)) as checkpoint:
            list(calibrate(checkpoint, IDS, tmp_path / name))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_an_interrupted_run_leaves_no_file_and_is_continued(folder: Path, tmp_path: Path) -> None:
    with open_checkpoint(str(folder)) as checkpoint:
        events = calibrate(checkpoint, IDS, tmp_path / "stats.safetensors")
        next(events)
        assert [p.name for p in tmp_path.iterdir()] == ["stats.safetensors.part"]
        events.close()
        assert [p.name for p in tmp_path.iterdir()] == ["stats.safetensors.part"]
        resumed, *again = list(calibrate(checkpoint, IDS, tmp_path / "stats.safetensors"))
        assert isinstance(resumed, Resumed)
        assert (resumed.n_done, len([event for event in again if isinstance(event, LayerMeasured)])) == (1, resumed.n_layers)
        list(calibrate(checkpoint, IDS, tmp_path / "whole"))
    assert (tmp_path / "stats.safetensors").read_bytes() == (tmp_path / "whole").read_bytes()
    assert len(list(tmp_path.iterdir())) == 2


def test_a_finished_file_is_not_replaced_unless_asked(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "stats.safetensors"
    with open_checkpoint(str(folder)) as checkpoint:
        list(calibrate(checkpoint, IDS, target))
        with pytest.raises(RecipeError):
            next(calibrate(checkpoint, IDS, target))
        list(calibrate(checkpoint, IDS[:2], target, overwrite=True))
    assert StatsFile(target).metadata["n_samples"] == "2"


def test_measuring_some_taps_leaves_the_hidden_states_where_they_are(folder: Path, inputs: dict[str, Tensor]) -> None:
    with open_checkpoint(str(folder)) as checkpoint:
        forward = open_forward(checkpoint)
        states = HiddenStates.embed(forward, IDS)
        before = states.hidden.clone()
        tap = "model.layers.0.mlp.gate_proj"
        with forward.layer(0) as layer:
            stats = measure(layer, states, taps=[tap], needs=frozenset({"importance"}))
            assert stats.keys() == {tap}
            check(stats[tap], inputs[tap], hessian=False)
            assert torch.equal(states.hidden, before)
            states.advance(layer)
        with forward.layer(1) as layer:
            again = measure(layer, states)
        check(again["model.layers.1.self_attn.q_proj"], inputs["model.layers.1.self_attn.q_proj"])


def test_a_layer_runs_no_further_than_the_last_tap_that_is_measured(folder: Path) -> None:
    finished: list[str] = []

    def note(module: nn.Module, _inputs: object, output: Tensor) -> None:
        if isinstance(module, nn.Linear) and module.out_features != 512:  # not the head
            finished.append(f"{module.in_features}→{module.out_features}")

    with open_checkpoint(str(folder)) as checkpoint:
        forward = open_forward(checkpoint)
        states = HiddenStates.embed(forward, IDS[:2])
        handle = nn.modules.module.register_module_forward_hook(note)
        try:
            with forward.layer(0) as layer:
                measure(layer, states, taps=["model.layers.0.self_attn.o_proj"])
                assert finished == ["64→64", "64→32", "64→32"]  # q, k, v
                finished.clear()
                measure(layer, states)
                assert finished == ["64→64", "64→32", "64→32", "64→64", "64→320", "64→320"]  # all but down
        finally:
            handle.remove()


def test_activations_beyond_float32s_squares_are_an_error_that_names_the_tap(folder: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "model"
    damaged.mkdir()
    for file in folder.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.layers.1.self_attn.v_proj.weight"] *= 1e25
    tensors["model.layers.1.self_attn.o_proj.weight"] *= 1e-25
    save_file(tensors, damaged / "model.safetensors")
    with open_checkpoint(str(damaged)) as checkpoint, pytest.raises(NumericsError, match=r"model\.layers\.1\.self_attn\.o_proj"):
        list(calibrate(checkpoint, IDS, tmp_path / "stats.safetensors"))
    assert not (tmp_path / "stats.safetensors").exists()
