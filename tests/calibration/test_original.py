"""The model as it was, beside the one being quantized: dXXT is of the same tokens in both, whatever was coded on the way."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from quantcli import recipe
from quantcli.calibration import calibrate
from quantcli.calibration.data import Windows
from quantcli.calibration.measuring import measure
from quantcli.calibration.original import Original
from quantcli.errors import RecipeError
from quantcli.formats import open_checkpoint
from quantcli.forward import HiddenStates
from quantcli.passes.shared import basis
from quantcli.planning.arrange import open_forward
from quantcli.statistics.meter import StatsMeter
from quantcli.statistics.stats_file import StatsFile
from quantcli.walk.pipeline import LayerDone
from support.runs import run
from support.tiny_models import TinyLlama
from support.whole_models import inputs_of, save_mixtral

IDS = torch.randint(2, 512, (11, 40), generator=torch.Generator().manual_seed(3))
NEEDS = frozenset({"H", "dXXT"})


def rough(W: Tensor) -> Tensor:
    """``W`` with a third of an octave of precision: as damaged as by quantization, or worse."""
    return W.float().mul(8 / W.float().abs().max()).round().mul(W.float().abs().max() / 8)


def test_drift_equals_that_of_two_whole_models(tiny_llama: TinyLlama) -> None:
    folder = tiny_llama(hidden=64, intermediate=320, layers=2, dtype="float32")
    before = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    after = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    damaged = [name for name, _ in after.named_parameters() if "layers.0" in name and "proj" in name]
    damaged += [f"model.layers.1.self_attn.{x}_proj.weight" for x in "qkv"]
    for name in damaged:
        after.get_parameter(name).data = rough(after.get_parameter(name).data)
    X0, X = inputs_of(before, IDS), inputs_of(after, IDS)

    with open_checkpoint(str(folder)) as source:
        forward = open_forward(source)
        states, original = HiddenStates.embed(forward, IDS), Original(forward, IDS)
        with forward.layer(0) as layer, original.layer(0):
            assert all(not s.dXXT.any() for s in measure(layer, states, needs=NEEDS, original=original).values())
            for name in damaged[:7]:
                layer.set(name, rough(layer.tensors[name]))
            states.advance(layer)
        with forward.layer(1) as layer, original.layer(1):
            for name in damaged[7:]:
                layer.set(name, rough(layer.tensors[name]))
            # As true_sequential has it: q, k and v are coded, o_proj reads what they make.
            stats = measure(layer, states, needs=NEEDS, original=original)
    for tap in (f"model.layers.1.{x}" for x in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")):
        expected = (X0[tap].double() - X[tap]).T @ X[tap].double() / len(X[tap])
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(stats[tap].dXXT.double(), expected, rtol=1e-4, atol=1e-5)


quantize = partial(run, data=Windows(IDS))


def test_asymmetric_calibration_changes_what_comes_after_the_first_layer(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    folder = tiny_llama()
    for name in ("gptq-int4", "gptaq-int4"):
        quantize(folder, tmp_path / name, replace(recipe.load(name), true_sequential=False))
    with open_checkpoint(str(tmp_path / "gptq-int4")) as plain, open_checkpoint(str(tmp_path / "gptaq-int4")) as asymmetric:
        differ = {name: not torch.equal(plain.read(name), asymmetric.read(name)) for name in plain.schemes}
    assert differ == {name: ".1." in name for name in differ}


def test_statistics_from_a_file_cannot_tell_how_inputs_move(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    folder = tiny_llama(layers=1)
    with open_checkpoint(str(folder)) as source:
        list(calibrate.calibrate(source, IDS, tmp_path / "stats.safetensors"))
    stats = StatsFile(tmp_path / "stats.safetensors")
    with pytest.raises(RecipeError, match="give --dataset in place of --stats"):
        quantize(folder, tmp_path / "out", recipe.load("gptaq-int4"), data=stats)
    assert not (tmp_path / "out").exists()


def test_a_change_of_basis_moves_the_difference_with_the_inputs() -> None:
    """As it does H: awq before gptq divides both x and x₀."""
    g = torch.Generator().manual_seed(0)
    X, X0, s = torch.randn(100, 8, generator=g), torch.randn(100, 8, generator=g), torch.rand(8, generator=g) + 0.5
    meters = []
    for inputs, originals in ((X, X0), (X / s, X0 / s)):
        meters.append(StatsMeter(8, True, drift=True))
        meters[-1].add(inputs)
        meters[-1].add_drift(inputs, originals)
    before, after = (meter.stats() for meter in meters)
    for part in ("H", "dXXT"):
        torch.testing.assert_close(getattr(basis.rescaled(before, s), part), getattr(after, part), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_experts_are_asymmetric_where_all_tokens_calibrate_them(tmp_path: Path, fused: bool) -> None:
    folder = save_mixtral(tmp_path / "mixtral", fused=fused)
    how = recipe.load("gptaq-int4")
    scheme = how.with_scheme(group_size=32).scheme
    notes = {}
    for moe in ("routed", "all"):
        chosen = replace(how, scheme=scheme, calibration=replace(how.calibration, moe=moe, min_tokens=1))
        events = quantize(folder, tmp_path / moe, chosen)
        reports = [report for e in events if isinstance(e, LayerDone) for report in e.tensors]
        notes[moe] = {r.name for r in reports if any("router's choice" in note for note in r.notes)}
    assert notes["all"] == set()
    assert notes["routed"]
    assert all(".experts." in name for name in notes["routed"])
