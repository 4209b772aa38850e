"""Embedding models as GGUF: how one vector is made of a text, the end token, and names without a first part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from safetensors.torch import load_file, save_file

import quantcli as qc
from quantcli.formats.gguf.model.pooling import pooling_of
from support import families

TRANSFORMER = {"path": "", "type": "sentence_transformers.models.Transformer"}
NORMALIZE = {"path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}


def pooled(path: str, kind: str = "sentence_transformers.models.Pooling") -> dict[str, str]:
    return {"path": path, "type": kind}


@pytest.fixture
def embedder(tmp_path: Path) -> Path:
    """A Qwen3 saved without its head, as sentence-transformers does, with a tokenizer that ends every text."""
    folder = families.make("qwen3", tmp_path / "embedder")
    weights = load_file(folder / "model.safetensors")
    base = {name.removeprefix("model."): tensor for name, tensor in weights.items() if name != "lm_head.weight"}
    save_file(base, folder / "model.safetensors", metadata={"format": "pt"})
    families.publish(folder / "config.json", {"tie_word_embeddings": True})
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    text, end = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<|end_of_text|>", "type_id": 0}}
    special = {"<|end_of_text|>": {"id": "<|end_of_text|>", "ids": [1], "tokens": ["<|end_of_text|>"]}}
    tokenizer["post_processor"] = {"type": "TemplateProcessing", "single": [text, end], "pair": [text, end], "special_tokens": special}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def described(
    folder: Path, modules: list[dict[str, str]], pooling: dict[str, Any] | None, target: Path
) -> tuple[gguf.GGUFReader, list[str]]:
    """The F16 file of ``folder`` with sentence-transformers' files, and the notes of its plan."""
    (folder / "modules.json").write_text(json.dumps(modules))
    if pooling is not None:
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    result = qc.export(folder, target, "F16", device="cpu")
    return gguf.GGUFReader(target), [note for note in result.plan.notes if "ooling" in note or "GGUF" in note]


def value(reader: gguf.GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


def test_the_last_tokens_state_is_the_vector_and_a_text_ends_with_its_end(embedder: Path, tmp_path: Path) -> None:
    pooling = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True}
    reader, notes = described(embedder, [TRANSFORMER, pooled("1_Pooling"), NORMALIZE], pooling, tmp_path / "m.gguf")
    assert value(reader, "qwen3.pooling_type") == gguf.PoolingType.LAST
    assert value(reader, "tokenizer.ggml.add_eos_token") is True
    assert {"token_embd.weight", "output_norm.weight", "blk.0.attn_q.weight"} <= {tensor.name for tensor in reader.tensors}
    assert notes == []


@pytest.mark.parametrize(
    ("config", "pooling"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_lasttoken": False, "word_embedding_dimension": 8}, 1),
        ({"pooling_mode_cls_token": True}, 2),
        ({"pooling_mode_lasttoken": True}, 3),
        ({"pooling_mode": "lasttoken"}, 3),
        ({"pooling_mode": "mean"}, 1),
        ({"pooling_mode_max_tokens": True}, None),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, None),
        ({}, None),
    ],
)
def test_a_pooling_has_llama_cpps_number(config: dict[str, Any], pooling: int | None) -> None:
    assert pooling_of(config) == pooling


def test_what_llama_cpp_lacks_is_told(embedder: Path, tmp_path: Path) -> None:
    modules = [TRANSFORMER, pooled("1_Pooling"), pooled("2_Dense", "sentence_transformers.models.Dense")]
    reader, notes = described(embedder, modules, {"pooling_mode_max_tokens": True}, tmp_path / "m.gguf")
    assert value(reader, "qwen3.pooling_type") is None
    assert len(notes) == 2
    assert "1_Pooling/config.json names no pooling that llama.cpp has" in notes[0]
    assert "Dense (2_Dense) of modules.json has no place in GGUF" in notes[1]


def test_a_pooling_whose_file_is_missing_is_told(embedder: Path, tmp_path: Path) -> None:
    reader, notes = described(embedder, [TRANSFORMER, pooled("1_Pooling")], None, tmp_path / "m.gguf")
    assert value(reader, "qwen3.pooling_type") is None
    assert ["1_Pooling/config.json is missing" in note for note in notes] == [True]


def test_a_snapshot_of_the_hub_is_called_by_its_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = families.make("llama", tmp_path / "made")
    folder = tmp_path / "models--acme--Tiny-Words-2B" / "snapshots" / ("0123456789" * 4)
    folder.parent.mkdir(parents=True)
    made.rename(folder)
    monkeypatch.chdir(tmp_path)
    result = qc.export(folder, type="F16", device="cpu")
    assert result.path == Path("Tiny-Words-2B-F16.gguf")
    reader = gguf.GGUFReader(result.path)
    told = {key: field.contents() for key, field in reader.fields.items() if key.startswith("general.")}
    assert told["general.name"] == "Tiny Words 2B"
    assert not any("0123456789" in str(text) for text in told.values())
