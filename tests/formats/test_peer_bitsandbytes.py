"""transformers, bitsandbytes and peft as the second hand: they load our folders, train on them, and write the bytes that we write.

Needs a Python with the three at QUANTCLI_BITSANDBYTES_PYTHON; tests/PEERS.md says how to make one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import quantcli as qc
from quantcli import recipe
from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.cli import main
from quantcli.formats import open_checkpoint
from quantcli.forward import tokenizer
from quantcli.recipe import Recipe, Rule
from quantcli.tensors import Scheme
from quantcli.text import texts
from quantcli.walk import evaluate
from support.places import DATA, PICO, TESTS

pytestmark = pytest.mark.peer

PYTHON = os.environ.get("QUANTCLI_BITSANDBYTES_PYTHON")
if PYTHON is None:
    pytest.skip("QUANTCLI_BITSANDBYTES_PYTHON names no Python with transformers, bitsandbytes and peft", allow_module_level=True)

RTN = recipe.load("nf4").passes

CASES: dict[str, Recipe] = {
    **{name: recipe.load(name) for name in ("nf4", "nf4-dq", "fp4", "llm-int8")},
    "nf4-b32": Recipe("x", "bitsandbytes", RTN, scheme=Scheme.parse("nf4-b32")),
    "fp4-b4096-dq": Recipe("x", "bitsandbytes", RTN, scheme=Scheme.parse("fp4-b4096-dq")),
    "nf4, o_proj left dense": Recipe("x", "bitsandbytes", RTN, scheme=Scheme.parse("nf4-b64"), rules=(Rule.parse("o_proj", "keep"),)),
    "nf4, the tied head too": Recipe("x", "bitsandbytes", RTN, scheme=Scheme.parse("nf4-b64"), rules=(Rule.parse("lm_head", "nf4-b64"),)),
    "nf4, down_proj in fp4": Recipe(
        "x", "bitsandbytes", RTN, scheme=Scheme.parse("nf4-b64"), rules=(Rule.parse("down_proj", "fp4-b128-dq"),)
    ),
}
PEERS_OWN = {"nf4": "nf4", "nf4-dq": "nf4-dq", "fp4": "fp4", "int8": "llm-int8"}
"""The client's task → our recipe."""


@dataclass(frozen=True, slots=True)
class Answers:
    """``ours``: perplexity by case; ``theirs``: what the client says of TASK=folder; ``root``: where the folders are."""

    root: Path
    ours: dict[str, float]
    n_coded: dict[str, int]
    theirs: dict[str, dict[str, Any]]


def quantized(model: Checkpoint, target: Path, how: Recipe) -> int:
    """Write ``target``; how many tensors were coded."""
    return qc.quantize(model, target, how, device="cpu").plan.census()["quantized"]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    root = tmp_path_factory.mktemp("peer-bitsandbytes")
    shutil.copytree(PICO, root / "pico")
    ours, n_coded = {}, {}
    with open_checkpoint(str(PICO)) as model:
        windows = texts.eval_windows(texts.default_eval_text(), tokenizer(model), n_samples=4, seq_len=256)
        for i, (case, how) in enumerate(CASES.items()):
            n_coded[case] = quantized(model, root / str(i), how)
            with open_checkpoint(str(root / str(i))) as back:
                ours[case] = evaluate.perplexity(back, windows).perplexity
    save_file({"windows": windows}, root / "windows.safetensors")
    tasks = {f"perplexity {case}": f"perplexity={root / str(i)}" for i, case in enumerate(CASES)}
    tasks |= {f"qlora {case}": f"qlora={root / str(i)}" for i, case in enumerate(CASES) if case in ("nf4", "nf4-dq")}
    tasks |= {f"save {task}": f"{task}={root / 'pico'}" for task in PEERS_OWN}
    command = [str(PYTHON), str(TESTS / "support/bitsandbytes_client.py"), str(root / "windows.safetensors"), str(root / "answers.json")]
    done = subprocess.run([*command, *tasks.values()], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = dict(zip(tasks, json.loads((root / "answers.json").read_text()), strict=True))
    return Answers(root, ours, n_coded, theirs)


@pytest.mark.parametrize("case", CASES)
def test_transformers_loads_every_coded_linear_and_finds_our_perplexity(case: str, answers: Answers) -> None:
    theirs = answers.theirs[f"perplexity {case}"]
    assert "error" not in theirs, theirs["error"]
    kind = "Linear8bitLt" if case == "llm-int8" else "Linear4bit"
    assert theirs["linears"] == {kind: answers.n_coded[case]}
    # LLM.int8's engine multiplies by 6.200124e-05 for 1/127², which is 6.200012e-05. That tips the rounding of inputs in the layers after:
    # 5e-6 more or less in ours moves the perplexity by 3e-4. As loaded, all is rounded to bfloat16.
    assert theirs["perplexity"] == pytest.approx(answers.ours[case], rel=1e-3 if case == "llm-int8" else 1e-5)
    assert theirs["as_loaded"] == pytest.approx(answers.ours[case], rel=5e-3)


def test_the_cases_differ_by_more_than_the_tolerance(answers: Answers) -> None:
    """Or the test above could not tell a folder from its neighbour."""
    measured = sorted(answers.ours.values())
    assert measured[-1] > 1.02 * measured[0]


@pytest.mark.parametrize("case", ["nf4", "nf4-dq"])
def test_a_qlora_step_lowers_the_loss(case: str, answers: Answers) -> None:
    theirs = answers.theirs[f"qlora {case}"]
    assert "error" not in theirs, theirs["error"]
    assert theirs["n_trained"] == 2 * answers.n_coded[case]
    losses = torch.tensor(theirs["losses"])
    assert bool((losses[1:] < losses[:-1]).all()), theirs["losses"]
    assert losses[-1] < 0.95 * losses[0]


def test_bitsandbytes_still_makes_the_golden_vectors(tmp_path: Path) -> None:
    """Against which test_qtype_nf4.py holds every type, block size and odd shape."""
    script = DATA / "make_bitsandbytes.py"
    subprocess.run([str(PYTHON), str(script), str(tmp_path / "new.safetensors")], check=True, capture_output=True)
    new, golden = load_file(tmp_path / "new.safetensors"), load_file(DATA / "bitsandbytes.safetensors")
    assert new.keys() == golden.keys()
    assert [name for name, tensor in golden.items() if not torch.equal(new[name], tensor)] == []


@pytest.mark.parametrize("task", PEERS_OWN)
def test_transformers_own_folder_has_our_bytes_and_goes_through_export_unchanged(task: str, answers: Answers) -> None:
    saved = answers.theirs[f"save {task}"]
    assert "error" not in saved, saved["error"]
    theirs = load_file(Path(saved["folder"]) / "model.safetensors")
    ours = load_file(answers.root / str(list(CASES).index(PEERS_OWN[task])) / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        if "quant_state" in name:  # its text may end in spaces: its length was announced before the offset was known
            assert bytes(ours[name].tolist()).rstrip() == bytes(tensor.tolist()), name
        else:
            assert ours[name].dtype == tensor.dtype, name
            assert torch.equal(ours[name], tensor), name
    target = answers.root / f"again-{task}"
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["export", saved["folder"], "--format", "bitsandbytes", "-o", str(target), "-q"])
    again = load_file(target / "model.safetensors")
    assert again.keys() == theirs.keys()
    assert all(torch.equal(again[name], tensor) and again[name].dtype == tensor.dtype for name, tensor in theirs.items())
