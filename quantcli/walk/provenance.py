"""Provenance: the record in an output that says how to repeat the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from quantcli import __version__
from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Provenance:
    """``recipe``: as :meth:`Recipe.to_dict` writes it; ``source`` and the fingerprint of its weights; ``untied``: the input embedding's
    weight where the output embedding was given one of its own; ``data``: what calibrated it (``dataset_sha256``, ``calibrated_by``,
    ``dataset_sketch``); ``protected``: what ``protect_outliers`` found, None where that was not asked for."""

    version: str
    recipe: Mapping[str, Any]
    source: str
    source_fingerprint: str
    untied: str | None = None
    data: Mapping[str, str] = field(default_factory=dict)
    protected: tuple[Mapping[str, Any], ...] | None = None

    @classmethod
    def of(cls, source: Checkpoint, recipe: Recipe, *, untied: str | None = None) -> Provenance:
        """Of a run that has not begun."""
        return cls(__version__, recipe.to_dict(), source.source, source.fingerprint(), untied)

    def to_dict(self) -> dict[str, Any]:
        """The record by its keys in quantcli.json and, behind ``quantcli.``, in a GGUF file."""
        record: dict[str, Any] = {
            "version": self.version,
            "recipe": dict(self.recipe),
            "source": self.source,
            "source_fingerprint": self.source_fingerprint,
        }
        record |= {} if self.untied is None else {"untied": self.untied}
        record |= self.data
        return record if self.protected is None else record | {"protected": [dict(unit) for unit in self.protected]}
