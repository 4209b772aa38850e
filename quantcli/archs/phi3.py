"""Phi-3, Phi-3.5-mini, Phi-4 and Phi-4-mini: Llama's layers with queries, keys and values, and gate and up, in one linear each."""

from quantcli.archs import REQUIRED, Architecture, Key, Linear
from quantcli.archs.shared.usual import DROPPED, ENDS, NORM_NAMES, RMS

ARCH = Architecture(
    model_types=("phi3",),
    hf_class="Phi3ForCausalLM",
    layer="model.layers.{i}",
    linears=(
        Linear("self_attn.qkv_proj", tap="self_attn.qkv_proj", absorber="input_layernorm"),
        Linear("self_attn.o_proj", tap="self_attn.o_proj", absorber="self_attn.qkv_proj"),
        Linear("mlp.gate_up_proj", tap="mlp.gate_up_proj", absorber="post_attention_layernorm"),
        Linear("mlp.down_proj", tap="mlp.down_proj", absorber="mlp.gate_up_proj"),
    ),
    gguf_arch="phi3",
    gguf_names={
        **ENDS,
        **NORM_NAMES,
        "model.layers.{i}.self_attn.qkv_proj": "blk.{i}.attn_qkv",
        "model.layers.{i}.self_attn.o_proj": "blk.{i}.attn_output",
        "model.layers.{i}.mlp.gate_up_proj": "blk.{i}.ffn_up",
        "model.layers.{i}.mlp.down_proj": "blk.{i}.ffn_down",
    },
    keys=(
        Key("context_length", "max_position_embeddings", default=REQUIRED),
        Key("rope.scaling.original_context_length", "original_max_position_embeddings", computed="context before longrope"),
        Key("embedding_length", "hidden_size", default=REQUIRED),
        Key("feed_forward_length", "intermediate_size", default=REQUIRED),
        Key("block_count", "num_hidden_layers", default=REQUIRED),
        Key("attention.head_count", "num_attention_heads", default=REQUIRED),
        Key("attention.head_count_kv", ("num_key_value_heads", "num_attention_heads")),
        RMS,
        Key("rope.dimension_count", computed="rotary width of equal heads"),
        Key("rope.freq_base", kind="f32", computed="rotary base"),
        Key("attention.sliding_window", "sliding_window", default=0),  # 0 distinguishes Phi-4 from Phi-3
        Key("rope.scaling.attn_factor", kind="f32", computed="longrope's attention factor"),
    ),
    defaults={"original_max_position_embeddings": 4096, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    computed=("longrope",),
    dropped=DROPPED,
    fixed={"hidden_act": "silu"},
)
