"""Which tensor gets which type in a GGUF file type: llama-quantize's choice, tensor by tensor (src/llama-quant.cpp)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from gguf import LlamaFileType

from quantcli.errors import RecipeError
from quantcli.formats.gguf.container import BLOCKS
from quantcli.formats.gguf.naming import gguf_names, usual_config
from quantcli.ops.blocks import KINDS
from quantcli.tensors import Scheme, TensorSpec


def more_bits(i: int, n: int) -> bool:
    """The layers that hurt most: the first and last eighth, and every third one between."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def first_eighth(i: int, n: int) -> bool:
    return i < n // 8


def first_four(i: int, n: int) -> bool:
    return i < 4


Rule = tuple[Callable[[int, int], bool], str]
"""(is layer i of n among them, the type these take)."""


@dataclass(frozen=True)
class FileType:
    """``number``: what general.file_type says; ``default``: the type of most tensors; ``rules``: role → where another type stands."""

    number: LlamaFileType
    default: str
    rules: Mapping[str, Rule] = field(default_factory=dict)


FILE_TYPES: dict[str, FileType] = {
    "F32": FileType(LlamaFileType.ALL_F32, "F32"),
    "F16": FileType(LlamaFileType.MOSTLY_F16, "F16"),
    "BF16": FileType(LlamaFileType.MOSTLY_BF16, "BF16"),
    "Q8_0": FileType(LlamaFileType.MOSTLY_Q8_0, "Q8_0"),
    "Q4_0": FileType(LlamaFileType.MOSTLY_Q4_0, "Q4_0"),
    "Q4_1": FileType(LlamaFileType.MOSTLY_Q4_1, "Q4_1"),
    "Q5_0": FileType(LlamaFileType.MOSTLY_Q5_0, "Q5_0"),
    "Q5_1": FileType(LlamaFileType.MOSTLY_Q5_1, "Q5_1"),
    "Q4_K_S": FileType(LlamaFileType.MOSTLY_Q4_K_S, "Q4_K", {"attn_v": (first_four, "Q5_K"), "ffn_down": (first_eighth, "Q5_K")}),
    "Q4_K_M": FileType(LlamaFileType.MOSTLY_Q4_K_M, "Q4_K", {"attn_v": (more_bits, "Q6_K"), "ffn_down": (more_bits, "Q6_K")}),
    "Q5_K_S": FileType(LlamaFileType.MOSTLY_Q5_K_S, "Q5_K"),
    "Q5_K_M": FileType(LlamaFileType.MOSTLY_Q5_K_M, "Q5_K", {"attn_v": (more_bits, "Q6_K"), "ffn_down": (more_bits, "Q6_K")}),
    "Q6_K": FileType(LlamaFileType.MOSTLY_Q6_K, "Q6_K"),
}
ALIASES = {"Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
DENSE = ("F32", "F16", "BF16")

FALLBACKS = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""What a type of 256-weight blocks becomes in rows that are no multiple of 256; rows that are no multiple of 32 either become F16."""


@dataclass(frozen=True)
class Options:
    """What a user may say of a GGUF file, under llama-quantize's names; a recipe's ``format_options``.

    ``tensor_type``: "REGEX=TYPE" on GGUF names, the first match wins; ``pre_tokenizer``: replaces the name found from tokenizer.json;
    ``split_max_size``: of the files, when there may be several.
    """

    pure: bool = False
    tensor_type: Sequence[str] = ()
    output_tensor_type: str | None = None
    token_embedding_type: str | None = None
    leave_output_tensor: bool = False
    pre_tokenizer: str | None = None
    split_max_size: str | None = None

    @classmethod
    def of(cls, words: Mapping[str, Any]) -> Options:
        """The options by name; :class:`RecipeError` for one that GGUF does not have."""
        known = [f.name for f in fields(cls)]
        if unknown := sorted(words.keys() - set(known)):
            raise RecipeError(f"the gguf format has no option '{unknown[0]}'; there are: {', '.join(known)}")
        return cls(**words)

    def manual(self, gguf_name: str) -> str | None:
        """The type that ``tensor_type`` gives a tensor, or None."""
        for rule in self.tensor_type:
            pattern, _, ggml_type = rule.rpartition("=")
            try:
                if re.search(pattern, gguf_name):
                    return ggml_type.upper()
            except re.error as error:
                raise RecipeError(f"--tensor-type {rule}: expected REGEX=TYPE: {error}") from error
        return None


def file_type(name: str) -> FileType:
    """The file type called ``name`` (any case; Q4_K means Q4_K_M as for llama-quantize)."""
    known = FILE_TYPES.get(ALIASES.get(name.upper(), name.upper()))
    if known is None:
        raise RecipeError(f"'{name}' is no GGUF file type quantcli writes; there are: {', '.join(FILE_TYPES)}")
    return known


def is_quantizable(gguf_name: str, spec: TensorSpec) -> bool:
    """Matrices; never norms and biases, which stay F32, nor routers and thin convolutions."""
    kept = gguf_name.endswith(("_norm.weight", "ffn_gate_inp.weight", "ssm_conv1d.weight"))
    return len(spec.shape) >= 2 and gguf_name.endswith("weight") and not kept


def mix(name: str, specs: Mapping[str, TensorSpec], config: Mapping, **options: Any) -> dict[str, Scheme]:
    """The scheme of every matrix in a file of type ``name``: HF name → scheme. What is missing here is kept dense.

    ``specs``: the model's tensors by HF name; ``options``: :class:`Options`. Raises :class:`RecipeError` for a type that quantcli cannot
    write, and where a user's own type does not fit a row.
    """
    chosen = _types(file_type(name), Options.of(options), specs, config)
    return {hf: _scheme(hf, ggml_type, specs[hf]) for hf, ggml_type in chosen.items() if ggml_type is not None}


def closest(schemes: Mapping[str, Scheme], specs: Mapping[str, TensorSpec], config: Mapping, *, asked: str | None = None) -> FileType:
    """The file type whose own mix gives the most weights the type they have in ``schemes``: what general.file_type is to say.

    ``asked``: the mix that was named, which wins among equals: in a model whose rows all fall back, Q6_K has the very tensors of Q8_0.
    """

    def agreement(name: str) -> tuple[int, bool]:
        chosen = _types(FILE_TYPES[name], Options(), specs, config)
        alike = sum(specs[hf].n_elements for hf, scheme in schemes.items() if chosen.get(hf) == scheme.qtype.upper())
        return alike, name == asked

    return FILE_TYPES[max(FILE_TYPES, key=agreement)]


def _types(kind: FileType, options: Options, specs: Mapping[str, TensorSpec], config: Mapping) -> dict[str, str | None]:
    """HF name → ggml type of every matrix, None for one that is to stay as it is."""
    table = gguf_names(specs, config)
    chooser = _Chooser(kind, options, usual_config(config), set(table.values()))
    chosen: dict[str, str | None] = {}  # by GGUF name: all experts of a layer are one tensor
    for hf, target in table.items():
        if target not in chosen and is_quantizable(target, specs[hf]):
            chosen[target] = chooser.choose(target, specs[hf].shape[-1])
    return {hf: chosen[target] for hf, target in table.items() if target in chosen}


class _Chooser:
    """llama_tensor_get_type: sees the tensors in file order and counts those it decided by role, as that function does."""

    def __init__(self, kind: FileType, options: Options, config: Mapping, gguf_names: set[str]) -> None:
        self.kind, self.options = kind, options
        self.is_tied = "output.weight" not in gguf_names
        self.n_layers = config["num_hidden_layers"]
        self.n_seen = {"attn_v": 0, "ffn_down": 0}
        self.n_of = {"attn_v": sum(name.endswith("attn_v.weight") for name in gguf_names), "ffn_down": self.n_layers}
        self.is_70b = self.n_layers == 80 and config["num_attention_heads"] != config.get("num_key_value_heads")

    def choose(self, name: str, in_features: int) -> str | None:
        """The ggml type of the matrix with GGUF name ``name``; None when it is to stay as it is."""
        options = self.options
        if options.leave_output_tensor and name == "output.weight":
            return None
        if options.token_embedding_type and name == "token_embd.weight":
            return options.token_embedding_type.upper()
        if options.output_tensor_type and name == "output.weight":
            return options.output_tensor_type.upper()
        if self.kind.default in DENSE:
            return self.kind.default
        if (manual := options.manual(name)) is not None:
            return _fit(manual, in_features)
        return _fit(self.kind.default if options.pure else self.by_role(name, in_features), in_features)

    def by_role(self, name: str, in_features: int) -> str:
        default = self.kind.default
        if name == "output.weight" or (self.is_tied and name == "token_embd.weight"):
            return self.head(in_features)
        role = name.split(".")[-2]
        if role not in self.n_seen:
            return default
        applies, special = self.kind.rules.get(role, (lambda i, n: False, default))
        chosen = special if applies(self.n_seen[role], self.n_of[role]) else default
        self.n_seen[role] += 1
        if role == "attn_v" and self.is_70b and chosen == "Q4_K":
            return "Q5_K"  # eight heads share it: small, and worth more bits
        return chosen

    def head(self, in_features: int) -> str:
        if self.options.output_tensor_type:
            return self.options.output_tensor_type.upper()
        if self.kind.default == "Q8_0" or in_features % BLOCKS[self.kind.default][0]:
            return "Q8_0"
        return "Q6_K"


def _fit(ggml_type: str, in_features: int) -> str:
    """``ggml_type``, or what llama-quantize puts in its place for rows that do not fill its blocks."""
    if ggml_type not in BLOCKS or in_features % BLOCKS[ggml_type][0] == 0:
        return ggml_type
    smaller = FALLBACKS.get(ggml_type, ggml_type)
    return "F16" if in_features % BLOCKS[smaller][0] else smaller


def _scheme(name: str, ggml_type: str, spec: TensorSpec) -> Scheme:
    """The scheme of ``ggml_type``; :class:`RecipeError` when quantcli has none, or the rows do not fill its blocks."""
    known = [*DENSE, *(kind.upper() for kind in KINDS)]
    if ggml_type not in known:
        raise RecipeError(f"{name}: quantcli writes no tensors of type {ggml_type}; there are: {', '.join(known)}")
    if spec.shape[-1] % BLOCKS[ggml_type][0]:
        raise RecipeError(
            f"{name}: in_features {spec.shape[-1]} is not a multiple of the {ggml_type} block {BLOCKS[ggml_type][0]}; use F16"
        )
    return Scheme.of(ggml_type.lower())
