"""Llama (1, 2, 3, 3.x, Code Llama and every model that keeps their layout)."""

from quantcli.archs import Architecture, Linear

ARCH = Architecture(
    model_types=("llama",),
    layer="model.layers.{i}",
    linears=(
        Linear("self_attn.q_proj", tap="self_attn.q_proj", prev="input_layernorm"),
        Linear("self_attn.k_proj", tap="self_attn.q_proj", prev="input_layernorm"),
        Linear("self_attn.v_proj", tap="self_attn.q_proj", prev="input_layernorm"),
        Linear("self_attn.o_proj", tap="self_attn.o_proj", prev="self_attn.v_proj"),
        Linear("mlp.gate_proj", tap="mlp.gate_proj", prev="post_attention_layernorm"),
        Linear("mlp.up_proj", tap="mlp.gate_proj", prev="post_attention_layernorm"),
        Linear("mlp.down_proj", tap="mlp.down_proj", prev="mlp.up_proj"),
    ),
    gguf_arch="llama",
    gguf_names={
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "model.layers.{i}.input_layernorm": "blk.{i}.attn_norm",
        "model.layers.{i}.self_attn.q_proj": "blk.{i}.attn_q",
        "model.layers.{i}.self_attn.k_proj": "blk.{i}.attn_k",
        "model.layers.{i}.self_attn.v_proj": "blk.{i}.attn_v",
        "model.layers.{i}.self_attn.o_proj": "blk.{i}.attn_output",
        "model.layers.{i}.post_attention_layernorm": "blk.{i}.ffn_norm",
        "model.layers.{i}.mlp.gate_proj": "blk.{i}.ffn_gate",
        "model.layers.{i}.mlp.up_proj": "blk.{i}.ffn_up",
        "model.layers.{i}.mlp.down_proj": "blk.{i}.ffn_down",
    },
    rotary={"self_attn.q_proj": "num_attention_heads", "self_attn.k_proj": "num_key_value_heads"},
    ignored=(".rotary_emb.inv_freq",),
)
