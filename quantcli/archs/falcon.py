"""Falcon 7B, 40B and 180B: attention parallel to the MLP, queries, keys and values group by group in one linear."""

from quantcli.archs import REQUIRED, Architecture, Key, Linear

ARCH = Architecture(
    model_types=("falcon", "RefinedWeb", "RefinedWebModel"),
    hf_class="FalconForCausalLM",
    layer="transformer.h.{i}",
    linears=(
        Linear("self_attention.query_key_value", tap="self_attention.query_key_value"),
        Linear("self_attention.dense", tap="self_attention.dense", absorber="self_attention.query_key_value"),
        Linear("mlp.dense_h_to_4h", tap="mlp.dense_h_to_4h"),
        Linear("mlp.dense_4h_to_h", tap="mlp.dense_4h_to_h"),
    ),
    gguf_arch="falcon",
    gguf_names={
        "transformer.word_embeddings": "token_embd",
        "transformer.ln_f": "output_norm",
        "lm_head": "output",
        "transformer.h.{i}.input_layernorm": "blk.{i}.attn_norm",
        "transformer.h.{i}.ln_attn": "blk.{i}.attn_norm_2",
        "transformer.h.{i}.self_attention.query_key_value": "blk.{i}.attn_qkv",
        "transformer.h.{i}.self_attention.dense": "blk.{i}.attn_output",
        "transformer.h.{i}.mlp.dense_h_to_4h": "blk.{i}.ffn_up",
        "transformer.h.{i}.mlp.dense_4h_to_h": "blk.{i}.ffn_down",
    },
    also={"transformer.h.{i}.ln_mlp": "transformer.h.{i}.input_layernorm"},
    rows={"self_attention.query_key_value": "queries, keys, values"},
    keys=(
        Key("context_length", default=2048),
        Key("tensor_data_layout", kind="str", default="jploski"),
        Key("embedding_length", "hidden_size", default=REQUIRED),
        Key("feed_forward_length", "ffn_hidden_size", computed="falcon's width"),
        Key("block_count", "num_hidden_layers", default=REQUIRED),
        Key("attention.head_count", "num_attention_heads", default=REQUIRED),
        Key("attention.head_count_kv", "num_key_value_heads", computed="falcon's key heads", default=REQUIRED),
        Key("attention.layer_norm_epsilon", "layer_norm_epsilon", "f32", default=REQUIRED),
    ),
    aliases={
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
        "n_head_kv": "num_key_value_heads",
    },
    derived=True,
    defaults={"layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
    present={"new_decoder_architecture": "ln_attn.weight", "bias": "self_attention.dense.bias"},
    renamed={"new_decoder_architecture": "transformer.h.{i}.ln_mlp"},
    fixed={"alibi": False, "parallel_attn": True, "activation": "gelu"},
    restored=("falcon's heads",),
)
