"""GPT-2: positions that are learned, and weights stored [in, out] (transformers' Conv1D, which is no linear to the passes)."""

from quantcli.archs import REQUIRED, Architecture, Cut, Key

ARCH = Architecture(
    model_types=("gpt2",),
    hf_class="GPT2LMHeadModel",
    layer="transformer.h.{i}",
    linears=(),
    gguf_arch="gpt2",
    gguf_names={
        "transformer.wte": "token_embd",
        "transformer.wpe": "position_embd",
        "transformer.ln_f": "output_norm",
        "lm_head": "output",
        "transformer.h.{i}.ln_1": "blk.{i}.attn_norm",
        "transformer.h.{i}.attn.c_attn": "blk.{i}.attn_qkv",
        "transformer.h.{i}.attn.c_proj": "blk.{i}.attn_output",
        "transformer.h.{i}.ln_2": "blk.{i}.ffn_norm",
        "transformer.h.{i}.mlp.c_fc": "blk.{i}.ffn_up",
        "transformer.h.{i}.mlp.c_proj": "blk.{i}.ffn_down",
    },
    cuts={f"{name}.weight": Cut("turned", (f"{name}.weight",)) for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")},
    keys=(
        Key("block_count", "num_hidden_layers", default=REQUIRED),
        Key("context_length", "max_position_embeddings", default=REQUIRED),
        Key("embedding_length", "hidden_size", default=REQUIRED),
        Key("feed_forward_length", "n_inner", computed="gpt2's width"),
        Key("attention.head_count", "num_attention_heads", default=REQUIRED),
        Key("attention.layer_norm_epsilon", "layer_norm_epsilon", "f32", default=REQUIRED),
    ),
    aliases={
        "n_layer": "num_hidden_layers",
        "n_positions": "max_position_embeddings",
        "n_embd": "hidden_size",
        "n_head": "num_attention_heads",
    },
    defaults={"layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
    dropped={r"\.attn\.(masked_)?bias$": "the causal mask, which every engine knows"},
    fixed={"activation_function": "gelu_new"},
    restored=("gpt2's width",),
)
