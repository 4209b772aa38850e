"""OLMo 2: no norms before attention and MLP but after them, and one on all queries, one on all keys."""

from quantcli.archs import Architecture
from quantcli.archs.shared.usual import ATTENTION, ATTENTION_NAMES, DROPPED, ENDS, HEAD_NORM_NAMES, MLP, MLP_NAMES, USUAL, after

ARCH = Architecture(
    model_types=("olmo2",),
    hf_class="Olmo2ForCausalLM",
    layer="model.layers.{i}",
    linears=(*after(None, ATTENTION), *after(None, MLP)),
    gguf_arch="olmo2",
    gguf_names={
        **ENDS,
        **ATTENTION_NAMES,
        **HEAD_NORM_NAMES,
        "model.layers.{i}.post_attention_layernorm": "blk.{i}.post_attention_norm",
        "model.layers.{i}.post_feedforward_layernorm": "blk.{i}.post_ffw_norm",
        **MLP_NAMES,
    },
    keys=USUAL,
    dropped=DROPPED,
    present={"attention_bias": "self_attn.q_proj.bias"},
    fixed={"hidden_act": "silu"},
)
