"""gpt-oss: attention sinks, windows in every other layer, experts with biases whose gate and up take turns, stored [in, out]."""

from quantcli.archs import Architecture, Cut, Key, Linear
from quantcli.archs.shared.usual import ATTENTION, ATTENTION_NAMES, DROPPED, ENDS, USUAL

EXPERT = "mlp.experts.{e}"

ARCH = Architecture(
    model_types=("gpt_oss",),
    hf_class="GptOssForCausalLM",
    layer="model.layers.{i}",
    linears=(
        *ATTENTION,
        Linear(f"{EXPERT}.gate_proj", tap=f"{EXPERT}.gate_proj"),
        Linear(f"{EXPERT}.up_proj", tap=f"{EXPERT}.gate_proj"),
        Linear(f"{EXPERT}.down_proj", tap=f"{EXPERT}.down_proj"),
    ),
    gguf_arch="gpt-oss",
    gguf_names={
        **ENDS,
        **ATTENTION_NAMES,
        "model.layers.{i}.input_layernorm": "blk.{i}.attn_norm",
        "model.layers.{i}.post_attention_layernorm": "blk.{i}.post_attention_norm",
        "model.layers.{i}.self_attn.sinks": "blk.{i}.attn_sinks.weight",
        "model.layers.{i}.mlp.router": "blk.{i}.ffn_gate_inp",
        f"model.layers.{{i}}.{EXPERT}.gate_proj": "blk.{i}.ffn_gate_exps",
        f"model.layers.{{i}}.{EXPERT}.up_proj": "blk.{i}.ffn_up_exps",
        f"model.layers.{{i}}.{EXPERT}.down_proj": "blk.{i}.ffn_down_exps",
    },
    experts={
        "mlp.experts.gate_up_proj": Cut("alternating", (f"{EXPERT}.gate_proj.weight", f"{EXPERT}.up_proj.weight")),
        "mlp.experts.gate_up_proj_bias": Cut("alternating", (f"{EXPERT}.gate_proj.bias", f"{EXPERT}.up_proj.bias")),
        "mlp.experts.down_proj": Cut("turned", (f"{EXPERT}.down_proj.weight",)),
        "mlp.experts.down_proj_bias": Cut("apart", (f"{EXPERT}.down_proj.bias",)),
    },
    stacked=True,
    keys=(*USUAL, Key("attention.sliding_window", "sliding_window"), Key("expert_feed_forward_length", "intermediate_size")),
    aliases={"num_experts": "num_local_experts", "experts_per_token": "num_experts_per_tok"},
    defaults={"num_local_experts": 128, "num_experts_per_tok": 4, "head_dim": 64, "sliding_window": 128},
    dropped=DROPPED,
    fixed={"hidden_act": "silu"},
    restored=("gpt-oss's untruncated yarn",),
)
