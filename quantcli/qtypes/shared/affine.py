"""Affine integer grids as number formats describe them to each other, so that codes go from one to another without rounding anew."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantcli.errors import NumericsError
from quantcli.tensors import DTYPES

EXACT, CODES = "exact", "codes"
"""How well one number format holds what another one stores: every weight decodes to the same float32, or every code stays and a scale or
minimum is rounded to the target's dtype."""

WIDER = {"F16": ("F16", "F32"), "BF16": ("BF16", "F32"), "F32": ("F32",)}
"""A dtype of scales → those that hold all its numbers."""

NO_ZEROS, INTEGER_ZEROS, FLOAT_ZEROS = "none", "integer", "float"
"""What zero points a grid has."""


@dataclass(frozen=True, slots=True)
class Affine:
    """A grid ``w = scale·k``, k = code − zero point. ``lo … hi``: the range of k, with float zero points that of the codes; ``group_size``
    −1 is a whole row; ``zeros``: one of :data:`NO_ZEROS`, :data:`INTEGER_ZEROS`, :data:`FLOAT_ZEROS`; ``is_rounded``: the scale is not
    stored as it is, so that another format holds it but for rounding."""

    lo: int
    hi: int
    group_size: int
    scale_dtype: str
    desc_act: bool = False
    zeros: str = NO_ZEROS
    is_rounded: bool = False


@dataclass(frozen=True, slots=True)
class AffineCodes:
    """One matrix on such a grid. ``k`` [out, in] int16, of float zero points the codes; ``scale`` [out, n_groups] as it is stored; ``zero``
    [out, n_groups] int16 or float, or None; ``g_idx`` [in], the group of each input, or None."""

    k: Tensor
    scale: Tensor
    zero: Tensor | None = None
    g_idx: Tensor | None = None


def divides(group_size: int, whole: int, in_features: int) -> bool:
    """Whether groups of ``group_size`` inputs cut those of ``whole`` without crossing one."""
    group_size, whole = (in_features if size == -1 else size for size in (group_size, whole))
    return whole % group_size == 0 and in_features % group_size == 0


def stored(scale: Tensor, dtype: str) -> Tensor:
    """``scale`` in ``dtype``; :class:`NumericsError` when one becomes infinite or zero."""
    out = scale.to(DTYPES[dtype])
    if not bool(out.isfinite().all()) or bool(((out == 0) & (scale != 0)).any()):
        raise NumericsError(f"a scale of the source does not fit {dtype}; export to a format with wider scales, or quantize anew")
    return out.contiguous()


def spread(values: Tensor, n: int) -> Tensor:
    """``values`` [out, n_groups], each repeated so that there are ``n`` of them in a row."""
    return values.repeat_interleave(n // values.shape[1], 1)


def middle(rows: int, n_groups: int, bits: int) -> Tensor:
    """The zero points of a symmetric matrix: int16 [rows, n_groups]."""
    return torch.full((rows, n_groups), 2 ** (bits - 1), dtype=torch.int16)
