"""The pico model that ships with the tests: trained, so that quantization hurts it, and the walk's quality can be held to figures."""

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
from quantcli.formats.gguf.file.headers import read_header
from quantcli.forward import tokenizer
from quantcli.text import texts
from quantcli.walk.evaluate import Scores, compare, perplexity
from support.places import DATA, PICO
from support.runs import run

MANIFEST = DATA / "pico-q4_k_m.json"
N_SAMPLES, SEQ_LEN = 32, 256


@pytest.fixture(scope="module")
def held_out() -> torch.Tensor:
    with open_checkpoint(str(PICO)) as source:
        return texts.eval_windows(texts.default_eval_text(), tokenizer(source), n_samples=24, seq_len=SEQ_LEN)


def calibration() -> Windows:
    with open_checkpoint(str(PICO)) as source:
        windows = texts.windows([texts.default_text()], tokenizer(source), n_samples=N_SAMPLES, seq_len=SEQ_LEN)
    return Windows(windows)


def quantize(target: Path, recipe: recipes.Recipe) -> Path:
    run(PICO, target, recipe, calibration())
    return target


def divergence(target: Path, windows: torch.Tensor) -> Scores:
    with open_checkpoint(str(target)) as output, open_checkpoint(str(PICO)) as source:
        return compare(output, source, windows)


def test_the_pico_model_has_learned_its_text(held_out: torch.Tensor) -> None:
    with open_checkpoint(str(PICO)) as source:
        assert perplexity(source, held_out).perplexity < 40


def test_gptq_loses_less_than_half_of_what_plain_rounding_loses(tmp_path: Path, held_out: torch.Tensor) -> None:
    kld = {}
    for name in ("rtn-int4", "gptq-int4"):
        recipe = recipes.load(name)
        kld[name] = divergence(quantize(tmp_path / name, recipe), held_out).kld_mean
    minmax = replace(recipes.load("rtn-int4"), scheme=recipes.load("rtn-int4").scheme.with_options(search="minmax"))
    kld["minmax"] = divergence(quantize(tmp_path / "minmax", minmax), held_out).kld_mean
    assert 0.001 < kld["gptq-int4"] < 0.5 * kld["minmax"]
    assert kld["gptq-int4"] < 0.6 * kld["rtn-int4"]
    assert kld["rtn-int4"] < kld["minmax"]


def test_gptq_on_k_quants_loses_less_than_llama_cpps_own_rounding(tmp_path: Path, held_out: torch.Tensor) -> None:
    plain = recipes.load("q4_k_m")
    corrected = replace(plain, passes=recipes.default_for("gptq").passes)
    kld = [divergence(quantize(tmp_path / f"{i}.gguf", recipe), held_out).kld_mean for i, recipe in enumerate((plain, corrected))]
    assert kld[1] < 0.75 * kld[0]
    sizes = [sum(spec.nbytes for spec in read_header(tmp_path / f"{i}.gguf").specs.values()) for i in range(2)]
    assert sizes[0] == sizes[1]


def test_the_q4_k_m_file_has_the_tensors_that_llama_quantize_writes(tmp_path: Path) -> None:
    """The manifest was taken from convert_hf_to_gguf (bf16) + llama-quantize: names, types, shapes, sha256 of the data."""
    assert manifest(quantize(tmp_path / "pico.gguf", recipes.load("q4_k_m"))) == json.loads(MANIFEST.read_text())
