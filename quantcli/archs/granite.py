"""Granite 3 and 4, dense: Llama's layers with four multipliers."""

from dataclasses import replace

from quantcli.archs import Key, llama
from quantcli.archs.shared.usual import RMS, SIZES

ARCH = replace(
    llama.ARCH,
    model_types=("granite",),
    hf_class="GraniteForCausalLM",
    gguf_arch="granite",
    keys=(
        *SIZES,
        "rope",
        RMS,
        Key("vocab_size", "vocab_size"),
        Key("rope.dimension_count", computed="rotary width of equal heads"),
        Key("attention.scale", "attention_multiplier", "f32"),
        Key("embedding_scale", "embedding_multiplier", "f32"),
        Key("residual_scale", "residual_multiplier", "f32"),
        Key("logit_scale", "logits_scaling", "f32"),
    ),
    defaults={"attention_multiplier": 1.0, "embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0},
)
