"""lm_head on request: measured, coded by the recipe's passes, and told to engines; a tied one becomes a tensor of its own."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from quantcli import recipe
from quantcli.calibration import calibrate, measuring
from quantcli.calibration.data import Windows
from quantcli.errors import RecipeError
from quantcli.formats import open_checkpoint
from quantcli.forward import HiddenStates
from quantcli.planning.arrange import open_forward
from quantcli.recipe import PassSpec, Rule
from quantcli.statistics.stats_file import StatsFile
from quantcli.tensors import Scheme
from quantcli.walk import pipeline
from quantcli.walk.evaluate import compare
from quantcli.walk.pipeline import Finished, LayerDone
from support.runs import run
from support.tiny_models import TinyLlama

IDS = torch.randint(2, 512, (16, 40), generator=torch.Generator().manual_seed(3))
HEAD = "lm_head.weight"
SCHEMES = {"gptq": "int4-g64-sym", "compressed-tensors": "int4-g64-sym", "bitsandbytes": "nf4-b64"}


@pytest.fixture(scope="module")
def folder(tiny_llama: TinyLlama) -> Path:
    return tiny_llama(hidden=64, intermediate=128, layers=2)


quantize = partial(run, data=Windows(IDS))


def with_head(format_: str, method: str = "gptq", **changes: Any) -> recipe.Recipe:
    scheme = SCHEMES[format_]
    base = replace(recipe.load("gptq-int4"), format=format_, passes=(PassSpec(method),), scheme=Scheme.parse(scheme))
    return replace(base, rules=(Rule.parse("lm_head", scheme),), **changes)


def head_error(events: list[pipeline.Event]) -> float:
    return next(e.relative_error for e in events if isinstance(e, LayerDone) and e.name == HEAD)


@pytest.mark.parametrize("format_", SCHEMES)
def test_the_head_is_solved_like_any_linear(folder: Path, tmp_path: Path, format_: str) -> None:
    errors = {}
    for method in ("gptq", "rtn"):
        events = quantize(folder, tmp_path / method, with_head(format_, method))
        assert isinstance(events[0], pipeline.Planned)
        assert not any("rounded to nearest" in note for note in events[0].plan.notes)
        with open_checkpoint(str(tmp_path / method)) as output, open_checkpoint(str(folder)) as source:
            assert HEAD in output.schemes
            forward = open_forward(output)
            states = HiddenStates.embed(forward, IDS)
            for i in range(len(forward.layers)):
                with forward.layer(i) as layer:
                    states.advance(layer)
            H = measuring.measure_head(forward, states)["lm_head"].H.double()
            W, W_hat = source.read(HEAD).double(), output.read(HEAD).double()
        errors[method] = float((((W - W_hat) @ H) * (W - W_hat)).sum() / ((W @ H) * W).sum())
        if method == "gptq":  # measured behind the layers as quantized, on the last layer's output
            assert head_error(events) == pytest.approx(errors[method], rel=1e-3)
    assert errors["gptq"] < 0.9 * errors["rtn"]


def test_statistics_have_the_heads_inputs_and_serve(folder: Path, tmp_path: Path) -> None:
    with open_checkpoint(str(folder)) as source:
        list(calibrate.calibrate(source, IDS, tmp_path / "with.safetensors", head=True))
        list(calibrate.calibrate(source, IDS, tmp_path / "without.safetensors"))
    stats = StatsFile(tmp_path / "with.safetensors")
    events = quantize(folder, tmp_path / "out", with_head("gptq"), data=stats)
    assert isinstance(events[-1], Finished)
    rounded = quantize(folder, tmp_path / "rtn", with_head("gptq", "rtn"))
    assert 0 < head_error(events) < head_error(rounded)
    old = StatsFile(tmp_path / "without.safetensors")
    with pytest.raises(RecipeError, match=r"lm_head.weight: the statistics have no tap 'lm_head'"):
        quantize(folder, tmp_path / "no", with_head("gptq"), data=old)


def test_a_ggufs_head_is_error_corrected_too(folder: Path, tmp_path: Path) -> None:
    """Its file type says what it becomes: nobody need ask."""
    base = replace(recipe.load("q8_0"), passes=(PassSpec("gptq"),))
    events = quantize(folder, tmp_path / "gptq.gguf", base)
    nearest = quantize(folder, tmp_path / "rtn.gguf", recipe.load("q8_0"))
    assert 0 < head_error(events) < 0.9 * head_error(nearest)


@pytest.mark.parametrize("name", ["awq-w4a16", "smoothquant-w8a8"])
def test_a_change_of_basis_leaves_the_heads_inputs_alone(folder: Path, tmp_path: Path, name: str) -> None:
    """The final norm lies in no layer; what is left of the method, its search of scales, serves the head too."""
    base = recipe.load(name)
    base = base.with_scheme(group_size=64) if name.startswith("awq") else base
    events = quantize(folder, tmp_path / "out", replace(base, rules=(Rule.parse("lm_head", str(base.scheme)),)))
    (report,) = next(e.tensors for e in events if isinstance(e, LayerDone) and e.name == HEAD)
    assert 0 < report.relative_error < 0.02
    assert any("nothing that makes its inputs can absorb a scale" in note for note in report.notes)
    with open_checkpoint(str(tmp_path / "out")) as output, open_checkpoint(str(folder)) as source:
        assert HEAD in output.schemes
        assert torch.equal(output.read("model.norm.weight"), source.read("model.norm.weight"))


def test_asymmetric_calibration_reaches_the_head(folder: Path, tmp_path: Path) -> None:
    outputs = []
    for alpha in (0.0, 0.5):
        how = replace(with_head("gptq"), passes=(PassSpec("gptq", {"gptaq_alpha": alpha}),), rules=(Rule.parse("lm_head", "int4-g64-sym"),))
        events = quantize(folder, tmp_path / str(alpha), how)
        notes = [note for e in events if isinstance(e, LayerDone) for report in e.tensors for note in report.notes]
        assert not any("plain GPTQ" in note for note in notes)
        with open_checkpoint(str(tmp_path / str(alpha))) as output:
            outputs.append(output.read(HEAD))
    assert not torch.equal(*outputs)


def test_without_a_rule_the_head_stays_as_it_is(folder: Path, tmp_path: Path) -> None:
    quantize(folder, tmp_path / "out", replace(with_head("gptq"), rules=()))
    with open_checkpoint(str(tmp_path / "out")) as output, open_checkpoint(str(folder)) as source:
        assert HEAD not in output.schemes
        assert torch.equal(output.read(HEAD), source.read(HEAD))


def test_a_gptq_folder_tells_engines_of_its_head_even_where_it_lists_modules(folder: Path, tmp_path: Path) -> None:
    how = with_head("gptq")
    quantize(folder, tmp_path / "out", replace(how, rules=(*how.rules, Rule.parse("o_proj", "keep"))))
    words = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert words["lm_head"] is True
    with open_checkpoint(str(folder)) as source:
        planned, *_ = pipeline.quantize(source, tmp_path / "dry", how, dry_run=True)
    assert any("transformers 5 leaves it at random numbers" in note for note in planned.plan.notes)
    assert ["lm_head"] in words["modules_in_block_to_quantize"]  # which vLLM flattens, and takes no other module for quantized


@pytest.fixture(scope="module")
def tied(tiny_llama: TinyLlama) -> Path:
    return tiny_llama(hidden=64, intermediate=128, layers=1, tied=True)


@pytest.fixture(scope="module")
def untied(tied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with an lm_head of its own."""
    folder = tmp_path_factory.mktemp("untied") / "model"
    shutil.copytree(tied, folder)
    config = json.loads((tied / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {HEAD: weights["model.embed_tokens.weight"].clone()}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("format_", SCHEMES)
def test_a_tied_head_with_a_rule_becomes_what_an_untied_one_does(tied: Path, untied: Path, tmp_path: Path, format_: str) -> None:
    planned, *_ = quantize(tied, tmp_path / "tied", with_head(format_))
    quantize(untied, tmp_path / "untied", with_head(format_))
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("tied", "untied")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(tensor, files[1][name]) for name, tensor in files[0].items())
    words = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("tied", "untied")]
    for each in words:  # GPTQ's says where the model came from
        each["quantization_config"].pop("meta", None)
    assert words[0] == words[1]
    assert words[0]["tie_word_embeddings"] is False
    assert isinstance(planned, pipeline.Planned)
    assert any("lm_head.weight is written beside model.embed_tokens.weight" in note for note in planned.plan.notes)
    assert json.loads((tmp_path / "tied/quantcli.json").read_text())["untied"] == "model.embed_tokens.weight"
    with open_checkpoint(str(tmp_path / "tied")) as output, open_checkpoint(str(tied)) as source:
        assert HEAD in output.schemes
        assert torch.equal(output.read("model.embed_tokens.weight"), source.read("model.embed_tokens.weight"))
        scores = compare(output, source, IDS)
    assert scores.kld_mean is not None
    assert 0 < scores.kld_mean < 0.5


def test_statistics_of_a_tied_model_serve_the_head_it_gets(tied: Path, tmp_path: Path) -> None:
    with open_checkpoint(str(tied)) as source:
        list(calibrate.calibrate(source, IDS, tmp_path / "stats.safetensors", head=True))
    stats = StatsFile(tmp_path / "stats.safetensors")
    events = quantize(tied, tmp_path / "out", with_head("gptq"), data=stats)
    assert 0 < head_error(events) < 0.1


def test_a_gguf_of_a_tied_model_has_an_output_where_a_rule_names_it(tied: Path, untied: Path, tmp_path: Path) -> None:
    types = {}
    for name, model, pattern in (("tied", tied, "lm_head"), ("untied", untied, "lm_head"), ("all", tied, "."), ("none", tied, None)):
        base = recipe.load("q8_0")
        quantize(model, tmp_path / f"{name}.gguf", base if pattern is None else replace(base, rules=(Rule.parse(pattern, "q4_0"),)))
        types[name] = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / f"{name}.gguf").tensors}
    assert types["tied"] == types["untied"]
    assert types["tied"]["output.weight"] == "Q4_0"
    assert types["tied"]["token_embd.weight"] == "Q8_0"
    assert "output.weight" not in types["all"]  # a rule for both asks for no second matrix
    assert types["all"]["token_embd.weight"] == "Q4_0"
    assert "output.weight" not in types["none"]


def test_a_rule_that_gives_a_tied_head_no_codes_is_refused_with_the_reason(tied: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is its input embedding"):
        quantize(tied, tmp_path / "out", replace(with_head("gptq"), rules=(Rule.parse("lm_head", "keep"),)))


def test_hqq_solves_the_head_by_hqq(folder: Path, tmp_path: Path) -> None:
    """A pass that needs no statistics is no reason to round."""
    base = replace(recipe.load("hqq-int4"), format="gptq")
    how = replace(base, rules=(Rule.parse("lm_head", str(base.scheme)),))
    with open_checkpoint(str(folder)) as source:
        planned, *_ = pipeline.quantize(source, tmp_path / "out", how, dry_run=True)
    assert next(t for t in planned.plan.tensors if t.name == HEAD).is_solved
