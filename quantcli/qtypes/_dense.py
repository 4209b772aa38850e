"""What the unquantized types share as qtypes: one part, ``data``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from quantcli.errors import NumericsError, UnsupportedError
from quantcli.tensors import DTYPES, Grid, QuantizedTensor, Scheme, TensorSpec


@dataclass(frozen=True, slots=True)
class DenseType:
    """A plain float dtype, by safetensors' word. Any shape; there is no grid to fit, only :meth:`encode`."""

    word: str

    def layout(self, shape: tuple[int, ...], scheme: Scheme) -> dict[str, TensorSpec]:
        """The part ``data``, of the tensor's own shape."""
        return {"data": TensorSpec.dense("data", self.word, shape)}

    def encode(self, W: Tensor, scheme: Scheme, importance: Tensor | None = None) -> QuantizedTensor:
        """``W`` in this dtype; :class:`NumericsError` where a finite value would become infinite."""
        data = W.to(DTYPES[self.word])
        if W.dtype != data.dtype and not bool((data.isfinite() | ~W.isfinite()).all()):
            worst = float(torch.where(W.isfinite(), W, 0).abs().max())
            top = torch.finfo(data.dtype).max
            raise NumericsError(f"{worst:.6g} is beyond the largest {self.word}, {top:.6g}; keep this tensor in BF16 or F32")
        return QuantizedTensor(scheme, tuple(W.shape), {"data": data.contiguous()})

    def unpack(self, tensor: QuantizedTensor) -> Tensor:
        """The values as float32."""
        return tensor.parts["data"].float()

    def fit(self, W: Tensor, scheme: Scheme, importance: Tensor | None = None) -> Grid:
        self._refuse()

    def pack(self, codes: Tensor, grid: Grid, scheme: Scheme) -> QuantizedTensor:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise UnsupportedError(f"{self.word} stores values, not codes of a grid; use the pass rtn for it")
