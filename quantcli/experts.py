"""Recognizes experts and their routers by the names of tensors: ``….experts.3.gate_proj`` belongs to expert 3 of ``….experts``."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

EXPERT = re.compile(r"(?P<stack>.*\.experts)\.(?P<number>\d+)\.(?P<linear>.+)")

ROUTERS = frozenset(("router", "gate", "shared_expert_gate"))
"""Modules beside ``experts`` that choose among them, or weigh one that every token reaches."""


@dataclass(frozen=True, slots=True)
class ExpertName:
    """A tensor, linear or tap of one expert: ``stack``: the module that holds all experts of the layer; ``linear``: what follows the
    expert's number."""

    stack: str
    number: int
    linear: str

    @property
    def expert(self) -> str:
        """The expert that it belongs to."""
        return f"{self.stack}.{self.number}"


def expert_of(name: str) -> ExpertName | None:
    """The parts of ``name``, of a tensor, a linear or a tap; None where it does not belong to an expert."""
    match = EXPERT.fullmatch(name)
    return None if match is None else ExpertName(match["stack"], int(match["number"]), match["linear"])


def stacks_of(names: Iterable[str]) -> set[str]:
    """The modules called ``experts`` that the tensors ``names`` belong to, one by one or all in one."""
    return {f"{before}.experts" for before, found, _ in (name.partition(".experts.") for name in names) if found}


def is_router(name: str, stacks: Collection[str]) -> bool:
    """Whether the tensor or linear ``name`` is a router's of one of ``stacks``: of a module called so beside the experts."""
    parts = name.split(".")
    return any(part in ROUTERS and ".".join((*parts[:i], "experts")) in stacks for i, part in enumerate(parts))
