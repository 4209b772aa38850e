"""Which block type a tensor gets in a GGUF file type: llama-quantize's rules (src/llama-quant.cpp) as one table."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from gguf import LlamaFileType

from quantcli.errors import CheckpointError
from quantcli.formats.gguf.file.container import Field


@dataclass(frozen=True)
class Model:
    """What the rules ask about a model, as GGUF's metadata has it. ``gqa``: query heads for each key head, of the first layer."""

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
    """A tensor's position. ``i`` of ``n``: its layer, or how many of its role came before; ``n_before``: always the latter.
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
    """Mixtral: next to its experts attention is small."""
    return at.model.n_experts == 8


def not_eight(at: Place) -> bool:
    return at.model.n_experts != 8


def falcon(at: Place) -> bool:
    return at.model.arch == "falcon"


def not_falcon(at: Place) -> bool:
    return at.model.arch != "falcon"


def weighed(at: Place) -> bool:
    return at.is_weighed


def unweighed(at: Place) -> bool:
    return not at.is_weighed


def experts(at: Place) -> bool:
    """Experts in one tensor. MLA's matrices lie together too, which llama-quantize takes for experts in all models but one."""
    return at.n_matrices > 1 and (at.model.arch != "bailingmoe3" or at.role.startswith("ffn_"))


Rule = tuple[str, *tuple[Callable[[Place], bool], ...]]
"""A block type, and what must all hold for it."""
Rules = Mapping[str, tuple[Rule, ...]]
"""Role → its rules, of which the first that holds wins; where none does, the file type's default applies."""


@dataclass(frozen=True)
class FileType:
    """``number``: of general.file_type; ``default``: the type of most tensors; ``head``: of the output matrix, or of the
    embedding that serves as one. ``ignores_shared``: none of :data:`SHARED` holds. ``rules``: under "any" for every role but the head."""

    number: LlamaFileType
    default: str
    head: str = "Q6_K"
    rules: Rules = field(default_factory=dict)
    ignores_shared: bool = False

    @property
    def types(self) -> set[str]:
        """Every block type that rows of whole blocks may get."""
        return {self.default, self.head, *(rule[0] for rules in self.rules.values() for rule in rules)}


SHARED: Rules = {"attn_v": (("Q8_0", eight_experts),), "attn_k": (("Q8_0", eight_experts),)}
"""What goes before the rules of a file type."""

WITH_Q2_K: Rules = {
    "embedding": (("Q2_K",),),
    "attn_v": (("Q4_K", grouped), ("Q4_K", four_experts), ("Q2_K",)),
    "attn_k": (("Q4_K", eight_experts),),
    "attn_output": (("Q5_K", eight_experts),),
    "ffn_down": (("Q2_K", first_eighth_by_count),),
}
"""Of the file types of two bits whose other tensors are Q2_K."""

WITH_IQ3_S: Rules = {
    "embedding": (("IQ3_S",),),
    "attn_v": (("Q4_K", grouped), ("Q4_K", four_experts), ("IQ3_S",)),
    "attn_k": (("Q4_K", eight_experts),),
    "attn_output": (("Q5_K", eight_experts), ("IQ3_S",)),
    "ffn_down": (("IQ3_S", first_eighth_by_count),),
}
"""Of those a little larger, whose other tensors are IQ3_S."""

WITH_Q5_K: Rules = {
    "attn_v": (("Q5_K", grouped),),
    "attn_output": (("Q5_K", eight_experts, not_falcon),),
    "ffn_down": (("Q5_K", unweighed, first_eighth),),
}
"""Of those with a code book of four bits."""

TABLE: dict[str, FileType] = {
    "F32": FileType(LlamaFileType.ALL_F32, "F32", "F32"),
    "F16": FileType(LlamaFileType.MOSTLY_F16, "F16", "F16"),
    "BF16": FileType(LlamaFileType.MOSTLY_BF16, "BF16", "BF16"),
    "Q8_0": FileType(LlamaFileType.MOSTLY_Q8_0, "Q8_0", "Q8_0"),
    "Q4_0": FileType(LlamaFileType.MOSTLY_Q4_0, "Q4_0", rules={"ffn_down": (("Q4_1", weighed, first_eighth),)}),
    "Q4_1": FileType(LlamaFileType.MOSTLY_Q4_1, "Q4_1"),
    "Q5_0": FileType(LlamaFileType.MOSTLY_Q5_0, "Q5_0", rules={"ffn_down": (("Q5_1", weighed, first_eighth),)}),
    "Q5_1": FileType(LlamaFileType.MOSTLY_Q5_1, "Q5_1"),
    "MXFP4_MOE": FileType(LlamaFileType.MOSTLY_MXFP4_MOE, "MXFP4", "Q8_0", {"any": (("MXFP4", experts), ("Q8_0",))}, ignores_shared=True),
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
    "IQ2_XXS": FileType(LlamaFileType.MOSTLY_IQ2_XXS, "IQ2_XXS", "Q5_K", WITH_Q2_K, ignores_shared=True),
    "IQ2_XS": FileType(LlamaFileType.MOSTLY_IQ2_XS, "IQ2_XS", "Q5_K", WITH_Q2_K, ignores_shared=True),
    "IQ2_S": FileType(LlamaFileType.MOSTLY_IQ2_S, "IQ2_XS", "Q5_K", WITH_IQ3_S, ignores_shared=True),
    "IQ2_M": FileType(LlamaFileType.MOSTLY_IQ2_M, "IQ2_S", "Q5_K", WITH_IQ3_S, ignores_shared=True),
    "IQ3_XXS": FileType(
        LlamaFileType.MOSTLY_IQ3_XXS,
        "IQ3_XXS",
        "Q5_K",
        rules={
            "embedding": (("IQ3_S",),),
            "attn_v": (("Q4_K", grouped), ("IQ3_S", unweighed)),
            "attn_k": (("IQ2_S",),),
            "attn_q": (("IQ2_S",),),
            "attn_output": (("Q5_K", eight_experts, not_falcon), ("IQ3_S", not_falcon)),
            "ffn_down": (("Q4_K", unweighed, first_eighth), ("Q3_K", unweighed)),
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
    "IQ4_NL": FileType(LlamaFileType.MOSTLY_IQ4_NL, "IQ4_NL", rules=WITH_Q5_K),
    "IQ4_XS": FileType(LlamaFileType.MOSTLY_IQ4_XS, "IQ4_XS", rules=WITH_Q5_K),
}
"""Every file type that llama-quantize names, but Q1_0, Q2_0 and IQ1_*."""

CONVERTED = {"NVFP4": FileType(LlamaFileType.MOSTLY_NVFP4, "NVFP4")}
"""What convert_hf_to_gguf alone makes, from folders that have the type."""
