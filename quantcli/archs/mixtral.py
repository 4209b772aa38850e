"""Mixtral: Mistral's attention, and eight experts in place of the MLP. llama.cpp's architecture is "llama" too."""

from quantcli.archs import Architecture, Cut, Key, Linear
from quantcli.archs.shared.usual import ATTENTION, ATTENTION_NAMES, DROPPED, ENDS, NORM_NAMES, ROTARY_ROWS, USUAL

EXPERT = "block_sparse_moe.experts.{e}"

ARCH = Architecture(
    model_types=("mixtral",),
    hf_class="MixtralForCausalLM",
    layer="model.layers.{i}",
    linears=(
        *ATTENTION,
        Linear(f"{EXPERT}.w1", tap=f"{EXPERT}.w1"),
        Linear(f"{EXPERT}.w3", tap=f"{EXPERT}.w1"),
        Linear(f"{EXPERT}.w2", tap=f"{EXPERT}.w2", absorber=f"{EXPERT}.w3"),
    ),
    gguf_arch="llama",
    gguf_names={
        **ENDS,
        **ATTENTION_NAMES,
        **NORM_NAMES,
        "model.layers.{i}.block_sparse_moe.gate": "blk.{i}.ffn_gate_inp",
        f"model.layers.{{i}}.{EXPERT}.w1": "blk.{i}.ffn_gate_exps",
        f"model.layers.{{i}}.{EXPERT}.w3": "blk.{i}.ffn_up_exps",
        f"model.layers.{{i}}.{EXPERT}.w2": "blk.{i}.ffn_down_exps",
    },
    also={"model.layers.{i}.mlp.gate": "model.layers.{i}.block_sparse_moe.gate"},
    experts={
        "mlp.experts.gate_up_proj": Cut("stacked", (f"{EXPERT}.w1.weight", f"{EXPERT}.w3.weight")),
        "mlp.experts.down_proj": Cut("stacked", (f"{EXPERT}.w2.weight",)),
    },
    rows=ROTARY_ROWS,
    keys=(*USUAL, Key("vocab_size", "vocab_size"), Key("rope.dimension_count", computed="head_dim")),
    defaults={"num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5},
    computed=("llama3",),
    dropped=DROPPED,
    losses=("window",),
    fixed={"hidden_act": "silu"},
)
