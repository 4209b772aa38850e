"""Every family of ``archs/`` goes to GGUF as llama.cpp's own converter writes it (written down in tests/data/families), and comes back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from quantcli import archs
from quantcli.calibration.data import Windows
from quantcli.errors import CheckpointError
from quantcli.formats import open_checkpoint
from quantcli.formats.gguf.model import metadata
from quantcli.planning.arrange import declared_taps, experts_apart, open_forward
from quantcli.recipe import parse
from quantcli.walk import pipeline
from quantcli.walk.evaluate import compare
from support import families
from support.families import CASES
from support.gguf_export import export
from support.gguf_files import u32
from support.gguf_rewriting import rewrite


@pytest.fixture(scope="module")
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Case → its model folder; only of the cases that this run asks for."""
    root = tmp_path_factory.mktemp("families")
    here = [item for item in request.session.items if item.module is request.module]
    asked = {item.callspec.params["case"] for item in here if hasattr(item, "callspec")} | {"falcon 40b"}
    return {name: families.make(name, root / str(k) / "tiny") for k, name in enumerate(CASES) if name in asked}


@pytest.mark.parametrize("case", [name for name, case in CASES.items() if not case.unconverted])
def test_a_family_is_written_as_llama_cpp_writes_it(models: dict[str, Path], case: str, tmp_path: Path) -> None:
    with open_checkpoint(str(models[case])) as source:
        found = families.manifest(export(source, tmp_path / "m.gguf", CASES[case].file_type, **families.options(case)))
    golden = json.loads(families.golden(case).read_text())
    assert found["tensors"] == golden["tensors"]
    assert list(found["tensors"]) == list(golden["tensors"])
    differing = CASES[case].differing
    assert {key: value for key, value in golden["fields"].items() if key not in differing} == found["fields"]


@pytest.mark.parametrize("case", CASES)
def test_a_family_comes_back_from_its_file(models: dict[str, Path], case: str, tmp_path: Path) -> None:
    """Every tensor, and every word of the config that transformers computes with."""
    from transformers import AutoConfig

    with open_checkpoint(str(models[case])) as source:
        wanted = experts_apart(source)
        with open_checkpoint(str(export(source, tmp_path / "m.gguf", "F32", **families.options(case)))) as back:
            assert not back.is_stored
            assert back.specs.keys() == wanted.specs.keys()
            for name in wanted.specs:
                torch.testing.assert_close(back.read(name), wanted.read(name).float(), rtol=0, atol=1e-7)  # Gemma's w + 1 - 1
            theirs, ours = (told(AutoConfig.for_model(**config).to_dict()) for config in (source.config, back.config))
            for word, value in CASES[case].lost.items():
                (theirs if word in theirs else theirs["rope_parameters"])[word] = value
            assert {key: ours.get(key) for key in theirs} == theirs


CUT = ["gpt2", "falcon 7b", "falcon 40b", "gpt-oss", "deepseek v2", "deepseek v3", "phi3, longrope"]


@pytest.mark.parametrize("case", CUT)
def test_what_comes_back_put_together_runs_as_its_source(models: dict[str, Path], case: str, tmp_path: Path) -> None:
    ids = torch.randint(3, 300, (2, 48), generator=torch.Generator().manual_seed(0))
    with open_checkpoint(str(models[case])) as source:
        for file_type, limit in (("F32", 1e-9), ("Q8_0", 1e-2)):
            with open_checkpoint(str(export(source, tmp_path / f"{file_type}.gguf", file_type, **families.options(case)))) as back:
                if CASES[case].lost:
                    back.config |= {word: source.config[word] for word in ("rope_parameters", *CASES[case].lost) if word in source.config}
                assert compare(back, source, ids).kld_mean < limit


@pytest.mark.parametrize("case", ["deepseek v3", "gpt-oss"])
def test_a_file_is_solved_onto_other_types_of_its_own_kind(models: dict[str, Path], case: str, tmp_path: Path) -> None:
    """Through Hugging Face's names, in which the model runs, and back: with the metadata that the file had."""
    ids = torch.randint(3, 300, (8, 64), generator=torch.Generator().manual_seed(0))
    how = parse({"format": "gguf", "passes": ["gptq"], "mix": "Q4_0", "calibration": {"min_tokens": 1}}, "small")
    with open_checkpoint(str(models[case])) as source:
        file = export(source, tmp_path / "a.gguf", "BF16", **families.options(case))
    with open_checkpoint(str(file)) as source:
        list(pipeline.quantize(source, tmp_path / "b.gguf", how, data=Windows(ids)))
        with open_checkpoint(str(tmp_path / "b.gguf")) as output:
            assert compare(output, source, ids).kld_mean < 0.2
    before, after = (families.manifest(path) for path in (file, tmp_path / "b.gguf"))
    assert before["tensors"].keys() == after["tensors"].keys()
    assert {k: v for k, v in after["fields"].items() if k not in ("general.file_type", "general.quantization_version")} == {
        k: v for k, v in before["fields"].items() if k not in ("general.file_type", "general.quantization_version")
    }


@pytest.mark.parametrize(
    ("case", "wrong"),
    [
        ("falcon 40b", {"falcon.attention.head_count_kv": u32(4)}),
        ("gpt2", {"gpt2.embedding_length": u32(32)}),
        ("deepseek v3", {"deepseek2.attention.key_length_mla": u32(40)}),
        ("phi3, longrope", {"phi3.rope.dimension_count": u32(8), "phi3.embedding_length": u32(32)}),
    ],
)
def test_metadata_that_does_not_fit_the_tensors_is_an_error(
    models: dict[str, Path], case: str, wrong: dict[str, Any], tmp_path: Path
) -> None:
    with open_checkpoint(str(models[case])) as source:
        file = export(source, tmp_path / "m.gguf", "F32", **families.options(case))
    with pytest.raises(CheckpointError, match="metadata gives"):
        open_checkpoint(str(rewrite(file, tmp_path / "wrong.gguf", fields=wrong)))


def test_heads_that_cannot_share_their_keys_leave_a_file_as_it_is(models: dict[str, Path], tmp_path: Path) -> None:
    with open_checkpoint(str(models["falcon 40b"])) as source:
        file = export(source, tmp_path / "m.gguf", "F32", **families.options("falcon 40b"))
    with open_checkpoint(str(rewrite(file, tmp_path / "odd.gguf", fields={"falcon.attention.head_count_kv": u32(3)}))) as odd:
        assert odd.is_stored
        assert "4 heads cannot share 3 heads of keys" in odd.notes[0]


def told(config: dict) -> dict:
    """What a model is computed by, of its config."""
    from transformers import AutoConfig

    other = ("dtype", "architectures", "pad_token_id", "bos_token_id", "eos_token_id", "use_cache", "original_max_position_embeddings")
    other += ("model_type", "partial_rotary_factor", "initializer_range", "rms_norm_eps", "layer_norm_eps")
    own = AutoConfig.for_model(config["model_type"]).to_dict().keys()  # these models' files have words of other families besides
    if "head_dim" in config and config["head_dim"] == config["hidden_size"] // config["num_attention_heads"]:
        config.pop("head_dim")
    known = {key: value for key, value in config.items() if key in own and key not in other}
    return json.loads(json.dumps(known), parse_float=lambda text: round(float(text), 5))


@pytest.mark.parametrize("case", CASES)
def test_declared_taps_are_the_traced_ones(models: dict[str, Path], case: str) -> None:
    if CASES[case].config.get("use_parallel_residual") or CASES[case].config.get("multi_query"):
        pytest.skip("attention and MLP read one norm here, of which the literal does not know: traced taps go before declared ones")
    with open_checkpoint(str(models[case])) as source:
        forward = open_forward(source)
        traced = {name: tap for name, tap in forward.taps.items() if name not in forward.turned}
        assert declared_taps(experts_apart(source)) == traced


@pytest.mark.parametrize("case", CASES)
def test_missing_words_mean_what_the_familys_config_class_takes(models: dict[str, Path], case: str) -> None:
    """Where a literal has defaults, they are transformers'."""
    from transformers import AutoConfig

    arch = archs.of({"model_type": CASES[case].model_type})
    assert arch is not None
    theirs = AutoConfig.for_model(CASES[case].model_type).to_dict()
    theirs |= {"rope_local_base_freq": metadata.window_base(theirs), **metadata.rope_parameters(theirs), **theirs}
    assert {word: theirs[word] for word in arch.defaults} == dict(arch.defaults)
