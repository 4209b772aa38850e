"""Recognizes experts by the names of their tensors: ``….experts.3.gate_proj`` belongs to expert 3 of ``….experts``, in every family."""

from __future__ import annotations

import re
from dataclasses import dataclass

EXPERT = re.compile(r"(?P<stack>.*\.experts)\.(?P<number>\d+)\.(?P<linear>.+)")


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
