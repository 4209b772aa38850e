"""What a model's tensors mean: which linears share an input, what can absorb a scale, GGUF names and row order."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property

import torch
from torch import Tensor

from quantcli.registry import find, names


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear of a decoder layer, by module names within the layer.

    ``tap``: the first linear fed by the same input; ``prev``: the op whose output channels can absorb a scale of that input, or None.
    """

    name: str
    tap: str
    prev: str | None = None


@dataclass(frozen=True)
class Architecture:
    """What is known of one family of models. A literal: nothing here depends on a checkpoint.

    ``layer``: the module name of decoder layer ``{i}``. ``gguf_names``: HF module → GGUF name, both without ``.weight``/``.bias``.
    ``rotary``: linears (names within the layer) whose rows GGUF keeps in rotary order → the config key that counts their heads.
    ``norm_offset``: what GGUF adds to norm weights (Gemma stores w − 1). ``ignored``: name endings of stored tensors that hold nothing.
    """

    model_types: tuple[str, ...]
    layer: str
    linears: tuple[Linear, ...]
    gguf_arch: str
    gguf_names: Mapping[str, str]
    rotary: Mapping[str, str] = field(default_factory=dict)
    norm_offset: float = 0.0
    ignored: tuple[str, ...] = ()

    def gguf_name(self, name: str) -> str | None:
        """The GGUF name of the HF tensor ``name``, or None when the architecture has no such tensor."""
        return _rename(name, self._to_gguf)

    def hf_name(self, name: str) -> str | None:
        """The HF name of the GGUF tensor ``name``, or None when the architecture has no such tensor."""
        return _rename(name, self._to_hf)

    def row_order(self, name: str, n_rows: int, config: Mapping) -> Tensor | None:
        """The HF row that each GGUF row of tensor ``name`` holds: [n_rows] int64; None when rows stay as they are.

        HF rotates the two halves of a head, GGUF's engines rotate neighbours: row ``2j + k`` of a head is HF's row ``k·(head_dim/2) + j``.
        """
        key = next((key for linear, key in self.rotary.items() if name.rpartition(".")[0].endswith(f".{linear}")), None)
        if key is None:
            return None
        n_heads = config.get(key) or config["num_attention_heads"]
        return torch.arange(n_rows).view(n_heads, 2, -1).transpose(1, 2).reshape(-1)

    @cached_property
    def _to_gguf(self) -> dict[str, str]:
        return dict(self.gguf_names)

    @cached_property
    def _to_hf(self) -> dict[str, str]:
        return {gguf: hf for hf, gguf in self.gguf_names.items()}


@dataclass(frozen=True)
class StoredNames(Architecture):
    """The architecture of a GGUF file taken as it is: tensors keep GGUF's names and rows, and each matrix reads an input of its own."""

    def gguf_name(self, name: str) -> str | None:
        return name

    def hf_name(self, name: str) -> str | None:
        return name


def as_stored(gguf_arch: str) -> StoredNames:
    """What answers to any GGUF architecture, known here or not."""
    return StoredNames((), "blk.{i}", (), gguf_arch, {})


def of(config: Mapping) -> Architecture | None:
    """The architecture that answers to ``config["model_type"]``, or None; of a GGUF file taken as it is, which has none, the stored one."""
    if (stored := config.get("gguf_architecture")) is not None:
        return as_stored(stored)
    return _by_model_type().get(config.get("model_type", ""))


def of_gguf(gguf_arch: str) -> Architecture | None:
    """The architecture whose GGUF files say ``general.architecture = gguf_arch``, or None."""
    return next((arch for arch in _by_model_type().values() if arch.gguf_arch == gguf_arch), None)


@cache
def _by_model_type() -> dict[str, Architecture]:
    archs = [find("archs", name).ARCH for name in names("archs")]
    return {model_type: arch for arch in archs for model_type in arch.model_types}


def _rename(name: str, table: Mapping[str, str]) -> str | None:
    """``name`` by a table of module patterns: its layer number and its last word (weight, bias) are kept."""
    module, _, suffix = name.rpartition(".")
    match = re.search(r"\.(0|[1-9]\d*)(?=\.)", module)
    pattern = module if match is None else f"{module[: match.start()]}.{{i}}{module[match.end() :]}"
    target = table.get(pattern)
    if target is None or suffix not in ("weight", "bias"):
        return None
    return f"{target.replace('{i}', match[1]) if match else target}.{suffix}"
