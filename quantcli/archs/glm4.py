"""GLM-4 (0414): norms before and after attention and MLP, gate and up in one linear, half of each head rotated by neighbours."""

from quantcli.archs import Architecture, Key, Linear
from quantcli.archs.shared.usual import ATTENTION, ATTENTION_NAMES, DROPPED, ENDS, NORM_NAMES, USUAL

ARCH = Architecture(
    model_types=("glm4",),
    hf_class="Glm4ForCausalLM",
    layer="model.layers.{i}",
    linears=(
        *ATTENTION,
        Linear("mlp.gate_up_proj", tap="mlp.gate_up_proj", absorber="post_attention_layernorm"),
        Linear("mlp.down_proj", tap="mlp.down_proj", absorber="mlp.gate_up_proj"),
    ),
    gguf_arch="glm4",
    gguf_names={
        **ENDS,
        **ATTENTION_NAMES,
        **NORM_NAMES,
        "model.layers.{i}.post_self_attn_layernorm": "blk.{i}.post_attention_norm",
        "model.layers.{i}.post_mlp_layernorm": "blk.{i}.post_ffw_norm",
        "model.layers.{i}.mlp.gate_up_proj": "blk.{i}.ffn_up",
        "model.layers.{i}.mlp.down_proj": "blk.{i}.ffn_down",
    },
    keys=(*USUAL, Key("rope.dimension_count", computed="rotated share of a head")),
    defaults={"partial_rotary_factor": 0.5, "head_dim": 128},
    dropped=DROPPED,
    present={"attention_bias": "self_attn.q_proj.bias"},
    fixed={"hidden_act": "silu"},
)
