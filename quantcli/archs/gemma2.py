"""Gemma 2: norms before and after attention and MLP, capped logits, and windows in every other layer."""

from quantcli.archs import REQUIRED, Architecture, Key, gemma
from quantcli.archs.shared.usual import ATTENTION, ATTENTION_NAMES, DROPPED, MLP, MLP_NAMES, TIED_ENDS, after

NORM_NAMES = {
    "model.layers.{i}.input_layernorm": "blk.{i}.attn_norm",
    "model.layers.{i}.post_attention_layernorm": "blk.{i}.post_attention_norm",
    "model.layers.{i}.pre_feedforward_layernorm": "blk.{i}.ffn_norm",
    "model.layers.{i}.post_feedforward_layernorm": "blk.{i}.post_ffw_norm",
}

ARCH = Architecture(
    model_types=("gemma2",),
    hf_class="Gemma2ForCausalLM",
    layer="model.layers.{i}",
    linears=(*ATTENTION, *after("pre_feedforward_layernorm", MLP)),
    gguf_arch="gemma2",
    gguf_names={**TIED_ENDS, **ATTENTION_NAMES, **NORM_NAMES, **MLP_NAMES},
    norm_offset=1.0,
    keys=(
        *gemma.KEYS,
        Key("attn_logit_softcapping", "attn_logit_softcapping", "f32", default=REQUIRED),
        Key("final_logit_softcapping", "final_logit_softcapping", "f32", default=REQUIRED),
        Key("attention.sliding_window", "sliding_window", default=REQUIRED),
    ),
    defaults={
        **gemma.ARCH.defaults,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window": 4096,
    },
    dropped=DROPPED,
    fixed={"hidden_activation": "gelu_pytorch_tanh"},
    restored=("gemma 2's query scale",),
)
