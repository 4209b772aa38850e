"""transformers and gptqmodel as the second hand: they load our GPTQ folders and find the perplexity that we find.

Needs a Python with both (and optimum) at QUANTCLI_GPTQMODEL_PYTHON; tests/PEERS.md says how to make one.
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from quantcli import evaluate, pipeline, recipe, texts
from quantcli.checkpoint import Checkpoint
from quantcli.forward import tokenizer
from quantcli.recipe import Recipe, Rule
from quantcli.tensors import Scheme

pytestmark = pytest.mark.peer

PYTHON = os.environ.get("QUANTCLI_GPTQMODEL_PYTHON")
if PYTHON is None:
    pytest.skip("QUANTCLI_GPTQMODEL_PYTHON names no Python with transformers and gptqmodel", allow_module_level=True)

HERE = Path(__file__).parent
PICO = HERE / "data/pico"
SYM4 = Scheme.parse("int4-g128-sym")

OWN_LOADER = ("int4-g128-sym, down_proj in 8 bits",)
"""transformers asks optimum, which does not know ``dynamic``; gptqmodel's own loader does, and computes in 16 bits."""

CASES: dict[str, tuple[Scheme, tuple[Rule, ...]]] = {
    "int4-g128-sym": (SYM4, ()),
    "int4-g128-sym, desc_act": (SYM4.with_options(desc_act=True), ()),
    "int4-g128-asym": (Scheme.parse("int4-g128-asym"), ()),
    "int4-g32-asym, desc_act": (Scheme.parse("int4-g32-asym").with_options(desc_act=True), ()),
    "int4-channel-sym": (Scheme.parse("int4-channel-sym"), ()),
    "int2-g32-asym": (Scheme.parse("int2-g32-asym"), ()),
    "int3-g128-sym": (Scheme.parse("int3-g128-sym"), ()),
    "int3-g64-asym": (Scheme.parse("int3-g64-asym"), ()),
    "int8-g128-sym": (Scheme.parse("int8-g128-sym"), ()),
    "int8-g128-asym": (Scheme.parse("int8-g128-asym"), ()),
    "int4-g128-sym, o_proj left dense": (SYM4, (Rule.parse("o_proj", "keep"),)),
    "int4-g128-sym, down_proj in 8 bits": (SYM4, (Rule.parse("down_proj", "int8-g128-sym"),)),
}


def recipe_of(case: str) -> Recipe:
    scheme, rules = CASES[case]
    return replace(recipe.default_for("gptq"), scheme=scheme, rules=rules)


def quantized(model: Checkpoint, target: Path, how: Recipe, windows: torch.Tensor) -> int:
    """Write ``target``; how many tensors were coded."""

    def calibrate() -> pipeline.Calibrated:
        return pipeline.Calibrated(dataset_sha256=texts.sha256(windows), windows=windows)

    events = list(pipeline.quantize(model, target, how, calibrate=calibrate))
    assert isinstance(events[0], pipeline.Planned)
    return events[0].plan.census()["quantized"]


def ask_client(windows_file: Path, words: list[str]) -> list[dict[str, Any]]:
    """What the client says of each LOADER=FOLDER, all in one process: its imports take longer than its work."""
    answers = windows_file.with_name("answers.json")
    command = [str(PYTHON), str(HERE / "gptq_client.py"), str(windows_file), str(answers), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: list[dict[str, Any]] = json.loads(answers.read_text())
    return found


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Case → {"ours": perplexity, "n_coded", "theirs": the client's answer}."""
    root = tmp_path_factory.mktemp("peer-gptq")
    with Checkpoint.open(str(PICO)) as model:
        words = tokenizer(model)
        learned = texts.windows([texts.default_text()], words, n_samples=16, seq_len=128, seed=0)
        measured = texts.eval_windows(texts.default_eval_text(), words, n_samples=8, seq_len=256)
        found = {}
        for i, case in enumerate(CASES):
            n_coded = quantized(model, root / str(i), recipe_of(case), learned)
            with Checkpoint.open(str(root / str(i))) as back:
                found[case] = {"ours": evaluate.perplexity(back, measured).perplexity, "n_coded": n_coded}
    save_file({"windows": measured}, root / "windows.safetensors")
    loaders = ["gptqmodel" if case in OWN_LOADER else "transformers" for case in CASES]
    theirs = ask_client(root / "windows.safetensors", [f"{loader}={root / str(i)}" for i, loader in enumerate(loaders)])
    for case, answer in zip(CASES, theirs, strict=True):
        found[case]["theirs"] = answer
    return found


@pytest.mark.parametrize("case", CASES)
def test_the_client_loads_every_coded_linear_and_finds_our_perplexity(case: str, answers: dict[str, dict[str, Any]]) -> None:
    ours, theirs = answers[case], answers[case]["theirs"]
    assert "error" not in theirs, theirs["error"]
    assert sum(theirs["kernels"].values()) == ours["n_coded"]
    assert theirs["perplexity"] == pytest.approx(ours["ours"], rel=1e-3 if case in OWN_LOADER else 1e-4)


def test_the_cases_differ_by_more_than_the_tolerance(answers: dict[str, dict[str, Any]]) -> None:
    """Or the test above could not tell a folder from its neighbour."""
    measured = sorted(answer["ours"] for answer in answers.values())
    assert measured[-1] > 1.1 * measured[0]
