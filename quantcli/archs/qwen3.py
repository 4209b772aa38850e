"""Qwen3: Qwen2 without biases, with a norm on every head's queries and keys."""

from quantcli.archs import Architecture
from quantcli.archs.shared.usual import ATTENTION, ATTENTION_NAMES, DROPPED, ENDS, HEAD_NORM_NAMES, MLP, MLP_NAMES, NORM_NAMES, USUAL

ARCH = Architecture(
    model_types=("qwen3",),
    hf_class="Qwen3ForCausalLM",
    layer="model.layers.{i}",
    linears=(*ATTENTION, *MLP),
    gguf_arch="qwen3",
    gguf_names={**ENDS, **ATTENTION_NAMES, **HEAD_NORM_NAMES, **NORM_NAMES, **MLP_NAMES},
    keys=USUAL,
    defaults={"head_dim": 128},
    dropped=DROPPED,
    losses=("window of the last layers",),
    present={"attention_bias": "self_attn.q_proj.bias"},
    fixed={"hidden_act": "silu", "use_sliding_window": False},
)
