"""A model whose rows are no multiple of 256: the file types of 256-weight blocks work on it, by llama-quantize's fallbacks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data.make_manifest import manifest
from quantcli import recipe as recipes
from quantcli.calibration.data import Windows
from quantcli.formats import open_checkpoint
from quantcli.walk.evaluate import compare
from support import odd_llama
from support.places import DATA
from support.runs import run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return odd_llama.write(tmp_path_factory.mktemp("odd"))


def windows(seed: int) -> torch.Tensor:
    return torch.randint(512, (16, 64), generator=torch.Generator().manual_seed(seed))


def quantize(folder: Path, target: Path, recipe: recipes.Recipe) -> Path:
    run(folder, target, recipe, Windows(windows(0)))
    return target


@pytest.mark.parametrize("name", ["q4_k_m", "q5_k_m"])
def test_the_file_has_the_tensors_that_llama_quantize_writes(name: str, folder: Path, tmp_path: Path) -> None:
    """The manifests were taken from convert_hf_to_gguf (bf16) + llama-quantize: names, types, shapes, sha256 of the data."""
    written = manifest(quantize(folder, tmp_path / "odd.gguf", recipes.load(name)))
    assert written == json.loads((DATA / f"odd-{name}.json").read_text())
    fallback = {"q4_k_m": "Q5_0", "q5_k_m": "Q5_1"}[name]
    assert {ggml_type for ggml_type, _, _ in written.values()} == {"F32", fallback, "Q8_0"}


@pytest.mark.parametrize("name", ["q4_k_m", "q5_k_m", "q4_1"])
def test_gptq_on_the_fallbacks_grids_loses_less_than_rounding(name: str, folder: Path, tmp_path: Path) -> None:
    plain = recipes.load(name)
    corrected = replace(plain, passes=recipes.default_for("gptq").passes)
    kld = []
    for i, recipe in enumerate((plain, corrected)):
        quantized = quantize(folder, tmp_path / f"{i}.gguf", recipe)
        with open_checkpoint(str(quantized)) as output, open_checkpoint(str(folder)) as source:
            kld.append(compare(output, source, windows(1)).kld_mean)
    assert kld[1] < 0.95 * kld[0]
    types = [{name: found[0] for name, found in manifest(tmp_path / f"{i}.gguf").items()} for i in range(2)]
    assert types[0] == types[1]
