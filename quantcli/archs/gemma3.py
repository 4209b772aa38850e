"""Gemma 3's text models: Gemma 2's norms, norms on every head's queries and keys, and windows in five layers of six, rotated on a base of
their own."""

from quantcli.archs import Architecture, Key
from quantcli.archs.gemma2 import NORM_NAMES
from quantcli.archs.shared.usual import (
    ATTENTION,
    ATTENTION_NAMES,
    DROPPED,
    ENDS,
    HEAD_NORM_NAMES,
    HEAD_SIZES,
    MLP,
    MLP_NAMES,
    RMS,
    SIZES,
    after,
)

ARCH = Architecture(
    model_types=("gemma3_text", "gemma3"),
    hf_class="Gemma3ForCausalLM",
    layer="model.layers.{i}",
    linears=(*ATTENTION, *after("pre_feedforward_layernorm", MLP)),
    gguf_arch="gemma3",
    gguf_names={**ENDS, **ATTENTION_NAMES, **HEAD_NORM_NAMES, **NORM_NAMES, **MLP_NAMES},
    norm_offset=1.0,
    keys=(
        *SIZES,
        "rope",
        RMS,
        *HEAD_SIZES,
        Key("final_logit_softcapping", "final_logit_softcapping", "f32"),
        Key("attention.sliding_window", "sliding_window"),
    ),
    defaults={
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "sliding_window": 4096,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "vocab_size": 262208,
        "tie_word_embeddings": True,
    },
    dropped=DROPPED,
    fixed={"hidden_activation": "gelu_pytorch_tanh"},
    restored=("gemma 3's query scale",),
)
