"""StableLM: layer norms with biases, a quarter of each head rotated; in some, queries and keys normed head by head."""

from quantcli.archs import REQUIRED, Architecture, Key
from quantcli.archs.shared.usual import ATTENTION, ATTENTION_NAMES, DROPPED, ENDS, MLP, MLP_NAMES, NORM_NAMES

ARCH = Architecture(
    model_types=("stablelm", "stablelm_epoch"),
    hf_class="StableLmForCausalLM",
    layer="model.layers.{i}",
    linears=(*ATTENTION, *MLP),
    gguf_arch="stablelm",
    gguf_names={
        **ENDS,
        **ATTENTION_NAMES,
        **NORM_NAMES,
        **MLP_NAMES,
        "model.layers.{i}.self_attn.q_layernorm.norms.{e}": "blk.{i}.attn_q_norm",
        "model.layers.{i}.self_attn.k_layernorm.norms.{e}": "blk.{i}.attn_k_norm",
    },
    keys=(
        Key("context_length", "max_position_embeddings", default=REQUIRED),
        Key("embedding_length", "hidden_size", default=REQUIRED),
        Key("block_count", "num_hidden_layers", default=REQUIRED),
        Key("feed_forward_length", "intermediate_size", default=REQUIRED),
        Key("rope.dimension_count", computed="rotary width of equal heads"),
        Key("attention.head_count", "num_attention_heads", default=REQUIRED),
        Key("attention.head_count_kv", ("num_key_value_heads", "num_attention_heads")),
        Key("use_parallel_residual", "use_parallel_residual", "bool"),
        Key("attention.layer_norm_epsilon", "layer_norm_eps", "f32", default=REQUIRED),
    ),
    aliases={"norm_eps": "layer_norm_eps", "rope_pct": "partial_rotary_factor"},
    defaults={"layer_norm_eps": 1e-5, "partial_rotary_factor": 0.25, "use_parallel_residual": False},
    dropped=DROPPED,
    present={"use_qkv_bias": "self_attn.q_proj.bias", "qk_layernorm": "self_attn.q_layernorm.norms.0.weight"},
    fixed={"hidden_act": "silu"},
)
