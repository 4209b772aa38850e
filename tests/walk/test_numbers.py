"""Numbers that no format holds: NaN and Inf end a run with the tensor's name, and what is lost to rounding is told, by every method."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import quantcli as qc
from quantcli.errors import NumericsError
from support.runs import run
from support.tiny_models import TinyLlama

IDS = torch.randint(2, 512, (2, 32), generator=torch.Generator().manual_seed(5))
LAYER = "model.layers.0."
PLACES = {
    "linear": LAYER + "mlp.down_proj.weight",
    "norm": LAYER + "post_attention_layernorm.weight",
    "embedding": "model.embed_tokens.weight",
    "bias": LAYER + "self_attn.k_proj.bias",
}
CALIBRATED = ["gptq-int4", "awq-int4", "awq-gptq-int4", "smoothquant-w8a8", "fp8-static"]
ROUNDED = ["rtn-int4", "hqq-int4", "nf4", "nvfp4", "mxfp4", "fp8-tensor", "llm-int8", "bf16", "q4_k_m", "iq4_xs"]
TINY_IN_F16 = [*CALIBRATED[:3], "rtn-int4", "hqq-int4", "llm-int8", "nvfp4", "f16", "q4_k_m", "q2_k", "iq4_xs"]


def edited(folder: Path, name: str, change: Any) -> Path:
    """``folder`` with ``change`` of its tensor ``name``."""
    tensors: dict[str, Tensor] = load_file(folder / "model.safetensors")
    tensors[name] = change(tensors[name])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def coded(folder: Path, tmp_path: Path, method: str) -> qc.Result:
    recipe = qc.Recipe.load(method)
    data = qc.Windows(IDS) if recipe.is_calibrated else None
    return qc.quantize(folder, tmp_path / ("out.gguf" if recipe.format == "gguf" else "out"), recipe, data=data, device="cpu")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("method", [*CALIBRATED, *ROUNDED])
def test_nan_anywhere_ends_a_run_with_the_name_of_its_tensor(tiny_llama: TinyLlama, tmp_path: Path, method: str, place: str) -> None:
    name, bad = PLACES[place], float("inf" if method in CALIBRATED[::2] + ROUNDED[::2] else "nan")

    def damage(tensor: Tensor) -> Tensor:
        tensor.view(-1)[-1] = bad
        return tensor

    folder = edited(tiny_llama(hidden=256, intermediate=256, layers=1, bias=True), name, damage)
    with pytest.raises(NumericsError, match=name):
        coded(folder, tmp_path, method)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.gguf").exists()


def test_calibrate_and_eval_name_the_tensor_too(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    name = PLACES["norm"]
    folder = edited(tiny_llama(hidden=64, intermediate=64, layers=1), name, lambda t: t * float("nan"))
    with pytest.raises(NumericsError, match=name):
        qc.calibrate(folder, tmp_path / "stats.safetensors", samples=1, seq_len=8, device="cpu")
    with pytest.raises(NumericsError, match=name):
        qc.evaluate(folder, samples=1, seq_len=8, device="cpu")


@pytest.mark.parametrize("method", TINY_IN_F16)
def test_a_matrix_below_the_scales_of_its_format_is_named(tiny_llama: TinyLlama, tmp_path: Path, method: str) -> None:
    name = LAYER + "mlp.up_proj.weight"
    folder = edited(tiny_llama(hidden=256, intermediate=256, layers=1), name, lambda t: (t.float() * 1e-7).to(t.dtype))
    result = coded(folder, tmp_path, method)
    assert name in result.lost
    assert any("lost: its relative error is" in note for note in result.noted[name])


@pytest.mark.parametrize("method", ["nf4", "mxfp4", "fp8-dynamic"])
def test_a_format_with_wide_scales_keeps_such_a_matrix(tiny_llama: TinyLlama, tmp_path: Path, method: str) -> None:
    folder = edited(
        tiny_llama(hidden=256, intermediate=256, layers=1), LAYER + "mlp.up_proj.weight", lambda t: (t.float() * 1e-7).to(t.dtype)
    )
    assert not coded(folder, tmp_path, method).lost


@pytest.mark.parametrize("method", ["gptq-int4", "nf4", "q4_k_m"])
def test_a_matrix_of_zeros_passes_and_is_named(tiny_llama: TinyLlama, tmp_path: Path, method: str) -> None:
    name = LAYER + "mlp.up_proj.weight"
    result = coded(edited(tiny_llama(hidden=256, intermediate=256, layers=1), name, torch.zeros_like), tmp_path, method)
    assert name not in result.lost
    assert any("all its weights are zero" in note for note in result.noted[name])


def test_a_weight_that_only_the_text_hides_is_told_as_lost(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    """Eight tokens leave GPTQ free in most directions: its error by H is small, and its weights are wrong."""
    name = LAYER + "mlp.up_proj.weight"
    folder = edited(tiny_llama(hidden=256, intermediate=256, layers=1), name, lambda t: (t.float() * 1e-7).to(t.dtype))
    events = run(folder, tmp_path / "out", "gptq-int4", qc.Windows(IDS[:1, :8]))
    (report,) = [r for e in events if isinstance(e, qc.LayerDone) for r in e.tensors if r.name == name]
    assert report.relative_error < 0.5 < report.loss
    record = json.loads((tmp_path / "out" / "quantcli.json").read_text())["tensors"][name]
    assert any("lost" in note for note in record["notes"])
