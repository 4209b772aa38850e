"""Qwen3-MoE (30B-A3B, 235B-A22B, Qwen3-Coder): Qwen3's attention, and many small experts in place of the MLP."""

from quantcli.archs import Architecture, Cut, Key, Linear
from quantcli.archs.shared.usual import ATTENTION, ATTENTION_NAMES, DROPPED, ENDS, HEAD_NORM_NAMES, MLP, NORM_NAMES, USUAL

EXPERT = "mlp.experts.{e}"

ARCH = Architecture(
    model_types=("qwen3_moe",),
    hf_class="Qwen3MoeForCausalLM",
    layer="model.layers.{i}",
    linears=(
        *ATTENTION,
        *MLP,  # of the layers in mlp_only_layers, which llama.cpp does not know
        Linear(f"{EXPERT}.gate_proj", tap=f"{EXPERT}.gate_proj"),
        Linear(f"{EXPERT}.up_proj", tap=f"{EXPERT}.gate_proj"),
        Linear(f"{EXPERT}.down_proj", tap=f"{EXPERT}.down_proj", absorber=f"{EXPERT}.up_proj"),
    ),
    gguf_arch="qwen3moe",
    gguf_names={
        **ENDS,
        **ATTENTION_NAMES,
        **HEAD_NORM_NAMES,
        **NORM_NAMES,
        "model.layers.{i}.mlp.gate": "blk.{i}.ffn_gate_inp",
        f"model.layers.{{i}}.{EXPERT}.gate_proj": "blk.{i}.ffn_gate_exps",
        f"model.layers.{{i}}.{EXPERT}.up_proj": "blk.{i}.ffn_up_exps",
        f"model.layers.{{i}}.{EXPERT}.down_proj": "blk.{i}.ffn_down_exps",
    },
    experts={
        "mlp.experts.gate_up_proj": Cut("stacked", (f"{EXPERT}.gate_proj.weight", f"{EXPERT}.up_proj.weight")),
        "mlp.experts.down_proj": Cut("stacked", (f"{EXPERT}.down_proj.weight",)),
    },
    keys=(*USUAL, Key("expert_feed_forward_length", "moe_intermediate_size")),
    aliases={"num_experts": "num_local_experts"},
    defaults={"num_local_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
    dropped=DROPPED,
    losses=("unnormed experts", "window on request"),
    present={"attention_bias": "self_attn.q_proj.bias"},
    fixed={"hidden_act": "silu", "use_sliding_window": False, "norm_topk_prob": True},
)
