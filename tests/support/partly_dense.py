"""Small random models of which a part is quantized: with a vision tower, with experts in one tensor, with layers that predict further."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

TEXT = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
VISION = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
IMAGE = 5
"""The token that stands for a part of an image."""


@dataclass(frozen=True)
class Kind:
    """``config``: makes the configuration; ``cls``: the class that config.json names; ``coded``: a pattern of the modules of that class
    that are quantized, all others being dense."""

    config: Callable[[], transformers.PreTrainedConfig]
    cls: str
    coded: str

    def is_coded(self, module: str) -> bool:
        return re.fullmatch(self.coded, module) is not None


def gemma3() -> transformers.PreTrainedConfig:
    text = TEXT | {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 32}
    image = {"mm_tokens_per_image": 4, "image_token_index": IMAGE, "boi_token_index": 6, "eoi_token_index": 7}
    return transformers.Gemma3Config(text_config=text, vision_config=VISION, **image)


def llama4() -> transformers.PreTrainedConfig:
    text = TEXT | {"intermediate_size_mlp": 128, "num_local_experts": 4, "num_experts_per_tok": 1}
    vision = VISION | {"vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64}
    return transformers.Llama4Config(text_config=text, vision_config=vision, tie_word_embeddings=False)


def gemma4() -> transformers.PreTrainedConfig:
    own = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64, "global_head_dim": 32}
    own |= {"hidden_size_per_layer_input": 64, "vocab_size_per_layer_input": 512, "sliding_window": 64, "num_global_key_value_heads": 2}
    return transformers.Gemma4TextConfig(**TEXT, **own, layer_types=["sliding_attention", "full_attention"])


def glm4() -> transformers.PreTrainedConfig:
    own = {"moe_intermediate_size": 64, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1}
    return transformers.Glm4MoeConfig(**TEXT, **own, n_group=1, topk_group=1, tie_word_embeddings=False)


ATTENTION, MLP = r"self_attn\.[qkvo]_proj", r"(gate|up|down)_proj"
KINDS = {
    "gemma3": Kind(gemma3, "Gemma3ForConditionalGeneration", rf"model\.language_model\.layers\.\d\.({ATTENTION}|mlp\.{MLP})"),
    "llama4": Kind(
        llama4,
        "Llama4ForConditionalGeneration",
        rf"language_model\.model\.layers\.\d\.({ATTENTION}|feed_forward\.shared_expert\.{MLP})",
    ),
    "gemma4": Kind(gemma4, "Gemma4ForCausalLM", rf"model\.layers\.\d\.({ATTENTION}|mlp\.{MLP}|per_layer_(input_gate|projection))"),
    "glm4": Kind(glm4, "Glm4MoeForCausalLM", rf"model\.layers\.[01]\.({ATTENTION}|mlp\.(shared_experts\.)?{MLP})"),
    "glm4, mtp": Kind(glm4, "Glm4MoeForCausalLM", rf"model\.layers\.[01]\.({ATTENTION}|mlp\.(shared_experts\.)?{MLP})"),
}


def save(name: str, folder: Path) -> Path:
    """The model of ``KINDS[name]`` in float32; GLM's with a layer that predicts one token further, as its third or under ``mtp``."""
    torch.manual_seed(0)
    model = getattr(transformers, KINDS[name].cls)(KINDS[name].config())
    model.save_pretrained(folder)
    if name.startswith("glm4"):
        add_prediction(folder, "mtp.layers.0." if "mtp" in name else "model.layers.2.")
    return folder


def add_prediction(folder: Path, prefix: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    more = {prefix + name.removeprefix("model.layers.1."): t.clone() for name, t in tensors.items() if name.startswith("model.layers.1.")}
    more |= {f"{prefix}eh_proj.weight": torch.randn(128, 256), f"{prefix}enorm.weight": torch.ones(128)}
    save_file(tensors | more, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))


def inputs(name: str) -> dict[str, Tensor]:
    """What the model reads: tokens, and an image where it sees."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 500, (1, 16), generator=generator)
    if name != "gemma3":
        return {"input_ids": ids}
    ids[0, 3:7] = IMAGE
    return {"input_ids": ids, "token_type_ids": (ids == IMAGE).long(), "pixel_values": torch.randn(1, 3, 28, 28, generator=generator)}
