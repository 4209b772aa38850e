"""Linears that engines join into one when they load a model, and which must therefore be quantized alike."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping

from quantcli.errors import RecipeError
from quantcli.experts import expert_of
from quantcli.formats.shared.folder import is_dense, module_of
from quantcli.tensors import Scheme

FUSED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    **dict.fromkeys(("gate_proj", "up_proj", "w1", "w3"), "gate_up_proj"),
    **dict.fromkeys(("q_a_proj", "kv_a_proj_with_mqa"), "fused_qkv_a_proj"),
}
"""The last parts of names of modules that vLLM and SGLang run as one matrix when they have the same parent → its name there."""


def check_fused(matrices: Iterable[str], schemes: Mapping[str, Scheme], compared_by: Callable[[Scheme], Hashable] = str) -> None:
    """Raise :class:`RecipeError` when linears that engines join have different schemes, or some have codes and others have none.

    ``matrices``: names of all weights on disk; ``schemes``: of those that are not copied; ``compared_by``: what of a scheme
    the engine reads, where that is not all of it. The experts of a layer count as one, too.
    """
    members: dict[str, dict[Hashable, str]] = {}
    for name in matrices:
        if key := joined(module_of(name)):
            scheme = schemes.get(name)
            members.setdefault(key, {}).setdefault(None if scheme is None or is_dense(scheme) else compared_by(scheme), name)
    for first, second, *_ in (list(alike.values()) for alike in members.values() if len(alike) > 1):
        one, other = (str(schemes.get(name, "dense")) for name in (first, second))
        raise RecipeError(
            f"{first} is {one} and {second} is {other}: vLLM and SGLang run these as one matrix and load it only when they are alike; "
            "let one rule cover both"
        )


def fused_groups(names: Iterable[str]) -> dict[str, list[str]]:
    """The engine's module → the weights of which it is made; those of one weight are left out."""
    groups: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        if key := joined(module_of(name)):
            groups.setdefault(key, []).append(name)
    return {key: members for key, members in groups.items() if len(members) > 1}


def joined(module: str) -> str | None:
    """The engine's module that ``module`` becomes a part of; None for a linear of its own."""
    if (at := expert_of(module)) and "." not in at.linear:  # not its bias
        return at.stack
    parent, _, last = module.rpartition(".")
    return f"{parent}.{FUSED[last]}" if last in FUSED else None
