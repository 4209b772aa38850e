"""transformers as the second hand: it loads our FP8 folders and finds the perplexity that we find; compressed-tensors makes our bytes.

Needs a Python with both at QUANTCLI_TRANSFORMERS_PYTHON; tests/PEERS.md says how to make one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import quantcli as qc
from quantcli import qtypes
from quantcli.formats import open_checkpoint
from quantcli.forward import tokenizer
from quantcli.tensors import Scheme
from quantcli.text import texts
from quantcli.walk import evaluate
from support.places import PICO, TESTS

pytestmark = pytest.mark.peer

PYTHON = os.environ.get("QUANTCLI_TRANSFORMERS_PYTHON")
if PYTHON is None:
    pytest.skip("QUANTCLI_TRANSFORMERS_PYTHON names no Python with transformers", allow_module_level=True)

RECIPES = ("fp8-block", "fp8-tensor", "fp8-tensor-static")
THEIR_NAMES = {".weight_scale": ".weight_scale_inv", ".input_scale": ".activation_scale"}
"""vLLM's names of one scale a weight, and transformers', which reads no others."""


def run(script: str, *arguments: str) -> None:
    done = subprocess.run([str(PYTHON), str(TESTS / script), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def renamed(folder: Path, target: Path) -> Path:
    """A copy of ``folder`` under transformers' names."""
    shutil.copytree(folder, target)
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        stem, dot, word = name.rpartition(".")
        tensors[stem + THEIR_NAMES.get(dot + word, dot + word)] = tensor
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Recipe → our and the client's {"perplexity", "weights": {weight: sum of magnitudes}}."""
    root = tmp_path_factory.mktemp("peer-fp8")
    folders: dict[str, Path] = {}
    ours: dict[str, dict[str, Any]] = {}
    with open_checkpoint(str(PICO)) as model:
        words = tokenizer(model)
        learned = texts.windows([texts.default_text()], words, n_samples=8, seq_len=128, seed=0)
        measured = texts.eval_windows(texts.default_eval_text(), words, n_samples=8, seq_len=256)
        for name in RECIPES:
            qc.quantize(model, root / name, name, data=qc.Windows(learned), device="cpu")
            folders[name] = root / name if name == "fp8-block" else renamed(root / name, root / f"{name}-renamed")
    for name, folder in folders.items():
        ours[name] = seen(root / name, measured)
        assert seen(folder, measured) == ours[name], "our reader sees the same under either name"
    save_file({"windows": measured}, root / "windows.safetensors")
    asked = [f"fp8={folder}" for folder in folders.values()]
    run("support/transformers_client.py", str(root / "windows.safetensors"), str(root / "answers.json"), *asked)
    theirs = json.loads((root / "answers.json").read_text())
    return {name: (ours[name], answer) for name, answer in zip(folders, theirs, strict=True)}


def seen(folder: Path, windows: torch.Tensor) -> dict[str, Any]:
    """What our own reader makes of ``folder``, in the client's words."""
    with open_checkpoint(str(folder)) as back:
        sums = {name: float(back.read(name).double().abs().sum()) for name in back.schemes}
        # transformers decodes FP8 on a CPU and then takes inputs as they are.
        return {"perplexity": evaluate.perplexity(back, windows, activations=False).perplexity, "weights": sums}


@pytest.mark.parametrize("name", RECIPES)
def test_transformers_decodes_our_weights_and_finds_our_perplexity(
    name: str, answers: dict[str, tuple[dict[str, Any], dict[str, Any]]]
) -> None:
    ours, theirs = answers[name]
    assert "error" not in theirs, theirs["error"]
    assert theirs["weights"] == pytest.approx(ours["weights"], rel=1e-12)
    assert theirs["perplexity"] == pytest.approx(ours["perplexity"], rel=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_compressed_tensors_makes_our_bytes(seed: int, tmp_path: Path) -> None:
    run("data/make_minifloat.py", str(tmp_path / "found.safetensors"), str(100 + seed))
    found = load_file(tmp_path / "found.safetensors")
    for name in sorted({key.split("/")[0] for key in found} - {"W"}):
        scheme = Scheme.parse(f"{name}-minmax" if name in ("mxfp4", "nvfp4") else name)
        W = found["W"].bfloat16() if name.endswith("bf16") else found["W"]
        for part, ours in qtypes.of(scheme.qtype).encode(W, scheme).parts.items():
            theirs = found[f"{name}/{part}"]
            assert theirs.dtype == ours.dtype
            assert torch.equal(theirs.view(torch.uint8), ours.view(torch.uint8)), f"{name}: {part}"
