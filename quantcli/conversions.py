"""Conversions: the codes of one number format in another that can hold them, without rounding, or with rounded scales alone.

An affine integer grid is ``w = scale·k``, k = code − zero point, a scale for each group of inputs. It lies inside another one when the
range of k does, when the other's groups divide its own, and when the other's dtype holds its scales. So symmetric 4 bits in groups of 128
are Q4_0 with every scale repeated four times, and GPTQ, AWQ and compressed-tensors are one grid in three packings. Two degrees:

``EXACT``   every weight decodes to the same float32, bit for bit
``CODES``   every code stays; a scale or minimum is rounded to the target's dtype: far less than rounding the weights again

What a number format holds, and how it takes codes, is said by its own :class:`~quantcli.qtypes.QType` (``holds``, ``take``); this module
knows none by name. A format that says nothing passes its codes on to itself alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from quantcli import qtypes
from quantcli.errors import NumericsError, UnsupportedError
from quantcli.qtypes.shared.affine import CODES, EXACT
from quantcli.tensors import QuantizedTensor, Scheme

__all__ = ["CODES", "EXACT", "candidates", "convert", "decode", "exactness"]

ROW = 256
"""Inputs of a row by which sizes are compared: a whole number of blocks of every type."""


def exactness(source: Scheme, target: Scheme, in_features: int) -> str | None:
    """How well ``target`` holds what ``source`` stores in rows of ``in_features``: :data:`EXACT`, :data:`CODES` or None for not at all."""
    if target.static_activations and source.get("act") != target.get("act"):
        return None
    if grid_of(source) == grid_of(target):
        return EXACT
    return qtypes.of(target.qtype).holds(source, target, in_features)


def candidates(source: Scheme) -> Iterator[Scheme]:
    """Schemes that may hold the codes of ``source``, in the order in which a format that supports them should take one.

    First those that ``source`` names itself; then other types that take groups of integers, those of the fewest bits first and of as many
    bits by name: a scale that is rounded (:data:`CODES`) costs less than a longer type that would hold it exactly.
    """
    own = qtypes.of(source.qtype)
    yield from own.variants(source)
    if source.get("act"):
        yield from own.variants(source.with_options(act=""))
    yield from own.relatives(source)
    taking = (Scheme.of(name) for name in qtypes.names() if qtypes.of(name).takes_groups)
    yield from sorted(taking, key=lambda scheme: (n_bytes_of_row(scheme), scheme.qtype))


def n_bytes_of_row(scheme: Scheme) -> int:
    """What :data:`ROW` weights take in ``scheme``, every part counted."""
    return sum(part.nbytes for part in qtypes.of(scheme.qtype).layout((1, ROW), scheme).values())


def convert(tensor: QuantizedTensor, target: Scheme) -> tuple[QuantizedTensor, bool]:
    """``tensor`` on the grid of ``target``, and whether every weight still decodes to the same float32.

    Raises :class:`UnsupportedError` where :func:`exactness` finds no way, :class:`NumericsError` when a scale does not fit its dtype.
    """
    source = tensor.scheme
    degree = exactness(source, target, tensor.shape[-1])
    if degree is None:
        raise UnsupportedError(f"the grid of {target} does not hold that of {source}")
    if grid_of(source) == grid_of(target):
        kept = {name: part for name, part in tensor.parts.items() if name != "input_scale" or target.static_activations}
        return QuantizedTensor(target, tensor.shape, kept), True
    out = qtypes.of(target.qtype).take(tensor, target)
    same = torch.equal(decode(out), decode(tensor))
    if not same and degree == EXACT:
        raise NumericsError(f"{source} as {target} does not decode to the same weights; the source breaks its own format's rules")
    return out, same


def decode(tensor: QuantizedTensor) -> Tensor:
    """The weights [..., out, in] float32 that an engine computes with."""
    return qtypes.of(tensor.scheme.qtype).unpack(tensor)


def grid_of(scheme: Scheme) -> tuple[str, tuple[tuple[str, Any], ...]]:
    """What of ``scheme`` says which numbers can be stored: not how they were searched, nor how inputs are quantized."""
    qtype = qtypes.of(scheme.qtype)
    options = {**qtype.options, **dict(scheme.options)}
    return scheme.qtype, tuple(sorted((key, value) for key, value in options.items() if key not in qtype.other_options))
