"""What stays dense in a folder, under every name by which its readers ask for that: the one list from which each dialect's is made."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.modules import OTHER, Modules
from quantcli.errors import RecipeError
from quantcli.experts import expert_of
from quantcli.formats.shared.fused import fused_groups
from quantcli.tensors import Scheme, TensorSpec

EMBEDDING = re.compile(r"(.*\.)?(embed_tokens\w*|embed_in|embed_positions|\w*embeddings?|wte|wpe)")
"""Modules that hold a matrix and are no linear."""


def dense_weights(source: Checkpoint, quantized: Mapping[str, Scheme]) -> list[TensorSpec]:
    """The matrices of ``source`` that ``quantized`` has no codes for and that may be linears, wherever they are in the model."""
    dense = (
        spec for spec in source.specs.values() if spec.name not in quantized and spec.name.endswith(".weight") and len(spec.shape) == 2
    )
    return [spec for spec in dense if not EMBEDDING.fullmatch(spec.name.removesuffix(".weight"))]


def dense_modules(source: Checkpoint, quantized: Mapping[str, Scheme], modules: Modules, *, joined: bool = False) -> list[str]:
    """Every linear that stays dense, by each of its names, and those that no tensor fills; the folder's own names come first.

    ``joined``: with the names of the modules into which vLLM joins them, and a layer's experts by the module around them.
    """
    weights = [spec.name for spec in dense_weights(source, quantized)]
    own = [stack_or_module(weight) if joined else weight.removesuffix(".weight") for weight in weights]
    if joined:
        own += fused_groups(weights)
    others = [name for weight in weights if is_linear(weight, modules) for name in modules.spellings(weight)[1:]]
    coded = {name for weight in quantized for name in modules.spellings(weight)}
    heads = [] if "lm_head.weight" in quantized else ["lm_head"]
    return list(dict.fromkeys((*own, *others, *(name for name in modules.unstored if name not in coded), *heads)))


def stack_or_module(weight: str) -> str:
    """The module of ``weight``, or the one around all experts where it belongs to one of them."""
    return at.stack if (at := expert_of(weight)) else weight.removesuffix(".weight")


def is_linear(weight: str, modules: Modules) -> bool:
    """Whether transformers has a linear for ``weight``, as far as is known."""
    return weight not in modules.of or modules.of[weight].kind != OTHER


def harmless(names: Iterable[str], quantized: Collection[str], modules: Modules, hits: Callable[[str, str], bool]) -> list[str]:
    """``names`` without those that a reader would find in the name of a module with codes: ``hits(name, module)``.

    Raises :class:`RecipeError` where all names of a dense module are such: one of ``names`` that has no other spelling left.
    """
    coded = [name for weight in quantized for name in modules.spellings(weight)]
    left, out = [], []
    for name in names:
        victim = next((module for module in coded if hits(name, module)), None)
        if victim is None:
            left.append(name)
        else:
            out.append((name, victim))
    spelt = {weight.removesuffix(".weight"): modules.spellings(weight) for weight in modules.of}
    for name, victim in out:
        if not set(spelt.get(name, ())) & set(left):
            raise RecipeError(f"{name} stays dense, and readers would leave out {victim} with it; quantize or keep both")
    return left


def transformers_hits(name: str, module: str) -> bool:
    """Whether transformers takes the entry ``name`` of a list for ``module``: from its start to a dot, or as its end."""
    return module == name or module.startswith(f"{name}.") or module.endswith(name)


def unknown(names: Iterable[str], tensors: Iterable[str]) -> list[str]:
    """Those of ``names`` that mean none of the ``tensors`` of a folder under any spelling: spellings differ in how they begin, and share
    their last two parts. An output embedding may be tied, and be in no tensor."""
    tails = {tail_of(name.removesuffix(".weight")) for name in tensors}
    return [name for name in names if tail_of(name) not in tails and name.rpartition(".")[2] != "lm_head"]


def tail_of(module: str) -> tuple[str, ...]:
    return tuple(module.split(".")[-2:])
