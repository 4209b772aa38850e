"""Every family of ``archs/`` goes to GGUF as llama.cpp's own converter writes it (written down in tests/data/families), and comes back."""

from __future__ import annotations

import json
from pathlib import Path

import families
import pytest
import torch
from families import CASES
from gguf_export import export

from quantcli import archs, cuts
from quantcli.checkpoint import Checkpoint
from quantcli.forward import Forward
from quantcli.plan import declared_taps


@pytest.fixture(scope="module")
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Case → its model folder; only of the cases that this run asks for."""
    root = tmp_path_factory.mktemp("families")
    asked = {item.callspec.params["case"] for item in request.session.items if item.module is request.module and hasattr(item, "callspec")}
    return {name: families.make(name, root / str(k) / "tiny") for k, name in enumerate(CASES) if name in asked}


@pytest.mark.parametrize("case", CASES)
def test_a_family_is_written_as_llama_cpp_writes_it(models: dict[str, Path], case: str, tmp_path: Path) -> None:
    with Checkpoint.open(str(models[case])) as source:
        found = families.manifest(export(source, tmp_path / "m.gguf", "BF16", pre_tokenizer="gpt-2"))
    golden = json.loads(families.golden(case).read_text())
    assert found["tensors"] == golden["tensors"]
    assert list(found["tensors"]) == list(golden["tensors"])
    assert found["fields"] == golden["fields"]


@pytest.mark.parametrize("case", CASES)
def test_a_family_comes_back_from_its_file(models: dict[str, Path], case: str, tmp_path: Path) -> None:
    with Checkpoint.open(str(models[case])) as source:
        wanted = cuts.unfused(source)
        with Checkpoint.open(str(export(source, tmp_path / "m.gguf", "F32", pre_tokenizer="gpt-2"))) as back:
            assert back.specs.keys() == wanted.specs.keys()
            for name in wanted.specs:
                assert torch.equal(back.read(name), wanted.read(name).float()), name


@pytest.mark.parametrize("case", CASES)
def test_declared_taps_are_the_traced_ones(models: dict[str, Path], case: str) -> None:
    with Checkpoint.open(str(models[case])) as source:
        assert declared_taps(cuts.unfused(source)) == dict(Forward(source).taps)


@pytest.mark.parametrize("case", CASES)
def test_missing_words_mean_what_the_familys_config_class_takes(models: dict[str, Path], case: str) -> None:
    """Where a literal has defaults, they are transformers'."""
    from transformers import AutoConfig

    arch = archs.of({"model_type": CASES[case].model_type})
    assert arch is not None
    theirs = arch.usual(AutoConfig.for_model(CASES[case].model_type).to_dict())
    assert {word: theirs[word] for word in arch.defaults} == dict(arch.defaults)
