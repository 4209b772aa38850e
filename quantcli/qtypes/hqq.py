"""HQQ's integers with float zero points, groups along the inputs or across the whole matrix; read, not made.

Parts of one weight matrix [out, in], whose n = out·in elements are taken in rows, one after another::

    codes  U8   [out, in]     0 … 2^bits − 1
    scale  F16  [n_groups]    F16, BF16 or F32 (option scale_dtype)
    zero   F16  [n_groups]    the same dtype; no integer, and in no range

``w = (code − zero)·scale``. With axis 1 group j is the elements j·group_size … (j+1)·group_size: a run along the inputs where the
group size divides them. With axis 0 the n elements stand in ``group_size`` rows and group j is column j: its elements lie n / group_size
apart. The engine (hqq/core/quantize.py, ``dequantize``) subtracts and multiplies in the dtype of the scale, so :func:`unpack` rounds
twice as it does.

No format of another engine holds such zero points, and HQQ's own loaders are hqq's and older transformers': the pass ``hqq`` solves for the
integer zero points of the qtype ``int`` instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor
from typing_extensions import override

from quantcli.errors import RecipeError, UnsupportedError
from quantcli.qtypes import Parts, QType
from quantcli.qtypes.shared.affine import FLOAT_ZEROS, Affine, AffineCodes
from quantcli.tensors import Grid, QuantizedTensor, Scheme, TensorSpec

BITS = (1, 1.58, 2, 3, 4, 5, 6, 8)
WAY_OUT = "HQQ's float zero points are read and not made; the recipe hqq-int4 solves for integer ones, which engines load"


class Hqq(QType):
    """Integers with float zero points, read and not made."""

    name = "hqq"
    options: ClassVar[Mapping[str, Any]] = {"bits": 4, "group_size": 64, "axis": 1, "scale_dtype": "F16"}

    @override
    def layout(self, shape: tuple[int, ...], scheme: Scheme) -> dict[str, TensorSpec]:
        """The parts of a matrix of ``shape``; :class:`RecipeError` when the group size does not divide it."""
        bits, group_size, dtype = (scheme.option(key) for key in ("bits", "group_size", "scale_dtype"))
        if bits not in BITS or scheme.option("axis") not in (0, 1):
            raise RecipeError(f"{scheme}: bits is one of {', '.join(map(str, BITS))}, and axis 0 or 1")
        if len(shape) != 2 or not isinstance(group_size, int) or group_size < 1 or shape[0] * shape[1] % group_size:
            raise RecipeError(f"{scheme}: groups of {group_size} do not cover a matrix of shape {list(shape)}")
        groups = (shape[0] * shape[1] // group_size,)
        parts = {"codes": ("U8", shape), "scale": (dtype, groups), "zero": (dtype, groups)}
        return {name: TensorSpec.dense(name, kind, size) for name, (kind, size) in parts.items()}

    @override
    def fit(self, W: Tensor, scheme: Scheme, importance: Tensor | None = None, *, fused: Parts | None = None) -> NoReturn:
        """Raises :class:`UnsupportedError`: nothing is quantized to this type."""
        _refuse()

    @override
    def pack(self, codes: Tensor, grid: Grid, scheme: Scheme) -> NoReturn:
        """Raises :class:`UnsupportedError`, as :meth:`fit` does."""
        _refuse()

    @override
    def unpack(self, tensor: QuantizedTensor) -> Tensor:
        """The weights [out, in] float32 that hqq computes, in the dtype of its scales."""
        codes, scale, zero = (tensor.parts[name] for name in ("codes", "scale", "zero"))
        group_size = tensor.scheme.option("group_size")
        if tensor.scheme.option("axis") == 1:
            W = codes.view(-1, group_size).to(scale.dtype).sub_(zero[:, None]).mul_(scale[:, None])
        else:
            W = codes.view(group_size, -1).to(scale.dtype).sub_(zero).mul_(scale)
        return W.view(codes.shape).to(torch.float32)

    @override
    def affine(self, scheme: Scheme) -> Affine | None:
        """Along the inputs, with float zero points; groups across the matrix are nobody else's."""
        if scheme.option("axis") != 1:
            return None
        hi = math.ceil(2 ** scheme.option("bits")) - 1
        return Affine(0, hi, scheme.option("group_size"), scheme.option("scale_dtype"), zeros=FLOAT_ZEROS)

    @override
    def integers(self, tensor: QuantizedTensor) -> AffineCodes:
        scale, zero = (tensor.parts[name].view(tensor.shape[0], -1) for name in ("scale", "zero"))
        return AffineCodes(tensor.parts["codes"].to(torch.int16), scale, zero)


QTYPE = Hqq()


def _refuse() -> NoReturn:
    raise UnsupportedError(WAY_OUT)
