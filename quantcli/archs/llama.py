"""Llama (1, 2, 3, 3.x, Code Llama, SmolLM 1 and 2, and every model that keeps their layout)."""

from quantcli.archs import Architecture, Key
from quantcli.archs.shared.usual import ATTENTION, ATTENTION_NAMES, DROPPED, ENDS, MLP, MLP_NAMES, NORM_NAMES, RMS, ROTARY_ROWS, SIZES

ARCH = Architecture(
    model_types=("llama",),
    hf_class="LlamaForCausalLM",
    layer="model.layers.{i}",
    linears=(*ATTENTION, *MLP),
    gguf_arch="llama",
    gguf_names={**ENDS, **ATTENTION_NAMES, **NORM_NAMES, **MLP_NAMES},
    rows=ROTARY_ROWS,
    keys=(
        *SIZES,
        "rope",
        RMS,
        Key("attention.key_length", "head_dim", computed="head_dim"),
        Key("attention.value_length", "head_dim", computed="head_dim"),
        Key("vocab_size", "vocab_size"),
        Key("rope.dimension_count", computed="head_dim"),
    ),
    computed=("llama3",),
    dropped=DROPPED,
    present={"attention_bias": "self_attn.q_proj.bias", "mlp_bias": "mlp.up_proj.bias"},
    fixed={"hidden_act": "silu"},
)
