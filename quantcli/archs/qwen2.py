"""Qwen2 and Qwen2.5: Llama's layers with biases on queries, keys and values, rotated by halves in llama.cpp too."""

from quantcli.archs import Architecture
from quantcli.archs.shared.usual import ATTENTION, ATTENTION_NAMES, DROPPED, ENDS, MLP, MLP_NAMES, NORM_NAMES, USUAL

ARCH = Architecture(
    model_types=("qwen2",),
    hf_class="Qwen2ForCausalLM",
    layer="model.layers.{i}",
    linears=(*ATTENTION, *MLP),
    gguf_arch="qwen2",
    gguf_names={**ENDS, **ATTENTION_NAMES, **NORM_NAMES, **MLP_NAMES},
    keys=USUAL,
    dropped=DROPPED,
    losses=("window of the last layers",),
    fixed={"hidden_act": "silu", "use_sliding_window": False},
)
