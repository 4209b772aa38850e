"""Passes: methods of quantization, one a file, and their common base class."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar, Generic, TypeVar

from quantcli import registry
from quantcli.tensors import Layer, Report, Stats

__all__ = ["Pass", "names", "of"]

O = TypeVar("O")  # noqa: E741
"""A pass's options: a frozen dataclass with a default for each, which refuses values out of range when it is made."""


class Pass(ABC, Generic[O]):
    """A method of quantization. It sees a layer, statistics of what its linears read, and its options: no path, no config.json, no model.

    A module in this folder defines a subclass and exports an instance as ``PASS``; the maths are free functions above it. Abstract methods
    must be written; each of the other attributes has a default that suits most passes.
    """

    name: str
    """The file's name, by which a recipe calls it."""

    options_type: type[O]
    """The class of its options. A recipe's options for the pass are its keywords."""

    changes_basis: ClassVar[bool] = False
    """Whether it scales inputs of a tap against the weights that read it, so that all tensors of a layer must be in memory."""

    chooses_codes: ClassVar[bool] = True
    """Whether it chooses codes. A pass that does not must be followed by one that does."""

    needs_grid: ClassVar[bool] = False
    """Whether it chooses codes one by one, or moves the scales of a grid, and so cannot work on a number format without one
    (:attr:`quantcli.qtypes.QType.no_grid`)."""

    @abstractmethod
    def needs(self, options: O) -> frozenset[str]:
        """The statistics that :meth:`run` reads with ``options``: some of H, importance, absmax, mean, dXXT. Empty: no text is needed."""

    @abstractmethod
    def run(self, layer: Layer, stats: Mapping[str, Stats], options: O) -> Report:
        """Work on the tensors of ``layer.schemes``; ``stats``: tap → statistics of its inputs.

        Edits ``layer`` only: codes go to ``layer.quantized``, a change of basis to ``layer.tensors`` and ``layer.scales``. Returns a report
        for each tensor, with its relative error. :class:`~quantcli.errors.RecipeError` for statistics that are missing or of another
        model, :class:`~quantcli.errors.NumericsError` for NaN or Inf, both with the tensor's name.
        """


@cache
def of(name: str) -> Pass[Any]:
    """The pass ``name``; :class:`~quantcli.errors.UnsupportedError` lists the ones there are."""
    found = registry.find("passes", name).PASS
    assert isinstance(found, Pass)
    return found


def names() -> tuple[str, ...]:
    """Every pass, sorted."""
    return registry.names("passes")
