"""Whether a source's numbers are finite, and which of its tensors is at fault where a run meets NaN or Inf."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.errors import NumericsError, about

PIECE_ELEMENTS = 1 << 22


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise :class:`NumericsError` when a float tensor has NaN or Inf. A piece at a time: the check makes copies."""
    if not tensor.is_floating_point():
        return
    one_byte = tensor.dtype.itemsize == 1  # for which torch has no isfinite
    pieces = tensor.reshape(-1).split(PIECE_ELEMENTS)
    if not all(bool(torch.isfinite(piece.float() if one_byte else piece).all()) for piece in pieces):
        raise NumericsError(f"{name}: the source has NaN or Inf; check the checkpoint, or take another revision of it")


@contextmanager
def culprit_named(source: Checkpoint) -> Iterator[None]:
    """Raise a :class:`NumericsError` of the work within with the name of the first tensor of ``source`` that has NaN or Inf, if one has.

    Where a model is run, these show in what a later layer makes. So the weights are searched when it has happened, and no run that ends
    well reads them twice.
    """
    try:
        yield
    except NumericsError:
        for name in source.specs:
            if not source.is_opaque(name):
                with about(source.source):
                    check_finite(name, source.read(name))
        raise
