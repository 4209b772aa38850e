"""Which block type a tensor gets in a GGUF file type: llama-quantize's rules (src/llama-quant.cpp) as one table."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from gguf import LlamaFileType

from quantcli.errors import CheckpointError
from quantcli.formats.gguf.container import BLOCKS, Field


@dataclass(frozen=True)
class Model:
    """What the rules ask about a model, as GGUF's metadata says it. ``gqa``: query heads for each key head, of the first layer."""

    arch: str
    n_layers: int
    gqa: int
    n_experts: int
    has_head: bool

    @classmethod
    def of(cls, fields: Mapping[str, Field], gguf_names: Collection[str]) -> Model:
        """The model whose metadata are ``fields`` and whose tensors are called ``gguf_names``."""

        def number(key: str, default: int) -> int:
            value = fields[f"{arch}.{key}"].value if f"{arch}.{key}" in fields else default
            first = value if isinstance(value, (int, float)) else value[0]  # one for each layer, in some families
            return int(first)

        if "general.architecture" not in fields:
            raise CheckpointError("the metadata has no general.architecture, without which no file type can be chosen")
        arch = str(fields["general.architecture"].value)
        n_heads = number("attention.head_count", 0)
        n_kv_heads = number("attention.head_count_kv", n_heads)
        gqa = n_heads // n_kv_heads if n_kv_heads else 0
        return cls(arch, number("block_count", 0), gqa, number("expert_count", 0), "output.weight" in gguf_names)

    @property
    def is_70b(self) -> bool:
        """Whether llama.cpp calls its size 70B: there few value heads serve many queries, and are small."""
        if self.arch == "llama":
            return self.n_layers == 80 and self.gqa != 1 and self.n_experts != 8
        return self.n_layers == {"llama-embed": 80, "qwen2": 80, "deci": 80, "olmo": 80, "jais2": 68}.get(self.arch)


@dataclass(frozen=True)
class Place:
    """Where a tensor stands. ``i`` of ``n``: its layer, or how many of its role came before; ``n_before``: always the latter.
    ``n_matrices``: experts that lie in it, 1 for a plain matrix; ``is_weighed``: whether there is an importance matrix."""

    model: Model
    role: str
    i: int
    n: int
    n_before: int
    n_matrices: int
    is_weighed: bool


# The conditions of the table.


def first_two(at: Place) -> bool:
    return at.i < 2


def first_four(at: Place) -> bool:
    return at.i < 4


def first_sixteenth(at: Place) -> bool:
    return at.i < at.n // 16


def first_eighth(at: Place) -> bool:
    return at.i < at.n // 8


def first_eighth_by_count(at: Place) -> bool:
    return at.n_before < at.n // 8


def middle(at: Place) -> bool:
    """Neither the first nor the last eighth."""
    return at.n // 8 <= at.i < 7 * at.n // 8


def more_bits(at: Place) -> bool:
    """The layers that hurt most: the first and last eighth, and every third one between."""
    return not middle(at) or (at.i - at.n // 8) % 3 == 2


def grouped(at: Place) -> bool:
    """Four query heads or more share a value head, whose matrix is small."""
    return at.model.gqa >= 4


def four_experts(at: Place) -> bool:
    return at.model.n_experts >= 4


def eight_experts(at: Place) -> bool:
    """Mixtral: beside its experts attention is small."""
    return at.model.n_experts == 8


def not_eight(at: Place) -> bool:
    return at.model.n_experts != 8


def falcon(at: Place) -> bool:
    return at.model.arch == "falcon"


def not_falcon(at: Place) -> bool:
    return at.model.arch != "falcon"


def weighed(at: Place) -> bool:
    return at.is_weighed


def blind(at: Place) -> bool:
    return not at.is_weighed


def experts(at: Place) -> bool:
    """Experts in one tensor. MLA's matrices lie together too, which llama-quantize takes for experts in all models but one."""
    return at.n_matrices > 1 and (at.model.arch != "bailingmoe3" or at.role.startswith("ffn_"))


Rule = tuple[str, *tuple[Callable[[Place], bool], ...]]
"""A block type, and what must all hold for it."""
Rules = Mapping[str, tuple[Rule, ...]]
"""Role → its rules, of which the first that holds wins; where none does, the file type's default stands."""


@dataclass(frozen=True)
class FileType:
    """``number``: what general.file_type says; ``default``: the type of most tensors; ``head``: of the output matrix, or of the embedding
    that serves as one. ``is_apart``: none of :data:`SHARED` holds. ``rules``: under "any" for every role but the head."""

    number: LlamaFileType
    default: str
    head: str = "Q6_K"
    rules: Rules = field(default_factory=dict)
    is_apart: bool = False

    @property
    def types(self) -> set[str]:
        """Every block type that rows of whole blocks may get."""
        return {self.default, self.head, *(rule[0] for rules in self.rules.values() for rule in rules)}


SHARED: Rules = {"attn_v": (("Q8_0", eight_experts),), "attn_k": (("Q8_0", eight_experts),)}
"""What goes before the rules of a file type."""

TABLE: dict[str, FileType] = {
    "F32": FileType(LlamaFileType.ALL_F32, "F32", "F32"),
    "F16": FileType(LlamaFileType.MOSTLY_F16, "F16", "F16"),
    "BF16": FileType(LlamaFileType.MOSTLY_BF16, "BF16", "BF16"),
    "Q8_0": FileType(LlamaFileType.MOSTLY_Q8_0, "Q8_0", "Q8_0"),
    "Q4_0": FileType(LlamaFileType.MOSTLY_Q4_0, "Q4_0", rules={"ffn_down": (("Q4_1", weighed, first_eighth),)}),
    "Q4_1": FileType(LlamaFileType.MOSTLY_Q4_1, "Q4_1"),
    "Q5_0": FileType(LlamaFileType.MOSTLY_Q5_0, "Q5_0", rules={"ffn_down": (("Q5_1", weighed, first_eighth),)}),
    "Q5_1": FileType(LlamaFileType.MOSTLY_Q5_1, "Q5_1"),
    "MXFP4_MOE": FileType(LlamaFileType.MOSTLY_MXFP4_MOE, "MXFP4", "Q8_0", {"any": (("MXFP4", experts), ("Q8_0",))}, is_apart=True),
    "Q2_K": FileType(
        LlamaFileType.MOSTLY_Q2_K,
        "Q2_K",
        rules={
            "attn_v": (("Q4_K", grouped), ("Q3_K",)),
            "attn_output": (("Q5_K", eight_experts, not_falcon), ("Q3_K", not_falcon)),
            "ffn_down": (("Q3_K",),),
        },
    ),
    "Q2_K_S": FileType(LlamaFileType.MOSTLY_Q2_K_S, "Q2_K", rules={"attn_v": (("Q4_K", grouped),), "ffn_down": (("Q4_K", first_eighth),)}),
    "Q3_K_S": FileType(LlamaFileType.MOSTLY_Q3_K_S, "Q3_K", rules={"attn_output": (("Q5_K", eight_experts, not_falcon),)}),
    "Q3_K_M": FileType(
        LlamaFileType.MOSTLY_Q3_K_M,
        "Q3_K",
        rules={
            "attn_v": (("Q5_K", first_two), ("Q4_K",)),
            "attn_output": (("Q5_K", eight_experts, not_falcon), ("Q4_K", not_falcon)),
            "ffn_down": (("Q5_K", first_sixteenth), ("Q4_K", not_falcon), ("Q4_K", more_bits)),
        },
    ),
    "Q3_K_L": FileType(
        LlamaFileType.MOSTLY_Q3_K_L,
        "Q3_K",
        rules={
            "attn_v": (("Q5_K",),),
            "attn_output": (("Q4_K", falcon), ("Q5_K", not_eight)),
            "ffn_down": (("Q4_K", falcon), ("Q5_K",)),
        },
    ),
    "Q4_K_S": FileType(
        LlamaFileType.MOSTLY_Q4_K_S,
        "Q4_K",
        rules={
            "attn_v": (("Q5_K", first_four),),
            "attn_output": (("Q5_K", eight_experts, not_falcon),),
            "ffn_down": (("Q5_K", first_eighth, not_falcon),),
        },
    ),
    "Q4_K_M": FileType(
        LlamaFileType.MOSTLY_Q4_K_M,
        "Q4_K",
        rules={
            "attn_v": (("Q6_K", more_bits),),
            "attn_output": (("Q5_K", eight_experts, not_falcon),),
            "ffn_down": (("Q6_K", more_bits, not_falcon), ("Q6_K", first_sixteenth), ("Q5_K", more_bits)),
        },
    ),
    "Q5_K_S": FileType(LlamaFileType.MOSTLY_Q5_K_S, "Q5_K"),
    "Q5_K_M": FileType(LlamaFileType.MOSTLY_Q5_K_M, "Q5_K", rules={"attn_v": (("Q6_K", more_bits),), "ffn_down": (("Q6_K", more_bits),)}),
    "Q6_K": FileType(LlamaFileType.MOSTLY_Q6_K, "Q6_K"),
    "TQ1_0": FileType(LlamaFileType.MOSTLY_TQ1_0, "TQ1_0", rules={"embedding": (("Q4_K",),)}),
    "TQ2_0": FileType(LlamaFileType.MOSTLY_TQ2_0, "TQ2_0", rules={"embedding": (("Q4_K",),)}),
    "IQ2_XXS": FileType(
        LlamaFileType.MOSTLY_IQ2_XXS,
        "IQ2_XXS",
        "Q5_K",
        rules={
            "embedding": (("Q2_K",),),
            "attn_v": (("Q4_K", grouped), ("Q4_K", four_experts), ("Q2_K",)),
            "attn_k": (("Q4_K", eight_experts),),
            "attn_output": (("Q5_K", eight_experts),),
            "ffn_down": (("Q2_K", first_eighth_by_count),),
        },
        is_apart=True,
    ),
    "IQ2_XS": FileType(
        LlamaFileType.MOSTLY_IQ2_XS,
        "IQ2_XS",
        "Q5_K",
        rules={
            "embedding": (("Q2_K",),),
            "attn_v": (("Q4_K", grouped), ("Q4_K", four_experts), ("Q2_K",)),
            "attn_k": (("Q4_K", eight_experts),),
            "attn_output": (("Q5_K", eight_experts),),
            "ffn_down": (("Q2_K", first_eighth_by_count),),
        },
        is_apart=True,
    ),
    "IQ2_S": FileType(
        LlamaFileType.MOSTLY_IQ2_S,
        "IQ2_XS",
        "Q5_K",
        rules={
            "embedding": (("IQ3_S",),),
            "attn_v": (("Q4_K", grouped), ("Q4_K", four_experts), ("IQ3_S",)),
            "attn_k": (("Q4_K", eight_experts),),
            "attn_output": (("Q5_K", eight_experts), ("IQ3_S",)),
            "ffn_down": (("IQ3_S", first_eighth_by_count),),
        },
        is_apart=True,
    ),
    "IQ2_M": FileType(
        LlamaFileType.MOSTLY_IQ2_M,
        "IQ2_S",
        "Q5_K",
        rules={
            "embedding": (("IQ3_S",),),
            "attn_v": (("Q4_K", grouped), ("Q4_K", four_experts), ("IQ3_S",)),
            "attn_k": (("Q4_K", eight_experts),),
            "attn_output": (("Q5_K", eight_experts), ("IQ3_S",)),
            "ffn_down": (("IQ3_S", first_eighth_by_count),),
        },
        is_apart=True,
    ),
    "IQ3_XXS": FileType(
        LlamaFileType.MOSTLY_IQ3_XXS,
        "IQ3_XXS",
        "Q5_K",
        rules={
            "embedding": (("IQ3_S",),),
            "attn_v": (("Q4_K", grouped), ("IQ3_S", blind)),
            "attn_k": (("IQ2_S",),),
            "attn_q": (("IQ2_S",),),
            "attn_output": (("Q5_K", eight_experts, not_falcon), ("IQ3_S", not_falcon)),
            "ffn_down": (("Q4_K", blind, first_eighth), ("Q3_K", blind)),
        },
    ),
    "IQ3_XS": FileType(
        LlamaFileType.MOSTLY_IQ3_XS,
        "IQ3_S",
        rules={
            "attn_v": (("Q4_K", grouped),),
            "attn_k": (("IQ3_XXS",),),
            "attn_q": (("IQ3_XXS",),),
            "attn_output": (("Q5_K", eight_experts, not_falcon),),
            "ffn_gate": (("IQ3_XXS", middle),),
            "ffn_up": (("IQ3_XXS", middle),),
        },
    ),
    "IQ3_S": FileType(
        LlamaFileType.MOSTLY_IQ3_S,
        "IQ3_S",
        rules={"attn_v": (("Q4_K", grouped),), "attn_output": (("Q5_K", eight_experts, not_falcon),)},
    ),
    "IQ3_M": FileType(
        LlamaFileType.MOSTLY_IQ3_M,
        "IQ3_S",
        rules={
            "attn_v": (("Q4_K",),),
            "attn_output": (("Q5_K", eight_experts, not_falcon), ("Q4_K", not_falcon)),
            "ffn_down": (("Q4_K", first_eighth), ("Q4_K", eight_experts, more_bits)),
        },
    ),
    "IQ4_NL": FileType(
        LlamaFileType.MOSTLY_IQ4_NL,
        "IQ4_NL",
        rules={
            "attn_v": (("Q5_K", grouped),),
            "attn_output": (("Q5_K", eight_experts, not_falcon),),
            "ffn_down": (("Q5_K", blind, first_eighth),),
        },
    ),
    "IQ4_XS": FileType(
        LlamaFileType.MOSTLY_IQ4_XS,
        "IQ4_XS",
        rules={
            "attn_v": (("Q5_K", grouped),),
            "attn_output": (("Q5_K", eight_experts, not_falcon),),
            "ffn_down": (("Q5_K", blind, first_eighth),),
        },
    ),
}
"""Every file type that llama-quantize names, but Q1_0, Q2_0 and IQ1_*."""

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
    *(f"time_mix_{word}.weight" for word in ("first", "w0", "w1", "w2", "v0", "v1", "v2", "a0", "a1", "a2", "g1", "g2")),
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
        rules = () if self.kind.is_apart else SHARED.get(role, ())
        for ggml_type, *conditions in (*rules, *self.kind.rules.get(role, ()), *self.kind.rules.get("any", ())):
            if all(holds(at) for holds in conditions):
                return self.settled(ggml_type, role)
        return self.settled(self.kind.default, role)

    def settled(self, ggml_type: str, role: str) -> str:
        """``ggml_type``, but more bits for the small value matrices of a 70B."""
        if role == "attn_v" and self.model.is_70b and not self.kind.is_apart and ggml_type in ("Q3_K", "Q4_K"):
            return "Q5_K"
        return ggml_type

    def place(self, name: str, role: str, n_matrices: int) -> Place:
        n_before = i = self.n_before.get(role, 0)
        layer = re.match(r"blk\.(\d+)\.", name)
        if role.startswith("ffn_") and self.model.n_experts > 1 and layer:
            i = int(layer[1])  # a layer may have several: its experts', and the one that all tokens share
        n = self.n_attn_v if role == "attn_v" else self.model.n_layers
        return Place(self.model, role, i, n, n_before, n_matrices, self.is_weighed)
