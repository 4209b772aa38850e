"""What the tests of GPTQ and AWQ against transformers and gptqmodel share: folders of the pico model, and the client that measures them."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from torch import Tensor

import quantcli as qc
from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.formats import open_checkpoint
from quantcli.forward import tokenizer
from quantcli.recipe import Recipe
from quantcli.text import texts
from quantcli.walk import evaluate
from support.places import PICO, SUPPORT

PYTHON = os.environ.get("QUANTCLI_GPTQMODEL_PYTHON")
Answer = dict[str, Any]


def skip_without_peer() -> None:
    if PYTHON is None:
        pytest.skip("QUANTCLI_GPTQMODEL_PYTHON names no Python with transformers and gptqmodel", allow_module_level=True)


def windows_of_pico(model: Checkpoint) -> tuple[Tensor, Tensor]:
    """(to calibrate on, to measure on)."""
    words = tokenizer(model)
    learned = texts.windows([texts.default_text()], words, n_samples=16, seq_len=128, seed=0)
    return learned, texts.eval_windows(texts.default_eval_text(), words, n_samples=8, seq_len=256)


def quantized(model: Checkpoint, target: Path, how: Recipe, windows: Tensor) -> int:
    """Write ``target``; how many tensors were coded."""
    return qc.quantize(model, target, how, data=qc.Windows(windows), device="cpu").plan.census()["quantized"]


def run(script: str, *words: str | Path, where: Path) -> None:
    """One of the scripts beside this one, in the peer's Python and in the folder ``where``, which gptqmodel fills with logs."""
    done = subprocess.run([str(PYTHON), str(SUPPORT / script), *map(str, words)], capture_output=True, text=True, check=False, cwd=where)
    assert done.returncode == 0, done.stderr[-2000:]


def ask_client(windows_file: Path, words: Sequence[str]) -> list[Answer]:
    """What the client says of each LOADER=FOLDER, all in one process: its imports take longer than its work."""
    answers = windows_file.with_name("answers.json")
    run("gptq_client.py", windows_file, answers, *words, where=windows_file.parent)
    found: list[Answer] = json.loads(answers.read_text())
    return found


def measured_by_both(root: Path, recipes: Mapping[str, Recipe], loaders: Mapping[str, str]) -> dict[str, Answer]:
    """Case → {"ours": perplexity, "n_coded", "theirs": the client's answer}; ``loaders``: case → transformers or gptqmodel."""
    found: dict[str, Answer] = {}
    with open_checkpoint(str(PICO)) as model:
        learned, measured = windows_of_pico(model)
        for i, (case, how) in enumerate(recipes.items()):
            n_coded = quantized(model, root / str(i), how, learned)
            with open_checkpoint(str(root / str(i))) as back:
                assert back.notes == ()
                found[case] = {"ours": evaluate.perplexity(back, measured).perplexity, "n_coded": n_coded}
    save_file({"windows": measured}, root / "windows.safetensors")
    theirs = ask_client(root / "windows.safetensors", [f"{loaders[case]}={root / str(i)}" for i, case in enumerate(recipes)])
    for case, answer in zip(recipes, theirs, strict=True):
        found[case]["theirs"] = answer
    return found


def ask(root: Path, windows: Tensor, loader: str, folder: Path) -> Answer:
    """What the client says of one folder."""
    save_file({"windows": windows}, root / "windows.safetensors")
    (answer,) = ask_client(root / "windows.safetensors", [f"{loader}={folder}"])
    return answer


def read_what_they_made(method: str, root: Path) -> tuple[float, Answer]:
    """(our perplexity, transformers' answer) of the pico model as gptqmodel itself quantized it."""
    with open_checkpoint(str(PICO)) as model:
        learned, measured = windows_of_pico(model)
    save_file({"windows": learned[:4]}, root / "learned.safetensors")
    run("gptqmodel_maker.py", method, PICO, root / "learned.safetensors", root / "theirs", where=root)
    answer = ask(root, measured, "transformers", root / "theirs")
    assert "error" not in answer, answer["error"]
    with open_checkpoint(str(root / "theirs")) as back:
        assert back.kind == method
        assert back.notes == ()
        assert len(back.schemes) == sum(answer["kernels"].values())
        return evaluate.perplexity(back, measured).perplexity, answer
