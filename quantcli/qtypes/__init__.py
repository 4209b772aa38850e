"""Which numbers can be stored: one grid a file, and the contract that each one keeps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from quantcli import registry
from quantcli.errors import UnsupportedError
from quantcli.qtypes.shared.affine import Affine, AffineCodes
from quantcli.tensors import Factors, Grid, QuantizedTensor, Scheme, TensorSpec

__all__ = ["Parts", "QType", "names", "of"]

Parts = Mapping[str, Tensor]
"""The tensors that hold one weight matrix, by the number format's own names for them."""

SCALED_ROWS = 128
"""Rows that share a scale in number formats scaled by blocks of a matrix."""


class QType(ABC):
    """A number format: which numbers it can store, and how. It knows one weight matrix, no file and no model.

    ``W`` is a weight matrix [out, in], float32 and contiguous on the device that does the work, unless a method says otherwise. ``scheme``
    names this number format, with options among :attr:`options`. ``importance`` is the mean square of each input, [in], or None where all
    count alike. Errors: :class:`~quantcli.errors.RecipeError` for a shape or an option that does not fit,
    :class:`~quantcli.errors.NumericsError` for NaN, Inf, or a number beyond the range.

    A module in this folder defines a subclass, or an instance of one that several share, and exports it as ``QTYPE``. Abstract methods must
    be written; each of the others has a default that is right for most.
    """

    name: str
    """The file's name, by which a scheme calls it."""

    options: ClassVar[Mapping[str, Any]] = {}
    """The options that a scheme may set, and their defaults."""

    engine_act: ClassVar[str] = ""
    """How the engine rounds what a linear reads (:func:`quantcli.ops.round_inputs`), whatever the scheme says; "" where the scheme says
    it, by the option ``act``."""

    other_options: ClassVar[frozenset[str]] = frozenset({"act", "search"})
    """Those of :attr:`options` that do not say which numbers can be stored."""

    takes_groups: ClassVar[bool] = False
    """Whether integers in groups may be converted to this type (:meth:`holds` says which), so that it is worth trying."""

    @property
    def no_grid(self) -> str | None:
        """Why a pass that needs a grid before codes are chosen cannot use this type, and what to do instead; None where it can."""
        return None

    @property
    def run(self) -> int:
        """How many weights one choice codes: 1, or those whose codes come from a code book together (:meth:`nearest`)."""
        return 1

    @property
    def needs_importance(self) -> bool:
        """Whether :meth:`encode` refuses to work without importance."""
        return False

    @property
    def has_own_encoding(self) -> bool:
        """Whether :meth:`encode` makes other codes than the nearest of the grid: a peer's exact bytes, or another rule for ties."""
        return type(self).encode is not QType.encode

    @property
    def can_rescale(self) -> bool:
        """Whether a pass may move the scales and offsets of a grid (:meth:`moved`)."""
        return type(self).moved is not QType.moved

    @property
    def shares_parts(self) -> bool:
        """Whether matrices that an engine joins (q, k and v; gate and up) have parts in common (:meth:`fused`)."""
        return type(self).fused is not QType.fused

    @abstractmethod
    def layout(self, shape: tuple[int, ...], scheme: Scheme) -> dict[str, TensorSpec]:
        """The parts of a matrix of ``shape``: their names, dtypes and shapes, so that every byte of a file is known before a weight is
        read. :class:`~quantcli.errors.RecipeError` for a shape or an option that does not fit."""

    @abstractmethod
    def fit(self, W: Tensor, scheme: Scheme, importance: Tensor | None = None, *, fused: Parts | None = None) -> Grid:
        """The grid of ``W``: scale and offset already as the file can hold them. ``fused``: parts from :meth:`fused`, to be kept."""

    @abstractmethod
    def pack(self, codes: Tensor, grid: Grid, scheme: Scheme) -> QuantizedTensor:
        """``codes`` [out, in] of ``grid``, int8 or uint8, as parts."""

    @abstractmethod
    def unpack(self, tensor: QuantizedTensor) -> Tensor:
        """The weights [out, in] float32 that the engine computes."""

    def encode(self, W: Tensor, scheme: Scheme, importance: Tensor | None = None, *, fused: Parts | None = None) -> QuantizedTensor:
        """``W``, in any float dtype, rounded to nearest. The default fits a grid and takes the nearest code of every weight."""
        V = W.float()
        grid = self.fit(V, scheme, importance, fused=fused)
        return self.pack(grid.encode(V), grid, scheme)

    def fused(self, Ws: Sequence[Tensor], scheme: Scheme) -> dict[str, Tensor]:
        """The parts that the matrices ``Ws`` must have in common, because an engine runs them as one; none by default."""
        return {}

    def moved(self, grid: Grid, scale: Tensor, offset: Tensor | None, scheme: Scheme) -> Grid:
        """``grid`` with another ``scale`` and ``offset`` [out, n_groups], rounded to what the file holds. By default an
        :class:`~quantcli.errors.UnsupportedError`: nothing of the grid is free to move."""
        raise UnsupportedError(f"the scales of {scheme} are not free to move")

    def nearest(self, T: Tensor, H: Tensor, scale: Tensor) -> Tensor:
        """The codes [out, run] nearest to weights ``T`` [out, run] in the metric ``H`` [run, run], of a type that codes a run at once."""
        raise UnsupportedError(f"{self.name} codes each weight on its own")

    def chosen(self, tensor: QuantizedTensor) -> tuple[Tensor, Grid]:
        """The codes [out, in] of ``tensor`` and their grid, of a type that codes a run at once and so fits no grid beforehand."""
        raise UnsupportedError(f"{self.name} fits its grid beforehand")

    def factors(self, grid: Grid, scheme: Scheme) -> Factors | None:
        """The stored numbers of ``grid`` that may take other values once codes are chosen; None, the default, where there are none."""
        return None

    def stored(self, name: str, values: Tensor, scheme: Scheme) -> Tensor:
        """``values`` float32 of the factor ``name``, each as the nearest number that the file can hold, as float32."""
        raise UnsupportedError(f"{scheme} has no factor '{name}'")

    def of_factors(self, grid: Grid, values: Mapping[str, Tensor], scheme: Scheme) -> Grid:
        """``grid`` with other ``values`` of its factors, each of which the file can hold (:meth:`stored`)."""
        raise UnsupportedError(f"the scales of {scheme} are not free to move")

    def errors(self, W: Tensor, tensor: QuantizedTensor, *, chunk_elements: int = 1 << 18) -> tuple[float, float]:
        """‖W − Ŵ‖² and ‖W‖² of ``W`` in any float dtype; ``chunk_elements``: weights decoded at once, so that no second copy is made."""
        error = total = 0.0
        rows = -(-max(1, chunk_elements // W.shape[-1]) // SCALED_ROWS) * SCALED_ROWS
        for start in range(0, W.shape[0], rows):
            stop = min(start + rows, W.shape[0])
            V = W[start:stop].float()
            E = torch.sub(V, self.unpack(slice_rows(tensor, start, stop))).view(-1)
            error += float(E.dot(E))  # twice as fast as a sum of squares, which is another matrix first
            total += float(V.reshape(-1).dot(V.reshape(-1)))
        return error, total

    def errors_in(self, basis: Tensor, Ws: Sequence[Tensor], scheme: Scheme, importance: Tensor) -> list[Tensor]:
        """W − Q(W·diag(basis))·diag(1/basis) of each of ``Ws``, the matrices of one tap, rounded to nearest in ``basis`` [in], where its
        inputs have ``importance``."""
        scaled = [W * basis for W in Ws]
        fused = self.fused(scaled, scheme)
        return [(W - self.unpack(self.encode(W, scheme, importance, fused=fused))) / basis for W in scaled]

    def affine(self, scheme: Scheme) -> Affine | None:
        """The affine integer grid that ``scheme`` describes; None, the default, where it describes none."""
        return None

    def integers(self, tensor: QuantizedTensor) -> AffineCodes:
        """The codes of ``tensor`` on the grid of :meth:`affine`, which must give one."""
        raise UnsupportedError(f"{tensor.scheme} has no affine integers")

    def variants(self, scheme: Scheme) -> Iterator[Scheme]:
        """``scheme`` and those like it, in the order to be tried for its codes: with zero points, other scales, finer groups, more bits."""
        yield scheme

    def relatives(self, scheme: Scheme) -> Iterator[Scheme]:
        """Schemes of other number formats that may store the very codes of ``scheme``; none by default."""
        yield from ()

    def holds(self, source: Scheme, target: Scheme, in_features: int) -> str | None:
        """How well ``target``, of this number format, holds the codes of ``source`` in rows of ``in_features``: ``EXACT``, ``CODES`` or
        (None, the default) not at all. Not asked where both describe one grid."""
        return None

    def take(self, tensor: QuantizedTensor, target: Scheme) -> QuantizedTensor:
        """The codes of ``tensor`` in ``target``, of this number format, which holds them (:meth:`holds`).
        :class:`~quantcli.errors.NumericsError` for a scale that does not fit."""
        raise UnsupportedError(f"{target} takes no codes of {tensor.scheme}")


@cache
def of(name: str) -> QType:
    """The number format ``name``; :class:`~quantcli.errors.UnsupportedError` lists the ones there are."""
    qtype = registry.find("qtypes", name).QTYPE
    assert isinstance(qtype, QType)
    return qtype


def names() -> tuple[str, ...]:
    """Every number format, sorted."""
    return registry.names("qtypes")


def slice_rows(tensor: QuantizedTensor, start: int, stop: int) -> QuantizedTensor:
    """Rows ``start … stop`` of ``tensor``, from a multiple of :data:`SCALED_ROWS`. Its parts have a row for each of its own, one for each
    block of that many rows, or serve all rows."""
    n_rows, parts = tensor.shape[0], {}
    for name, part in tensor.parts.items():
        if part.shape[0] == n_rows and name != "g_idx":  # which has one for each input
            parts[name] = part[start:stop]
        elif part.ndim == 2:
            parts[name] = part[start // SCALED_ROWS : -(-stop // SCALED_ROWS)]
        else:
            parts[name] = part
    return QuantizedTensor(tensor.scheme, (stop - start, *tensor.shape[1:]), parts)
