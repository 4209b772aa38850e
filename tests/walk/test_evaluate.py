"""Perplexity and KL divergence equal those of whole models in float64; both walks stay within their memory."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantcli import recipe
from quantcli.calibration.data import Windows
from quantcli.errors import NumericsError, RecipeError
from quantcli.formats import open_checkpoint
from quantcli.ops import round_inputs
from quantcli.recipe import Rule
from quantcli.tensors import Scheme
from quantcli.walk import evaluate as evaluation
from quantcli.walk import pipeline
from quantcli.walk.evaluate import LayerWalked, Scores, compare, evaluate, perplexity
from support.tiny_models import TinyLlama

IDS = torch.randint(2, 512, (5, 48), generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def folder(tiny_llama: TinyLlama) -> Path:
    return tiny_llama(hidden=64, intermediate=128, layers=3, dtype="float32")


@pytest.fixture(scope="module")
def noisy(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with noise on its linears, as rounding would put there."""
    generator = torch.Generator().manual_seed(5)

    def shake(tensors: dict[str, Tensor]) -> None:
        for name, W in tensors.items():
            if name.endswith("_proj.weight"):
                W += 0.05 * W.std() * torch.randn(W.shape, generator=generator)

    return changed(folder, tmp_path_factory.mktemp("noisy"), shake)


def changed(folder: Path, copy: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    tensors = load_file(copy / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors")
    return copy


def whole_log_probabilities(folder: Path) -> Tensor:
    """[n, T, vocab] float64 of the whole model: the judge."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return torch.log_softmax(model(input_ids=IDS).logits.double(), -1)


def whole_nll(folder: Path) -> Tensor:
    logp = whole_log_probabilities(folder)
    return -logp[:, :-1].gather(2, IDS[:, 1:, None]).flatten()


def score(folder: Path, baseline: Path | None = None, ids: Tensor = IDS) -> Scores:
    with open_checkpoint(str(folder)) as model:
        if baseline is None:
            return perplexity(model, ids)
        with open_checkpoint(str(baseline)) as reference:
            return compare(model, reference, ids)


def test_perplexity_equals_that_of_the_whole_model(folder: Path) -> None:
    scores = score(folder)
    nll = whole_nll(folder)
    assert scores.perplexity == pytest.approx(math.exp(nll.mean()), rel=1e-5)
    assert scores.perplexity_stderr == pytest.approx(math.exp(nll.mean()) * float(nll.std()) / math.sqrt(len(nll)), rel=1e-4)
    assert (scores.n_tokens, scores.seq_len) == (5 * 47, 48)
    assert scores.kld_mean is None


def test_divergence_and_agreement_equal_those_of_the_whole_models(folder: Path, noisy: Path) -> None:
    scores = score(noisy, folder)
    p, q = whole_log_probabilities(folder), whole_log_probabilities(noisy)
    kld = (p.exp() * (p - q)).sum(-1).flatten().numpy()
    assert 1e-4 < kld.mean() < 1
    assert scores.kld_mean == pytest.approx(kld.mean(), rel=1e-4)
    assert scores.kld_p99 == pytest.approx(np.quantile(kld, 0.99), rel=1e-4)
    assert scores.kld_max == pytest.approx(kld.max(), rel=1e-4)
    assert scores.top1_agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert 0.5 < (scores.top1_agreement or 0) < 1
    assert scores.perplexity == pytest.approx(math.exp(whole_nll(noisy).mean()), rel=1e-5)
    assert scores.baseline_perplexity == pytest.approx(math.exp(whole_nll(folder).mean()), rel=1e-5)


def test_layer_errors_equal_those_of_the_whole_models_hidden_states(folder: Path, noisy: Path) -> None:
    scores = score(noisy, folder)
    models = [transformers.AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32).model for f in (folder, noisy)]
    with torch.no_grad():
        b, h = (m(input_ids=IDS, output_hidden_states=True).hidden_states for m in models)
    expected = {f"model.layers.{i}": float((h[i + 1] - b[i + 1]).square().sum() / b[i + 1].square().sum()) for i in range(2)}
    assert list(scores.layer_errors) == ["model.layers.0", "model.layers.1", "model.layers.2"]
    for name, error in expected.items():  # the last hidden state that transformers gives is past the final norm
        assert scores.layer_errors[name] == pytest.approx(error, rel=1e-3)


def test_a_model_does_not_diverge_from_itself(folder: Path) -> None:
    scores = score(folder, folder)
    assert (scores.kld_mean, scores.kld_max, scores.top1_agreement) == (0, 0, 1)
    assert scores.perplexity == scores.baseline_perplexity
    assert set(scores.layer_errors.values()) == {0}


def test_windows_beyond_the_memory_limit_take_more_walks_with_the_same_result(
    folder: Path, noisy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = score(noisy, folder)
    monkeypatch.setattr(evaluation, "MAX_HIDDEN_BYTES", 2 * 2 * 48 * 64 * 4)  # two windows of both models
    monkeypatch.setattr(evaluation, "LOGITS_AT_ONCE", 10 * 512)  # ten tokens
    with open_checkpoint(str(noisy)) as model, open_checkpoint(str(folder)) as baseline:
        *walked, scores = evaluate(model, IDS, baseline=baseline)
    assert isinstance(scores, Scores)
    events = [e for e in walked if isinstance(e, LayerWalked)]
    assert [(e.index, e.n_layers) for e in events] == [(i, 9) for i in range(9)]
    assert scores.n_tokens == expected.n_tokens
    assert scores.to_dict().keys() == expected.to_dict().keys()
    for key in ("perplexity", "perplexity_stderr", "kld_mean", "kld_p99", "kld_max", "top1_agreement"):
        assert getattr(scores, key) == pytest.approx(getattr(expected, key), rel=1e-4), key
    for name, error in expected.layer_errors.items():
        assert scores.layer_errors[name] == pytest.approx(error, rel=1e-6)


def test_the_json_has_the_keys_of_the_command_line(folder: Path) -> None:
    alone = {"perplexity", "perplexity_stderr", "n_tokens", "seq_len", "activations"}
    both = {"baseline_perplexity", "kld_mean", "kld_p99", "kld_max", "top1_agreement", "layers"}
    assert score(folder, ids=IDS[:1]).to_dict().keys() == alone
    data = score(folder, folder, IDS[:1]).to_dict()
    assert data.keys() == alone | both
    json.dumps(data, allow_nan=False)


def test_a_probability_of_zero_adds_nothing_to_the_divergence(folder: Path, tmp_path: Path) -> None:
    """Logits far apart: most of the vocabulary has probability zero in float64."""
    sharp = changed(folder, tmp_path, lambda tensors: tensors["lm_head.weight"].mul_(1e4))
    scores = score(sharp, sharp)
    assert scores.kld_mean == 0
    assert math.isfinite(score(folder, sharp).kld_mean or math.nan)


SCHEMES = ["int8-channel-sym+int8-token", "int8-channel-sym+int8-tensor", "fp8-tensor+fp8-tensor", "nvfp4+nvfp4-g16", "llm_int8"]


@pytest.fixture(scope="module", params=SCHEMES)
def rounded(request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model in a scheme whose engine rounds inputs; one linear stays dense."""
    scheme = Scheme.parse(request.param)
    target = tmp_path_factory.mktemp("rounded") / "out"
    base = recipe.load("llm-int8" if scheme.qtype == "llm_int8" else "fp8-dynamic")
    how = replace(base, scheme=scheme, rules=(Rule.parse("layers.1.*o_proj", "keep"),))
    with open_checkpoint(str(folder)) as model:
        list(pipeline.quantize(model, target, how, data=Windows(IDS)))
    return target


def nll_with_rounded_inputs(rounded: Path, folder: Path) -> Tensor:
    """The whole dense model with the decoded weights, and a hook on each coded linear."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    files = load_file(rounded / "model.safetensors")
    with open_checkpoint(str(rounded)) as checkpoint:
        for name, scheme in checkpoint.schemes.items():
            module = name.removesuffix(".weight")
            linear = model.get_submodule(module)
            linear.weight.data = checkpoint.read(name)
            scale = files.get(f"{module}.input_scale", files.get(f"{module}.input_global_scale"))
            linear.register_forward_pre_hook(partial(_round, str(scheme.get("act", "llm-int8")), scale))
    with torch.no_grad():
        logp = torch.log_softmax(model(input_ids=IDS).logits.double(), -1)
    return -logp[:, :-1].gather(2, IDS[:, 1:, None]).flatten()


def _round(act: str, scale: Tensor | None, _module: torch.nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (round_inputs(inputs[0], act, scale),)


def test_linears_read_what_their_engine_rounds_their_inputs_to(rounded: Path, folder: Path) -> None:
    with open_checkpoint(str(rounded)) as model:
        found, weights_alone = perplexity(model, IDS), perplexity(model, IDS, activations=False)
        assert len(model.schemes) == 20
    assert found.perplexity == pytest.approx(math.exp(nll_with_rounded_inputs(rounded, folder).mean()), rel=1e-6)
    assert abs(found.perplexity / weights_alone.perplexity - 1) > 1e-5
    assert (found.activations, weights_alone.activations) == ("simulated", "none")
    assert found.to_dict()["activations"] == "simulated"
    assert found.not_simulated == ()


def test_the_loss_of_rounded_inputs_is_in_every_figure(rounded: Path, folder: Path) -> None:
    with open_checkpoint(str(rounded)) as model, open_checkpoint(str(folder)) as baseline:
        found, weights_alone = (compare(model, baseline, IDS, activations=on) for on in (True, False))
    assert (found.kld_mean or 0) > (weights_alone.kld_mean or 0)
    for name, error in weights_alone.layer_errors.items():
        assert found.layer_errors[name] > error


def test_a_model_whose_engine_takes_inputs_as_they_are_is_run_so(folder: Path, noisy: Path) -> None:
    assert score(noisy).activations == "none"
    with open_checkpoint(str(noisy)) as model:
        assert evaluation.rounded_inputs(model) == {}


def test_inputs_that_cannot_be_reached_are_told_of(rounded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation.Forward, "on_read", lambda *_: False)
    with open_checkpoint(str(rounded)) as model:
        found = perplexity(model, IDS)
        assert set(found.not_simulated) == set(model.schemes)
    assert found.activations == "none"


def test_logits_that_are_nan_are_an_error(folder: Path, tmp_path: Path) -> None:
    damaged = changed(folder, tmp_path, lambda tensors: tensors["lm_head.weight"][7].fill_(math.nan))
    with pytest.raises(NumericsError, match="logits"):
        score(damaged)


def test_models_of_different_shape_cannot_be_compared(folder: Path, tiny_llama: TinyLlama) -> None:
    other = tiny_llama(hidden=64, intermediate=128, layers=2)
    with pytest.raises(RecipeError, match="layers is 3 in the one and 2 in the other"):
        score(folder, other)


def test_a_window_of_one_token_leaves_nothing_to_predict(folder: Path) -> None:
    with pytest.raises(RecipeError, match="nothing to predict"):
        score(folder, ids=IDS[:, :1])
