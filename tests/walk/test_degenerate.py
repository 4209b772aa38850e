"""What a run does where the text, or a model, tells it nothing: it falls back, says so, and goes on; and it says what was lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

import quantcli as qc
from quantcli import recipe as recipes
from quantcli.calibration.calibrate import calibrate
from quantcli.formats import open_checkpoint
from quantcli.passes import rtn
from quantcli.passes.shared.activations import static_scale
from quantcli.qtypes import of as qtype_of
from quantcli.statistics.stats_file import StatsFile
from quantcli.tensors import Layer, Scheme
from quantcli.walk.events import Planned
from quantcli.walk.notices import warn_of_coverage
from support.runs import run
from support.tiny_models import TinyLlama

IDS = torch.randint(2, 512, (4, 96), generator=torch.Generator().manual_seed(5))
SILENT = ("model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.k_proj.weight", "model.layers.1.self_attn.v_proj.weight")


def changed(folder: Path, **factors: float) -> Path:
    """``folder`` with the tensors that end in a name times a factor."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        for end, factor in factors.items():
            if name.endswith(end.replace("__", ".") + ".weight"):
                tensors[name] = tensors[name] * factor
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def silent(tiny_llama: TinyLlama) -> Path:
    """A model whose second attention reads nothing but zeros."""
    return changed(tiny_llama(hidden=64, intermediate=128), layers__1__input_layernorm=0.0)


def recipe(passes: list[str], scheme: str, **words: Any) -> qc.Recipe:
    kind = "gptq" if scheme.endswith("desc") else "compressed-tensors"
    return recipes.parse({"format": kind, "passes": passes, "scheme": scheme, **words}, "small")


@pytest.mark.parametrize("by_file", [False, True])
@pytest.mark.parametrize(
    ("passes", "scheme"),
    [
        (["gptq"], "int4-g32-sym"),
        (["gptq"], "int4-g32-sym-desc"),
        (["gptq"], "nvfp4+nvfp4-g16"),
        (["gptq"], "int8-channel-sym+int8-tensor"),
        (["rtn"], "fp8-tensor+fp8-tensor"),
        (["awq"], "int4-g32-sym"),
        (["awq", "gptq"], "int4-g32-sym"),
        (["smoothquant", "gptq"], "int8-channel-sym+int8-token"),
    ],
)
def test_a_tap_of_zeros_ends_no_run_and_is_named(silent: Path, tmp_path: Path, passes: list[str], scheme: str, by_file: bool) -> None:
    learned: Any = qc.Windows(IDS)
    if by_file:
        with open_checkpoint(str(silent)) as checkpoint:
            list(calibrate(checkpoint, IDS, tmp_path / "stats.safetensors"))
        learned = StatsFile(tmp_path / "stats.safetensors")
    options = [{"awq": {"compensated": True}}, "gptq"] if passes == ["awq", "gptq"] else passes
    result = qc.quantize(silent, tmp_path / "out", recipe(options, scheme), data=learned, device="cpu")
    with open_checkpoint(str(tmp_path / "out")) as output, open_checkpoint(str(silent)) as source:
        for name in SILENT:
            W = source.read(name).float()
            assert (output.read(name) - W).square().sum() < 0.1 * W.square().sum(), name
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    scales = {name: t for name, t in tensors.items() if "input_scale" in name or "input_global_scale" in name}
    assert bool(scales) == ("tensor" in scheme.partition("+")[2] or "nvfp4" in scheme)
    assert all(bool(torch.isfinite(t).all()) and bool((t > 0).all()) for t in scales.values())
    notes = result.to_dict()["notes"][SILENT[0]]
    assert any("its inputs were zero on every calibration token" in note for note in notes)
    assert any(
        "zero on every" in note for note in json.loads((tmp_path / "out" / "quantcli.json").read_text())["tensors"][SILENT[0]]["notes"]
    )


@pytest.mark.parametrize("reach", [0.0, 1e-45, 1e-30, 1.0])
@pytest.mark.parametrize("act", ["int8-tensor", "fp8-tensor", "nvfp4-g16"])
def test_an_input_scale_is_finite_and_above_zero_whatever_the_range(act: str, reach: float) -> None:
    scale = static_scale(act, reach).to(torch.bfloat16)
    assert bool(torch.isfinite(scale).all())
    assert float(scale) > 0
    assert float(1 / scale) > 0


@pytest.mark.parametrize("scheme", ["int4-g32-sym", "q4_k", "q2_k", "iq4_nl", "nvfp4", "mxfp4"])
def test_an_importance_of_zeros_counts_as_none_and_is_named(scheme: str) -> None:
    W = torch.randn(8, 256, generator=torch.Generator().manual_seed(1))
    importance = {"zeros": torch.zeros(256), "ones": torch.ones(256)}
    layer = Layer("l", dict.fromkeys(importance, W), dict.fromkeys(importance, Scheme.parse(scheme)), importance=importance)
    zeros, ones = rtn.PASS.run(layer, {}).tensors
    decoded = {name: qtype_of(tensor.scheme.qtype).unpack(tensor) for name, tensor in layer.quantized.items()}
    assert torch.equal(decoded["zeros"], decoded["ones"])
    assert "importance of all its inputs is zero" in zeros.notes[0]
    assert not ones.notes


@pytest.mark.parametrize("scheme", ["q4_k", "q6_k", "q4_0", "iq4_nl", "iq4_xs", "iq3_xxs"])
def test_a_block_of_which_nothing_counts_is_not_lost_and_the_others_stay(scheme: str) -> None:
    W = torch.randn(8, 512, generator=torch.Generator().manual_seed(1))
    importance = torch.rand(512, generator=torch.Generator().manual_seed(2)) + 0.1
    whole = Layer("l", {"a": W}, {"a": Scheme.parse(scheme)}, importance={"a": importance.clone()})
    importance[256:] = 0
    part = Layer("l", {"a": W}, {"a": Scheme.parse(scheme)}, importance={"a": importance})
    (report,) = rtn.PASS.run(part, {}).tensors
    rtn.PASS.run(whole, {})
    after, before = (qtype_of(layer.quantized["a"].scheme.qtype).unpack(layer.quantized["a"]) for layer in (part, whole))
    assert torch.equal(after[:, :256], before[:, :256])
    assert (after - W)[:, 256:].square().sum() < 0.1 * W[:, 256:].square().sum()
    assert not report.notes


def test_a_matrix_that_rounds_to_zero_under_a_shared_scale_is_named(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    folder = changed(tiny_llama(hidden=64, intermediate=128, layers=1), up_proj=1e-6)
    result = qc.quantize(folder, tmp_path / "out", "nvfp4", device="cpu")
    name = "model.layers.0.mlp.up_proj.weight"
    assert result.lost.keys() == {name}
    assert result.lost[name] > 0.9
    assert "lost: its relative error is 1.00" in result.to_dict()["notes"][name][0]
    assert any("lost" in note for note in json.loads((tmp_path / "out" / "quantcli.json").read_text())["tensors"][name]["notes"])
    assert not qc.quantize(tiny_llama(hidden=64, intermediate=128, layers=1), tmp_path / "fine", "nvfp4", device="cpu").lost


@pytest.mark.parametrize("passes", [["gptq"], ["awq"], ["smoothquant", "gptq"]])
def test_errors_are_measured_on_text_that_nothing_was_fitted_to(tiny_llama: TinyLlama, tmp_path: Path, passes: list[str]) -> None:
    folder = tiny_llama(hidden=64, intermediate=128)
    how = recipe(passes, "int4-g32-sym" if passes != ["smoothquant", "gptq"] else "int8-channel-sym+int8-token")
    few = IDS[:1, :8]
    held = qc.quantize(folder, tmp_path / "held", how, data=qc.Windows(few, IDS[1:]), device="cpu")
    plain = qc.quantize(folder, tmp_path / "plain", how, data=qc.Windows(few), device="cpu")
    assert (tmp_path / "held" / "model.safetensors").read_bytes() == (tmp_path / "plain" / "model.safetensors").read_bytes()
    assert all(layer["held_out_error"] is None for layer in plain.to_dict()["layers"])
    for layer in held.layers[1:3]:
        assert layer.held_out_error is not None
        assert layer.held_out_error > (3 if passes == ["gptq"] else 1.5) * layer.relative_error > 0
    assert any("8 calibration tokens are fewer than the 128 inputs of model.layers.0.mlp.down_proj" in w for w in held.warnings)
    told = json.loads((tmp_path / "held" / "quantcli.json").read_text())
    assert "8 calibration tokens are fewer" in told["warnings"][0]
    assert told["coverage"] == 1
    assert told["tensors"]["model.layers.0.mlp.up_proj.weight"]["held_out_error"] > 0
    enough = qc.quantize(folder, tmp_path / "enough", how, data=qc.Windows(IDS), device="cpu")
    assert not any("fewer than" in warning for warning in enough.warnings)


def test_an_error_on_held_out_text_is_that_of_the_layers_own_inputs(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    """The judge: rounding does not depend on the text, so its error on the held-out windows is that of a run calibrated on these."""
    folder = tiny_llama(hidden=64, intermediate=128, dtype="float32")
    how = recipe([{"awq": {"n_grid": 1, "clip": False}}], "int8-channel-sym")
    there = run(folder, tmp_path / "a", how, qc.Windows(IDS[:1], IDS[1:]))
    other = run(folder, tmp_path / "b", how, qc.Windows(IDS[1:]))
    seen = [e for e in there if isinstance(e, qc.LayerDone) and e.held_out_error is not None]
    same = [e for e in other if isinstance(e, qc.LayerDone) and e.relative_error is not None]
    assert len(seen) == len(same) == 2
    for a, b in zip(seen, same, strict=True):
        assert a.held_out_error == pytest.approx(b.relative_error, rel=0.2)


def test_how_much_of_the_layers_is_coded_is_told_with_a_warning_when_it_is_little(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    folder = tiny_llama(hidden=64, intermediate=128, layers=1)
    file = folder / "model.safetensors"
    tensors: dict[str, Tensor] = load_file(file)
    tensors["model.layers.0.mlp.experts.fused_up"] = torch.zeros(4, 64, 64 * 8)
    save_file(tensors, file, metadata={"format": "pt"})
    events = run(folder, tmp_path / "out", "nf4", dry_run=True)
    (plan,) = [event.plan for event in events if isinstance(event, Planned)]
    n_linears = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128
    assert plan.coverage == pytest.approx(n_linears / (n_linears + 4 * 64 * 512))
    told: list[Any] = []
    warn_of_coverage(plan, told.append)
    assert told[0].is_warning
    assert told[0].text.startswith(
        "only 22% of the weights in the decoder layers are coded: model.layers.0.mlp.experts.fused_up stay dense: "
        "matrices in layers that are no linears of their own (fused experts, routers)"
    )
    del tensors["model.layers.0.mlp.experts.fused_up"]
    tensors |= {f"{tower}.layers.0.mlp.fc1.weight": torch.zeros(64, 512) for tower in ("mtp", "vision_tower.encoder")}
    save_file(tensors, file, metadata={"format": "pt"})
    whole = next(e for e in run(folder, tmp_path / "whole", "nf4", dry_run=True) if isinstance(e, Planned)).plan
    assert any("mtp.layers.0" in note and "layers that no text runs through" in note for note in whole.notes)
    assert not any("fused experts" in note for note in whole.notes)
    assert whole.coverage == 1, "a vision tower and an MTP layer are none of the layers that text runs through"
    warn_of_coverage(whole, told.append)
    assert len(told) == 1


def test_what_transformers_keeps_in_float32_is_said_to_be_the_cause(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = T5Config(vocab_size=64, d_model=32, d_ff=64, d_kv=8, num_layers=1, num_decoder_layers=1, num_heads=4, decoder_start_token_id=0)
    T5ForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(tmp_path / "t5")
    (plan,) = [e.plan for e in run(tmp_path / "t5", tmp_path / "out", "fp8-dynamic", dry_run=True) if isinstance(e, Planned)]
    assert "keeps it in float32" in plan.dense["decoder.block.0.layer.2.DenseReluDense.wo.weight"]
    told: list[Any] = []
    warn_of_coverage(plan, told.append)
    assert "DenseReluDense.wo.weight stay dense: transformers' T5ForConditionalGeneration keeps it in float32" in told[0].text
