"""How the readers of a folder hold its weights: the module that each becomes, under every name that a reader may know it by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

LINEAR, DERIVED, OTHER = "linear", "derived", "other"
"""What a weight's module is: torch's linear itself, a class derived from it, or none of these."""


@dataclass(frozen=True, slots=True)
class Module:
    """The module of one weight. ``names``: its names in the classes of transformers that load the folder; ``kind``: what it is in the first
    of them; ``kept``: why transformers keeps it dense, "" where it does not."""

    names: tuple[str, ...]
    kind: str = LINEAR
    kept: str = ""


@dataclass(frozen=True, slots=True)
class Modules:
    """The modules of a folder. ``of``: weight on disk → its module; ``unstored``: linears that no tensor of the folder fills, such as an
    output embedding that is tied; ``lost``: format → tensors that transformers does not find, because it has another module in the place of
    theirs as soon as a folder is of that format (Llama 4's experts)."""

    of: Mapping[str, Module] = field(default_factory=lambda: MappingProxyType({}))
    unstored: tuple[str, ...] = ()
    lost: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: MappingProxyType({}))

    def beside(self, others: Modules) -> Modules:
        """These, and what ``others`` know of the same folder under names that its tensors are given there."""
        return Modules({**others.of, **self.of}, self.unstored, self.lost)

    def spellings(self, weight: str) -> tuple[str, ...]:
        """The names of the module of ``weight``: on disk first, then in transformers, then as engines that keep to the names of older
        folders have it."""
        disk = weight.removesuffix(".weight")
        names = (disk, *(self.of[weight].names if weight in self.of else ()))
        return tuple(dict.fromkeys((*names, *map(older, names))))


def older(name: str) -> str:
    """``name`` as folders had it before transformers 5, and vLLM has it still: the parts of a model that also sees at the top, the text
    model with a root of its own. Other names are as they were."""
    root, _, rest = name.partition(".")
    part, _, inner = rest.partition(".")
    if root != "model" or not inner:
        return name
    if part == "language_model":
        return f"language_model.model.{inner}"
    return rest if part in ("visual", "vision_tower", "vision_model", "multi_modal_projector", "audio_tower") else name
