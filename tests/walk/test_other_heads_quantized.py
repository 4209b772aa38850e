"""Models that are no causal LMs, quantized: the linears of their blocks coded, the rest as it was, their outputs near the source's."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import quantcli as qc
from quantcli import recipe as recipes
from quantcli.cli.eval import check_gates, render
from quantcli.errors import GateError, UnsupportedError
from quantcli.formats import open_checkpoint
from quantcli.tensors import Scheme
from quantcli.walk.evaluate import compare
from support.other_heads import ALL, LISTED, VOCABULARY, load, outputs, save
from support.runs import run
from support.tiny_models import byte_level_bpe

WINDOWS = torch.randint(3, VOCABULARY, (16, 32), generator=torch.Generator().manual_seed(1))
DATA_FREE = [*((name, "nf4") for name in ALL), ("BertModel", "fp8-dynamic"), ("T5ForConditionalGeneration", "fp8-dynamic")]
SEVERAL = ("BertForMaskedLM", "ModernBertForMaskedLM", "Qwen3ForSequenceClassification", "Qwen3Model")
CALIBRATED = [(name, recipe) for name in SEVERAL for recipe in ("gptq-int4", "awq-int4")]
CALIBRATED += [("BertForMaskedLM", recipe) for recipe in ("fp8-static", "smoothquant-w8a8")]
HEADS = re.compile(r"(?:^|\.)(?:classifier|score|pooler|pre_classifier|head|cls|lm_head|predictions)\.")
EMBEDDINGS = re.compile(r"embed|shared|relative_attention_bias|final_logits_bias")


def small(name: str) -> qc.Recipe:
    """The shipped recipe, in groups of 32 where it has groups of 128, which the tests' models are too narrow for."""
    recipe = recipes.load(name)
    return replace(recipe, scheme=Scheme.parse(str(recipe.scheme).replace("g128", "g32")))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).square().sum() / b.square().sum())


def check_output(source: Path, target: Path, within: float | None) -> set[str]:
    """The names of ``target`` are the source's, its outputs, as transformers computes them, near; ``within``: its decoded weights, too, and
    the others equal. Returns the names of the coded."""
    with open_checkpoint(str(source)) as was, open_checkpoint(str(target)) as made:
        assert made.specs.keys() == was.specs.keys()
        for name in was.specs if within is not None else ():
            if name in made.schemes:
                assert relative(made.read(name).float(), was.read(name).float()) < within, name
            else:
                assert torch.equal(made.read(name), was.read(name)), name
        assert made.config["architectures"] == was.config["architectures"]
        coded = set(made.schemes)
    qc.export(target, target.with_name("decoded"), format="hf", device="cpu")
    assert relative(outputs(load(target.with_name("decoded"))), outputs(load(source))) < 0.2
    return coded


def block_matrices(source: Path, name: str) -> set[str]:
    """The linears in the blocks of the model in ``source``, by their shape and place."""
    with open_checkpoint(str(source)) as checkpoint:
        numbered = {n: spec for n, spec in checkpoint.specs.items() if re.search(r"\.\d+\.", f".{n}") and n.endswith(".weight")}
        linears = {n for n, spec in numbered.items() if len(spec.shape) == 2 and not EMBEDDINGS.search(n) and not HEADS.search(n)}
    return {n for n in linears if not n.endswith("DenseReluDense.wo.weight")}  # which T5 keeps in float32


@pytest.mark.parametrize(("name", "recipe"), DATA_FREE)
def test_recipes_without_calibration_code_the_linears_of_the_blocks(name: str, recipe: str, tmp_path: Path) -> None:
    source = save(name, tmp_path / "source")
    run(source, tmp_path / "out", recipe)
    coded = check_output(source, tmp_path / "out", 0.02)
    assert coded == block_matrices(source, name)
    assert coded


@pytest.mark.parametrize(("name", "recipe"), CALIBRATED)
def test_calibrated_recipes_code_the_same_linears(name: str, recipe: str, tmp_path: Path) -> None:
    source = save(name, tmp_path / "source")
    *_, finished = run(source, tmp_path / "out", small(recipe), qc.Windows(WINDOWS))
    assert finished.text_check is None
    is_rescaled = recipe.startswith(("awq", "smoothquant"))  # which leave the function, not each weight, near the source's
    assert check_output(source, tmp_path / "out", None if is_rescaled else 0.05) == block_matrices(source, name)


@pytest.mark.parametrize("name", LISTED)
def test_calibrated_recipes_refuse_what_cannot_be_run_layer_by_layer(name: str, tmp_path: Path) -> None:
    source = save(name, tmp_path / "source")
    with pytest.raises(UnsupportedError):
        run(source, tmp_path / "out", small("gptq-int4"), qc.Windows(WINDOWS))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "head"), [("Qwen3ForSequenceClassification", "score"), ("BertForSequenceClassification", "classifier")])
def test_heads_are_excluded_in_quantization_config(name: str, head: str, tmp_path: Path) -> None:
    source = save(name, tmp_path / "source")
    for recipe, key in (("fp8-dynamic", "ignore"), ("nf4", "llm_int8_skip_modules")):
        run(source, tmp_path / recipe, recipe)
        assert head in json.loads((tmp_path / recipe / "config.json").read_text())["quantization_config"][key]


def test_one_calibration_serves_an_encoder(tmp_path: Path) -> None:
    source = save("BertForMaskedLM", tmp_path / "source", byte_level_bpe(VOCABULARY))
    text = tmp_path / "text.txt"
    text.write_text("some words of a text that says little\n" * 200)
    made = qc.calibrate(source, tmp_path / "stats.safetensors", data=text, samples=16, seq_len=32, device="cpu")
    assert made.text_check is None
    assert made.to_dict()["calibration_perplexity"] is None
    assert made.taps == 8  # of each layer: what enters, the attention's output, what the wide linear and the narrow one read
    run(source, tmp_path / "out", small("gptq-int4"), qc.StatsFile(tmp_path / "stats.safetensors"))
    assert len(check_output(source, tmp_path / "out", 0.05)) == 12


@pytest.mark.parametrize("name", ["BertForMaskedLM", "Qwen3ForSequenceClassification"])
def test_a_model_that_predicts_no_token_is_compared_by_its_layers(name: str, tmp_path: Path) -> None:
    source = save(name, tmp_path / "source")
    run(source, tmp_path / "out", "nf4")
    with open_checkpoint(str(tmp_path / "out")) as made, open_checkpoint(str(source)) as was:
        scores = compare(made, was, WINDOWS)
        same = compare(was, was, WINDOWS)
    assert scores.perplexity is None
    assert scores.kld_mean is None
    assert scores.n_tokens == WINDOWS.numel()
    assert all(1e-4 < error < 0.1 for error in scores.layer_errors.values())
    assert set(same.layer_errors.values()) == {0.0}
    told: dict[str, Any] = scores.to_dict() | {"n_bytes": 1, "bpw": 4.5}
    assert told["perplexity"] is None
    assert [layer["name"] for layer in told["layers"]] == list(scores.layer_errors)
    first, *_ = render(told)
    assert re.fullmatch(r"hidden states   relative error \d\.\d\de-\d\d after the last layer over 512 tokens \(no perplexity\)", first)
    for limits in ((10.0, None), (None, 0.1)):
        with pytest.raises(GateError, match="predicts no next token"):
            check_gates(scores, *limits)
    check_gates(scores, None, None)


def test_a_model_that_predicts_no_token_has_no_perplexity(tmp_path: Path) -> None:
    source = save("BertForMaskedLM", tmp_path / "source", byte_level_bpe(VOCABULARY))
    evaluate = partial(qc.evaluate, source, samples=2, seq_len=16, device="cpu")
    with pytest.raises(UnsupportedError, match="BertForMaskedLM predicts no next token, so it has no perplexity; give --baseline"):
        evaluate()
    assert evaluate(baseline=source).perplexity is None


def test_a_tagged_number_of_config_json_is_written_as_it_was_read(tmp_path: Path) -> None:
    """transformers 5 writes {"__float__": "Infinity"} where JSON has no such number."""
    sizes: dict[str, Any] = {"num_hidden_layers": 1, "head_dim": 32, "num_heads": 4, "state_size": 16, "n_groups": 1, "hidden_size": 64}
    config = transformers.Mamba2Config(vocab_size=VOCABULARY, **sizes, pad_token_id=1, bos_token_id=0, eos_token_id=1)
    transformers.Mamba2ForCausalLM(config).save_pretrained(tmp_path / "source")
    run(tmp_path / "source", tmp_path / "out", "nf4")
    text = (tmp_path / "out/config.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["time_step_limit"] == [0.0, {"__float__": "Infinity"}]
    json.loads((tmp_path / "out/quantcli.json").read_text(), parse_constant=pytest.fail)
    assert tuple(transformers.AutoConfig.from_pretrained(tmp_path / "out").time_step_limit) == (0.0, math.inf)
