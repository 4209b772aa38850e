"""What llama.cpp has no key for: told, or refused where the file would be another model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from quantcli import archs
from quantcli.errors import UnsupportedError
from quantcli.formats import gguf, open_checkpoint
from quantcli.formats.gguf.model import losses
from quantcli.walk.evaluate import compare
from support import families
from support.gguf_export import edit_config, export

LATER = {"use_sliding_window": True, "sliding_window": 64, "num_hidden_layers": 4, "max_position_embeddings": 512}


def told(config: dict[str, Any]) -> tuple[str, ...]:
    arch = archs.of(config)
    assert arch is not None
    return losses.told(arch, config)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "mistral", "sliding_window": 64, "max_position_embeddings": 512},
        {"model_type": "mistral", "max_position_embeddings": 32768},  # for which transformers takes 4096
        {"model_type": "mixtral", "sliding_window": 64, "max_position_embeddings": 512},
        {"model_type": "qwen2", **LATER, "max_window_layers": 2},
        {"model_type": "qwen3", **LATER, "layer_types": ["full_attention"] * 3 + ["sliding_attention"]},
        {"model_type": "qwen3_moe", **LATER, "norm_topk_prob": True},
        {"model_type": "smollm3", **LATER, "layer_types": ["sliding_attention"] * 4},
    ],
)
def test_a_window_that_llama_cpp_does_not_know_is_told(config: dict[str, Any]) -> None:
    (note,) = told(config)
    assert f"the window of {config.get('sliding_window', 4096)} tokens" in note
    assert "attends to the whole text" in note


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "mistral", "sliding_window": None, "max_position_embeddings": 32768},
        {"model_type": "mistral", "sliding_window": 4096, "max_position_embeddings": 4096},
        {"model_type": "mixtral", "max_position_embeddings": 32768},
        {"model_type": "llama", "sliding_window": 64, "max_position_embeddings": 512},  # whose attention has none
        {"model_type": "qwen2", "sliding_window": 64, "max_position_embeddings": 512, "use_sliding_window": False, "num_hidden_layers": 4},
        {"model_type": "qwen2", "sliding_window": 64, "max_position_embeddings": 512, "num_hidden_layers": 4},
        {"model_type": "qwen3", **LATER, "max_window_layers": 4},
        {"model_type": "qwen3", **LATER},  # fewer layers than the 28 that have none
        {"model_type": "gemma3_text", "sliding_window": 64, "max_position_embeddings": 512},  # which has a key
    ],
)
def test_without_a_window_there_is_nothing_to_tell(config: dict[str, Any]) -> None:
    assert told(config) == ()


def test_the_note_is_part_of_the_plan(tmp_path: Path) -> None:
    folder = edit_config(families.make("mistral", tmp_path / "m"), sliding_window=16)
    with open_checkpoint(str(folder)) as source:
        assert any("the window of 16 tokens" in note for note in gguf.FORMAT.layout(source, {}).notes)


@pytest.mark.parametrize("value", [False, None])
def test_experts_whose_weights_do_not_add_up_to_one_are_refused(tmp_path: Path, value: bool | None) -> None:
    folder = families.make("qwen3_moe", tmp_path / "m")
    families.publish(folder / "config.json", {"norm_topk_prob": value})
    with open_checkpoint(str(folder)) as source, pytest.raises(UnsupportedError, match=r"norm_topk_prob is .*choose another --format"):
        export(source, tmp_path / "m.gguf", "F16", pre_tokenizer="gpt-2")


def test_heads_whose_halves_are_rotated_are_refused(tmp_path: Path) -> None:
    folder = edit_config(families.make("deepseek v3", tmp_path / "m"), rope_interleave=False)
    with (
        open_checkpoint(str(folder)) as source,
        pytest.raises(UnsupportedError, match=r"rope_interleave is False.*choose another --format"),
    ):
        export(source, tmp_path / "m.gguf", "F16", pre_tokenizer="gpt-2")


def divergence_after(folder: Path, case: str) -> float:
    """KL(folder ‖ its export as F32) on random tokens."""
    ids = torch.randint(3, 300, (2, 32), generator=torch.Generator().manual_seed(0))
    with open_checkpoint(str(folder)) as source:
        path = export(source, folder.with_suffix(".gguf"), "F32", **families.options(case))
        with open_checkpoint(str(path)) as back:
            return compare(back, source, ids).kld_mean or 0.0


def test_llama_3s_scaling_takes_the_context_where_the_old_one_is_not_told(tmp_path: Path) -> None:
    """As transformers does: 8192, which the published models have, would be another table."""
    folder = families.make("llama 3.2", tmp_path / "m")
    rope = {key: value for key, value in families.LLAMA3.items() if key != "original_max_position_embeddings"}
    assert divergence_after(edit_config(folder, rope_parameters=rope), "llama 3.2") < 1e-9


@pytest.mark.parametrize("words", [{"num_kv_heads": 2}, {"num_key_value_heads": 2}, {"num_kv_heads": -1}])
def test_key_heads_beside_multi_query_mean_nothing(tmp_path: Path, words: dict[str, int]) -> None:
    """One key serves all queries of such a Falcon, whatever number its config.json gives."""
    folder = edit_config(families.make("falcon 7b", tmp_path / "m"), **words)
    assert divergence_after(folder, "falcon 7b") < 1e-6


def test_a_familys_own_word_counts_more_than_the_usual_one(tmp_path: Path) -> None:
    """transformers' Falcon knows num_kv_heads alone."""
    folder = edit_config(families.make("falcon 40b", tmp_path / "m"), num_key_value_heads=4)
    assert divergence_after(folder, "falcon 40b") < 1e-6


@pytest.mark.parametrize(
    ("case", "key", "width"),
    [("gpt2", "n_inner", 160), ("falcon 7b", "ffn_hidden_size", 96), ("falcon 40b", "ffn_hidden_size", 320)],
)
def test_an_mlp_of_another_width_goes_to_the_file_and_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, key: str, width: int
) -> None:
    wider = families.Case(families.CASES[case].model_type, {**families.CASES[case].config, key: width}, families.CASES[case].published)
    monkeypatch.setitem(families.CASES, case, wider)
    ids = torch.randint(3, 300, (2, 32), generator=torch.Generator().manual_seed(0))
    with open_checkpoint(str(families.make(case, tmp_path / "m"))) as source:
        assert source.config[key] == width
        path = export(source, tmp_path / "m.gguf", "F32", **families.options(case))
        with open_checkpoint(str(path)) as back:
            arch = families.CASES[case].model_type
            assert back.file_metadata[f"{arch}.feed_forward_length"].value == width
            assert back.config[key] == width
            back.config["rope_parameters"] = source.config.get("rope_parameters", back.config["rope_parameters"])
            assert (compare(back, source, ids).kld_mean or 0.0) < 1e-9
