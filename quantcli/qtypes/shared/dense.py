"""What the unquantized types share as qtypes: one part, ``data``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor
from typing_extensions import override

from quantcli.errors import NumericsError, UnsupportedError
from quantcli.qtypes import Parts, QType
from quantcli.tensors import DTYPES, Grid, QuantizedTensor, Scheme, TensorSpec


@dataclass(frozen=True, slots=True)
class DenseType(QType):
    """A plain float dtype, whose name is safetensors' word in small letters. Any shape; there is no grid to fit, only :meth:`encode`."""

    name: str

    @property
    def _word(self) -> str:
        return self.name.upper()

    @override
    def layout(self, shape: tuple[int, ...], scheme: Scheme) -> dict[str, TensorSpec]:
        """The part ``data``, of the tensor's own shape."""
        return {"data": TensorSpec.dense("data", self._word, shape)}

    @override
    def encode(self, W: Tensor, scheme: Scheme, importance: Tensor | None = None, *, fused: Parts | None = None) -> QuantizedTensor:
        """``W`` in this dtype; :class:`NumericsError` where a finite value would become infinite."""
        data = W.to(DTYPES[self._word])
        if W.dtype != data.dtype and not bool((data.isfinite() | ~W.isfinite()).all()):
            worst = float(torch.where(W.isfinite(), W, 0).abs().max())
            top = torch.finfo(data.dtype).max
            raise NumericsError(f"{worst:.6g} is beyond the largest {self._word}, {top:.6g}; keep this tensor in BF16 or F32")
        return QuantizedTensor(scheme, tuple(W.shape), {"data": data.contiguous()})

    @override
    def unpack(self, tensor: QuantizedTensor) -> Tensor:
        """The values as float32."""
        return tensor.parts["data"].float()

    @override
    def fit(self, W: Tensor, scheme: Scheme, importance: Tensor | None = None, *, fused: Parts | None = None) -> NoReturn:
        """Raises :class:`UnsupportedError`: there is no grid."""
        self._refuse()

    @override
    def pack(self, codes: Tensor, grid: Grid, scheme: Scheme) -> NoReturn:
        """Raises :class:`UnsupportedError`, as :meth:`fit` does."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise UnsupportedError(f"{self._word} stores values, not codes of a grid; use the pass rtn for it")
