"""Every yes of the table in docs/engines.md: a program loads what a recipe makes of the pico model, with our perplexity.

Each reader needs its Python; tests/PEERS.md says how to make them. llama.cpp's column is tested in test_peer_llamacpp.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_file

import quantcli as qc
from quantcli import recipe as recipes
from quantcli.formats import open_checkpoint
from quantcli.forward import tokenizer
from quantcli.text import texts
from quantcli.walk import evaluate
from support.places import PICO, TESTS

sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))

import tables

pytestmark = pytest.mark.peer


CLIENTS: dict[tuple[str, str], tuple[str, str, str]] = {
    ("transformers 5.23", "gptq"): ("QUANTCLI_GPTQMODEL_PYTHON", "support/gptq_client.py", "transformers"),
    ("transformers 5.23", "awq"): ("QUANTCLI_GPTQMODEL_PYTHON", "support/gptq_client.py", "transformers"),
    ("transformers 5.23", "bitsandbytes"): ("QUANTCLI_BITSANDBYTES_PYTHON", "support/bitsandbytes_client.py", "perplexity"),
    ("transformers 5.23", "compressed-tensors"): ("QUANTCLI_TRANSFORMERS_PYTHON", "support/transformers_client.py", "float32"),
    ("transformers 5.23", "fp8"): ("QUANTCLI_TRANSFORMERS_PYTHON", "support/transformers_client.py", "fp8"),
    ("transformers 5.17", "compressed-tensors"): ("QUANTCLI_LLMCOMPRESSOR_PYTHON", "support/transformers_client.py", "float32"),
    ("GPTQModel 7.7", "gptq"): ("QUANTCLI_GPTQMODEL_PYTHON", "support/gptq_client.py", "gptqmodel"),
    ("GPTQModel 7.7", "awq"): ("QUANTCLI_GPTQMODEL_PYTHON", "support/gptq_client.py", "gptqmodel"),
}
"""(reader, format) → the variable that names its Python, the client that runs in it, and the client's word for how to load."""

WIDENED = ("mxfp4", "mxfp8", "nvfp4")
"""Number formats that compressed-tensors decodes in bfloat16, whatever the model's dtype: the client then turns all to float32."""

YES = [
    (reader, name)
    for reader in tables.releases(tested=True)
    for name in recipes.shipped()
    if tables.answer(reader, name) == "yes" and reader != "llama.cpp"
]

Answer = Callable[[str, str], tuple[float, float]]


def tolerance(reader: str, name: str) -> float:
    """How far the reader's perplexity may be from ours: its own way of quantizing activations, and 16-bit arithmetic, cost something."""
    recipe = recipes.load(name)
    if recipe.scheme is None or recipe.scheme.get("act") or recipe.scheme.qtype == "llm_int8":
        return 5e-3
    return 1e-3 if reader != "GPTQModel 7.7" else 2e-3  # whose own loader insists on 16 bits


@pytest.fixture(scope="module")
def answer(tmp_path_factory: pytest.TempPathFactory) -> Answer:
    """``answer(reader, recipe) -> (the reader's perplexity, ours)``; one run of a client serves all recipes of a format."""
    root = tmp_path_factory.mktemp("recipes")
    ours: dict[str, float] = {}
    theirs: dict[tuple[str, str], float | str] = {}
    with open_checkpoint(str(PICO)) as model:
        words = tokenizer(model)
        learned = texts.windows([texts.default_text()], words, n_samples=16, seq_len=128, seed=0)
        measured = texts.eval_windows(texts.default_eval_text(), words, n_samples=8, seq_len=256)
    save_file({"windows": measured}, root / "windows.safetensors")

    def make(name: str) -> Path:
        folder = root / name
        if name not in ours:
            qc.quantize(PICO, folder, name, data=qc.Windows(learned), device="cpu")
            with open_checkpoint(str(folder)) as back:
                assert back.notes == ()
                ours[name] = evaluate.perplexity(back, measured).perplexity
        return folder

    def ask(reader: str, format_: str) -> None:
        variable, script, how = CLIENTS[reader, format_]
        python = os.environ.get(variable)
        if python is None:
            pytest.skip(f"{variable} names no Python with {reader}")
        names = [name for told, name in YES if told == reader and recipes.load(name).format == format_]
        hows = {name: "widened" if str(recipes.load(name).scheme).startswith(WIDENED) else how for name in names}
        lines = [f"{hows[name]}={make(name)}" for name in names]
        target = root / "answers.json"
        done = subprocess.run(
            [python, str(TESTS / script), str(root / "windows.safetensors"), str(target), *lines],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        for name, found in zip(names, json.loads(target.read_text()), strict=True):
            theirs[reader, name] = found.get("error") or found["perplexity"]

    def get(reader: str, name: str) -> tuple[float, float]:
        if (reader, name) not in theirs:
            ask(reader, recipes.load(name).format)
        found = theirs[reader, name]
        assert isinstance(found, float), found
        return found, ours[name]

    return get


@pytest.mark.parametrize(("reader", "name"), YES)
def test_a_program_loads_what_a_recipe_writes_and_finds_our_perplexity(answer: Answer, reader: str, name: str) -> None:
    found, expected = answer(reader, name)
    assert found == pytest.approx(expected, rel=tolerance(reader, name))
