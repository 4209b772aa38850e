"""Asks a table of ``mixes`` tensor by tensor: a tensor's role by its name, what llama-quantize never touches, and what odd rows get."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence

from quantcli.formats.gguf.file.container import BLOCKS
from quantcli.formats.gguf.types.mixes import SHARED, FileType, Model, Place

DENSE = ("F32", "F16", "BF16")
"""The types that are no blocks."""

FALLBACKS = {
    **dict.fromkeys(("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    **dict.fromkeys(("Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"),
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
"""What a type of 256-weight blocks becomes in rows that are no multiple of 256; rows that are no multiple of 32 become F16."""

ROLES = {
    "output.weight": "head",
    "token_embd.weight": "embedding",  # per_layer_token_embd too, but no other's
    "attn_qkv.weight": "attn_v",
    "attn_kv_b.weight": "attn_v",
    "attn_v.weight": "attn_v",
    "attn_k.weight": "attn_k",
    "attn_q.weight": "attn_q",
    "attn_output.weight": "attn_output",
    "ffn_up": "ffn_up",
    "ffn_gate": "ffn_gate",
    "ffn_down": "ffn_down",
}
"""Part of a GGUF name → role; the first that is found."""

EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")

NEVER = (
    # norms, routers, Gemma 3n's small and Mamba's thin matrices
    *("_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel", "per_layer_model_proj"),
    *("ssm_conv1d", "shortconv.conv.weight", "indexer.k_proj.weight", "indexer.q_proj.weight"),
    # RWKV
    *(f"time_mix_{name}.weight" for name in ("first", "w0", "w1", "w2", "v0", "v1", "v2", "a0", "a1", "a2", "g1", "g2")),
    *("time_mix_decay_w1.weight", "time_mix_decay_w2.weight", "time_mix_lerp_fused.weight"),
    # positions, pictures and sounds
    *("attn_rel_b.weight", ".position_embd", "sam.pos_embd", "sam.neck.", "sam.net_", ".rel_pos", ".patch_embd", ".patch_merger"),
    *("a.rvq.codebook", "mm.a.code_embd"),
)
"""Parts of the names of matrices that stay as they are."""

NEVER_IN = {
    "glm5-next": (
        *("hc_", "indexer.attn_q_b", "indexer.attn_k", "indexer.proj", "indexer_compressor_gate", "indexer_compressor_ape"),
        *("ssm_f_a.weight", "ssm_f_b.weight", "ssm_g_a.weight", "ssm_g_b.weight", "ssm_beta.weight"),
        *("attn_kv_a_mqa.weight", "attn_k_b.weight", "attn_v_b.weight"),
    )
}
"""The same of single architectures."""

Q8_0_AT_LEAST = {"glm5-next": ("attn_q_a", "attn_q_b", "nextn.eh_proj")}
"""Parts of the names of matrices that no architecture's mix takes below Q8_0."""


def is_quantizable(name: str, shape: Sequence[int], arch: str = "") -> bool:
    """Whether llama-quantize touches a tensor of this GGUF name at all: matrices, stacked ones too, never norms, biases and routers."""
    if math.prod(shape[:-1]) < 2 or not name.endswith("weight") or name in ("position_embd.weight", "token_types.weight"):
        return False
    return not any(part in name for part in (*NEVER, *NEVER_IN.get(arch, ())))


def role_of(name: str) -> str:
    """What the tensor of GGUF name ``name`` is to the rules; "other" where they have none."""
    if name in EMBEDDINGS:
        return "embedding"
    found = (role for part, role in ROLES.items() if part in name and (role not in ("head", "embedding") or part == name))
    return next(found, "other")


def fit(ggml_type: str, in_features: int) -> str:
    """``ggml_type``, or what llama-quantize puts in its place for rows that do not fill its blocks."""
    if ggml_type not in BLOCKS or in_features % BLOCKS[ggml_type][0] == 0:
        return ggml_type
    smaller = FALLBACKS.get(ggml_type, ggml_type)
    if BLOCKS[smaller][0] > 32:
        return ggml_type  # NVFP4: llama-quantize refuses, and so do we
    return "F16" if in_features % BLOCKS[smaller][0] else smaller


class Chooser:
    """The walk over a model's tensors: asked in file order, it counts those it decided by role, as llama-quantize does."""

    def __init__(self, kind: FileType, model: Model, gguf_names: Collection[str], *, is_weighed: bool) -> None:
        self.kind, self.model, self.is_weighed = kind, model, is_weighed
        self.n_before = dict.fromkeys(ROLES.values(), 0)
        self.n_attn_v = sum(role_of(name) == "attn_v" for name in gguf_names)

    def choose(self, name: str, in_features: int, n_matrices: int = 1) -> str:
        """The type of the next tensor by the file type's rules, before :func:`fit`."""
        role = role_of(name)
        if any(part in name for part in Q8_0_AT_LEAST.get(self.model.arch, ())):
            return "Q8_0"
        if role == "head" or (role == "embedding" and not self.model.has_head):
            is_odd = in_features % BLOCKS[self.kind.default][0] != 0
            return "Q8_0" if self.model.arch == "falcon" or is_odd else self.kind.head
        at = self.place(name, role, n_matrices)
        if role in self.n_before:
            self.n_before[role] += 1
        rules = () if self.kind.ignores_shared else SHARED.get(role, ())
        for ggml_type, *conditions in (*rules, *self.kind.rules.get(role, ()), *self.kind.rules.get("any", ())):
            if all(holds(at) for holds in conditions):
                return self.settled(ggml_type, role)
        return self.settled(self.kind.default, role)

    def settled(self, ggml_type: str, role: str) -> str:
        """``ggml_type``, but more bits for the small value matrices of a 70B."""
        if role == "attn_v" and self.model.is_70b and not self.kind.ignores_shared and ggml_type in ("Q3_K", "Q4_K"):
            return "Q5_K"
        return ggml_type

    def place(self, name: str, role: str, n_matrices: int) -> Place:
        n_before = i = self.n_before.get(role, 0)
        layer = re.match(r"blk\.(\d+)\.", name)
        if role.startswith("ffn_") and self.model.n_experts > 1 and layer:
            i = int(layer[1])  # a layer may have several: its experts', and the one that all tokens share
        n = self.n_attn_v if role == "attn_v" else self.model.n_layers
        return Place(self.model, role, i, n, n_before, n_matrices, self.is_weighed)
