"""What most families share: the linears and names of a Llama layer, and the metadata that convert_hf_to_gguf writes for any text model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from quantcli.archs import REQUIRED, Key, Linear

ATTENTION = (
    Linear("self_attn.q_proj", tap="self_attn.q_proj", absorber="input_layernorm"),
    Linear("self_attn.k_proj", tap="self_attn.q_proj", absorber="input_layernorm"),
    Linear("self_attn.v_proj", tap="self_attn.q_proj", absorber="input_layernorm"),
    Linear("self_attn.o_proj", tap="self_attn.o_proj", absorber="self_attn.v_proj"),
)
MLP = (
    Linear("mlp.gate_proj", tap="mlp.gate_proj", absorber="post_attention_layernorm"),
    Linear("mlp.up_proj", tap="mlp.gate_proj", absorber="post_attention_layernorm"),
    Linear("mlp.down_proj", tap="mlp.down_proj", absorber="mlp.up_proj"),
)


def after(norm: str | None, linears: Iterable[Linear]) -> tuple[Linear, ...]:
    """``linears`` that read what ``norm`` makes, where they read another norm's; None: what no norm makes."""
    return tuple(replace(linear, absorber=norm) if (linear.absorber or "").endswith("layernorm") else linear for linear in linears)


TIED_ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
ENDS = {**TIED_ENDS, "lm_head": "output"}
ATTENTION_NAMES = {
    "model.layers.{i}.self_attn.q_proj": "blk.{i}.attn_q",
    "model.layers.{i}.self_attn.k_proj": "blk.{i}.attn_k",
    "model.layers.{i}.self_attn.v_proj": "blk.{i}.attn_v",
    "model.layers.{i}.self_attn.o_proj": "blk.{i}.attn_output",
}
NORM_NAMES = {
    "model.layers.{i}.input_layernorm": "blk.{i}.attn_norm",
    "model.layers.{i}.post_attention_layernorm": "blk.{i}.ffn_norm",
}
MLP_NAMES = {
    "model.layers.{i}.mlp.gate_proj": "blk.{i}.ffn_gate",
    "model.layers.{i}.mlp.up_proj": "blk.{i}.ffn_up",
    "model.layers.{i}.mlp.down_proj": "blk.{i}.ffn_down",
}
HEAD_NORM_NAMES = {
    "model.layers.{i}.self_attn.q_norm": "blk.{i}.attn_q_norm",
    "model.layers.{i}.self_attn.k_norm": "blk.{i}.attn_k_norm",
}

ROTARY_ROWS = {"self_attn.q_proj": "rotary queries", "self_attn.k_proj": "rotary keys"}
"""Of the families that llama.cpp rotates by neighbours (its LLAMA_ROPE_TYPE_NORM)."""

SIZES = (
    Key("block_count", "num_hidden_layers", default=REQUIRED),
    Key("context_length", "max_position_embeddings", default=REQUIRED),
    Key("embedding_length", "hidden_size", default=REQUIRED),
    Key("feed_forward_length", "intermediate_size", default=REQUIRED),
    Key("attention.head_count", "num_attention_heads", default=REQUIRED),
    Key("attention.head_count_kv", ("num_key_value_heads", "num_attention_heads")),
)
EXPERTS = (
    Key("expert_count", "num_local_experts"),
    Key("expert_used_count", "num_experts_per_tok"),
)
HEAD_SIZES = (
    Key("attention.key_length", "head_dim"),
    Key("attention.value_length", "head_dim"),
)
RMS = Key("attention.layer_norm_rms_epsilon", "rms_norm_eps", "f32", default=REQUIRED)

USUAL = (*SIZES, "rope", RMS, *EXPERTS, *HEAD_SIZES)

DROPPED = {r"\.rotary_emb\.inv_freq$": "rotary frequencies follow from the config"}
