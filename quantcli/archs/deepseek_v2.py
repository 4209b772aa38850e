"""DeepSeek-V2, V2-Lite, V3 and R1: keys and values compressed to a rank (MLA), shared and routed experts. llama.cpp: "deepseek2"."""

from quantcli.archs import REQUIRED, Architecture, Cut, Key, Linear
from quantcli.archs.shared.usual import DROPPED, ENDS, MLP, MLP_NAMES, NORM_NAMES, RMS

EXPERT, SHARED = "mlp.experts.{e}", "mlp.shared_experts"

KEYS = (
    Key("block_count", "num_hidden_layers", default=REQUIRED),
    Key("context_length", "max_position_embeddings", default=REQUIRED),
    Key("embedding_length", "hidden_size", default=REQUIRED),
    Key("feed_forward_length", "intermediate_size", default=REQUIRED),
    Key("attention.head_count", "num_attention_heads", default=REQUIRED),
    Key("attention.head_count_kv", default=1),  # to llama.cpp all heads share what is compressed
    "rope",
    RMS,
    Key("expert_count", "n_routed_experts"),
    Key("expert_used_count", "num_experts_per_tok"),
    Key("expert_group_count", "n_group"),
    Key("expert_group_used_count", "topk_group"),
    Key("expert_gating_func", "scoring_func", computed="gating function"),
    Key("attention.key_length", computed="MLA's key width"),
    Key("attention.value_length", "kv_lora_rank"),
    Key("leading_dense_block_count", "first_k_dense_replace", default=0),
    Key("vocab_size", "vocab_size"),
    Key("attention.q_lora_rank", "q_lora_rank"),
    Key("attention.kv_lora_rank", "kv_lora_rank", default=REQUIRED),
    Key("attention.key_length_mla", "qk_head_dim", computed="MLA's key width, uncompressed", default=REQUIRED),
    Key("attention.value_length_mla", "v_head_dim", default=REQUIRED),
    Key("expert_feed_forward_length", "moe_intermediate_size", default=REQUIRED),
    Key("expert_shared_count", "n_shared_experts", default=0),
    Key("expert_weights_scale", "routed_scaling_factor", "f32"),
    Key("expert_weights_norm", "norm_topk_prob", "bool", computed="normed expert weights"),
    Key("rope.dimension_count", "qk_rope_head_dim", default=REQUIRED),
    Key("rope.scaling.yarn_log_multiplier", "mscale_all_dim", "f32", computed="yarn's log multiplier"),
)

ARCH = Architecture(
    model_types=("deepseek_v2", "deepseek_v3"),
    hf_class="DeepseekV2ForCausalLM",
    layer="model.layers.{i}",
    linears=(
        Linear("self_attn.q_proj", tap="self_attn.q_proj", absorber="input_layernorm"),
        Linear("self_attn.q_a_proj", tap="self_attn.q_a_proj", absorber="input_layernorm"),
        Linear("self_attn.q_b_proj", tap="self_attn.q_b_proj", absorber="self_attn.q_a_layernorm"),
        Linear("self_attn.kv_a_proj_with_mqa", tap="self_attn.q_a_proj", absorber="input_layernorm"),
        Linear("self_attn.kv_b_proj", tap="self_attn.kv_b_proj", absorber="self_attn.kv_a_layernorm"),
        Linear("self_attn.o_proj", tap="self_attn.o_proj"),
        *MLP,
        *(Linear(f"{module}.gate_proj", tap=f"{module}.gate_proj") for module in (EXPERT, SHARED)),
        *(Linear(f"{module}.up_proj", tap=f"{module}.gate_proj") for module in (EXPERT, SHARED)),
        *(Linear(f"{module}.down_proj", tap=f"{module}.down_proj", absorber=f"{module}.up_proj") for module in (EXPERT, SHARED)),
    ),
    gguf_arch="deepseek2",
    gguf_names={
        **ENDS,
        **NORM_NAMES,
        **MLP_NAMES,
        "model.layers.{i}.self_attn.q_proj": "blk.{i}.attn_q",
        "model.layers.{i}.self_attn.q_a_proj": "blk.{i}.attn_q_a",
        "model.layers.{i}.self_attn.q_a_layernorm": "blk.{i}.attn_q_a_norm",
        "model.layers.{i}.self_attn.q_b_proj": "blk.{i}.attn_q_b",
        "model.layers.{i}.self_attn.kv_a_proj_with_mqa": "blk.{i}.attn_kv_a_mqa",
        "model.layers.{i}.self_attn.kv_a_layernorm": "blk.{i}.attn_kv_a_norm",
        "model.layers.{i}.self_attn.k_b_proj.{e}": "blk.{i}.attn_k_b",
        "model.layers.{i}.self_attn.v_b_proj.{e}": "blk.{i}.attn_v_b",
        "model.layers.{i}.self_attn.o_proj": "blk.{i}.attn_output",
        "model.layers.{i}.mlp.gate": "blk.{i}.ffn_gate_inp",
        "model.layers.{i}.mlp.gate.e_score_correction_bias": "blk.{i}.exp_probs_b.bias",
        **{f"model.layers.{{i}}.{EXPERT}.{linear}_proj": f"blk.{{i}}.ffn_{linear}_exps" for linear in ("gate", "up", "down")},
        **{f"model.layers.{{i}}.{SHARED}.{linear}_proj": f"blk.{{i}}.ffn_{linear}_shexp" for linear in ("gate", "up", "down")},
    },
    experts={
        "mlp.experts.gate_up_proj": Cut("stacked", (f"{EXPERT}.gate_proj.weight", f"{EXPERT}.up_proj.weight")),
        "mlp.experts.down_proj": Cut("stacked", (f"{EXPERT}.down_proj.weight",)),
    },
    cuts={"self_attn.kv_b_proj.weight": Cut("keys and values", ("self_attn.k_b_proj.{e}.weight", "self_attn.v_b_proj.{e}.weight"))},
    keys=KEYS,
    defaults={"rms_norm_eps": 1e-6},
    dropped=DROPPED,
    fixed={"hidden_act": "silu"},
    present={"has_score_correction": "mlp.gate.e_score_correction_bias"},
    restored=("deepseek's keys",),
)
