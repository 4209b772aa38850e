"""Models that are no causal LMs, layer by layer: equal to the whole model; which class is built; what is refused, and for what reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantcli.errors import CheckpointError, UnsupportedError
from quantcli.formats import open_checkpoint
from quantcli.forward import Forward
from quantcli.planning.arrange import open_forward
from support.other_heads import GROUPED, LISTED, OF_TEXT, SIZES, VOCABULARY, load, save

IDS = torch.randint(3, VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(1))


def opened(folder: Path) -> Forward:
    return open_forward(open_checkpoint(str(folder)))


def layer_by_layer(forward: Forward, ids: Tensor) -> Tensor:
    hidden = forward.embed(ids)
    for i in range(len(forward.layers)):
        with forward.layer(i) as layer:
            hidden = layer(hidden, ids)
    return hidden


def after_the_last_layer(model: Any, last_layer: str, ids: Tensor) -> Tensor:
    """What the last layer of the whole ``model`` returns, in a forward pass over unpadded ``ids``."""
    seen: list[Tensor] = []
    module = model.get_submodule(last_layer)
    module.register_forward_hook(lambda _module, _inputs, output: seen.append(output if isinstance(output, Tensor) else output[0]))
    with torch.no_grad():
        model.base_model(input_ids=ids)
    return seen[0]


def rewrite(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    words = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(words))
    return folder


@pytest.mark.parametrize("name", OF_TEXT)
def test_layers_one_by_one_equal_the_whole_model(name: str, tmp_path: Path) -> None:
    forward = opened(save(name, tmp_path / name))
    assert forward.model_class == name
    assert not forward.predicts
    expected = after_the_last_layer(load(tmp_path / name), f"{forward._stack.name}.{len(forward.layers) - 1}", IDS)
    assert torch.equal(layer_by_layer(forward, IDS), expected)


def test_an_encoder_sees_what_comes_after(tmp_path: Path) -> None:
    forward = opened(save("BertForMaskedLM", tmp_path / "bert"))
    other = IDS.clone()
    other[:, -1] = (IDS[:, -1] + 1) % VOCABULARY
    first, second = layer_by_layer(forward, IDS), layer_by_layer(forward, other)
    assert not torch.equal(first[:, 0], second[:, 0])


def test_query_key_and_value_of_an_encoder_share_a_tap(tmp_path: Path) -> None:
    taps = opened(save("BertForMaskedLM", tmp_path / "bert")).taps
    attention = "bert.encoder.layer.0.attention"
    assert len({taps[f"{attention}.self.{name}.weight"] for name in ("query", "key", "value")}) == 1
    assert taps[f"{attention}.output.dense.weight"] == f"{attention}.output.dense"
    assert len(taps) == 12


@pytest.mark.parametrize("name", LISTED)
def test_what_cannot_be_run_on_tokens_one_layer_at_a_time_is_refused_for_its_reason(name: str, tmp_path: Path) -> None:
    reasons = {
        "AlbertForMaskedLM": "no list of 2 layers",
        "T5EncoderModel": "passes more than hidden states",
        "CLIPModel": "no embedding of tokens",
        "ViTForImageClassification": "reads pixel_values, not tokens",
    }
    with pytest.raises(UnsupportedError, match=reasons.get(name, "an encoder and a decoder that reads the encoder's output")):
        opened(save(name, tmp_path / name))


def test_a_folder_of_the_base_model_is_run_without_a_head_whatever_class_is_named(tmp_path: Path) -> None:
    folder = save("Qwen3Model", tmp_path / "base")
    expected = layer_by_layer(opened(folder), IDS)
    rewrite(folder, load_file(folder / "model.safetensors"), architectures=["Qwen3ForCausalLM"], tie_word_embeddings=False)
    forward = opened(folder)
    assert not forward.predicts
    assert forward.layers == ("layers.0", "layers.1")
    assert torch.equal(layer_by_layer(forward, IDS), expected)


def test_a_tied_model_without_prefix_predicts(tmp_path: Path) -> None:
    folder = save("Qwen3Model", tmp_path / "base")
    rewrite(folder, load_file(folder / "model.safetensors"), architectures=["Qwen3ForCausalLM"], tie_word_embeddings=True)
    assert opened(folder).predicts


def test_layers_under_a_head_of_foreign_code_are_run(tmp_path: Path) -> None:
    folder = save("Qwen3ForSequenceClassification", tmp_path / "reward")
    expected = layer_by_layer(opened(folder), IDS)
    tensors = load_file(folder / "model.safetensors")
    tensors |= {"score.0.weight": torch.randn(64, 64), "score.2.weight": tensors.pop("score.weight")}
    forward = opened(rewrite(folder, tensors, architectures=["Qwen3ForProcessRewardModel"]))
    assert forward.unused == ("score.0.weight", "score.2.weight")
    assert torch.equal(layer_by_layer(forward, IDS), expected)


def test_a_causal_lm_that_lacks_its_head_is_refused_without_a_guess_at_the_download(tmp_path: Path) -> None:
    folder = save("Qwen3ForSequenceClassification", tmp_path / "whole")
    tensors = load_file(folder / "model.safetensors")
    del tensors["score.weight"]
    rewrite(folder, tensors, architectures=["Qwen3ForCausalLM"], tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"Qwen3ForCausalLM expects lm_head\.weight .* the checkpoint lacks") as refusal:
        opened(folder)
    assert "download" not in str(refusal.value)


def test_a_pooler_that_was_not_stored_is_not_missed(tmp_path: Path) -> None:
    folder = save("BertModel", tmp_path / "bert")
    expected = layer_by_layer(opened(folder), IDS)
    tensors = {name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if "pooler" not in name}
    assert torch.equal(layer_by_layer(opened(rewrite(folder, tensors)), IDS), expected)


def test_the_layers_of_the_text_are_found_beside_as_many_of_a_vision_tower(tmp_path: Path) -> None:
    text: dict[str, Any] = {**SIZES, **GROUPED, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}}
    sight = {"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "out_hidden_size": 64, "fullatt_block_indexes": [1]}
    tokens = {f"{name}_token_id": 5 + k for k, name in enumerate(("image", "video", "vision_start", "vision_end"))}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=sight, **tokens)
    transformers.Qwen2_5_VLForConditionalGeneration(config).save_pretrained(tmp_path)
    forward = opened(tmp_path)
    assert forward.layers == ("model.layers.0", "model.layers.1")
    assert forward.predicts
    with torch.no_grad():
        expected = load(tmp_path)(IDS, use_cache=False).logits
    torch.testing.assert_close(forward.head(layer_by_layer(forward, IDS)), expected)


def test_an_encoder_whose_config_names_no_class_is_a_bare_encoder(tmp_path: Path) -> None:
    folder = save("BertModel", tmp_path / "bert")
    rewrite(folder, load_file(folder / "model.safetensors"), architectures=None)
    assert opened(folder).model_class == "BertModel"


def test_a_numbers_tag_in_config_json_is_the_number(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"num_hidden_layers": 1, "head_dim": 32, "num_heads": 4, "state_size": 16, "n_groups": 1, "hidden_size": 64}
    config = transformers.Mamba2Config(vocab_size=VOCABULARY, **sizes, pad_token_id=1, bos_token_id=0, eos_token_id=1)
    transformers.Mamba2ForCausalLM(config).save_pretrained(tmp_path)
    assert '"__float__": "Infinity"' in (tmp_path / "config.json").read_text()
    forward = opened(tmp_path)
    with torch.no_grad():
        expected = load(tmp_path)(IDS, use_cache=False).logits
    torch.testing.assert_close(forward.head(layer_by_layer(forward, IDS)), expected)
