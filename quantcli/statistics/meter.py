"""Gathers the statistics of one tap over batches of its inputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from quantcli.statistics import ranges
from quantcli.tensors import Stats

BLOCK = 256
"""Rows of H that one GEMM adds to: only the blocks on and above the diagonal are computed, H being symmetric."""


class StatsMeter:
    """Gathers :class:`Stats` of one tap over batches of its input.

    X is taken in float32 (on a GPU in TF32 where that holds it exactly); H is summed in float32 (each batch's product, then their
    sum), the rest in float64. Cost: n_tokens · in² multiplications.
    """

    def __init__(
        self, in_features: int, hessian: bool, device: torch.device | str = "cpu", *, histogram: bool = False, drift: bool = False
    ) -> None:
        self._n_tokens = 0
        self._H = torch.zeros(in_features, in_features, device=device) if hessian else None
        self._squares = torch.zeros(in_features, dtype=torch.float64, device=device)
        self._fourths = torch.zeros(in_features, dtype=torch.float64, device=device)
        self._sum = torch.zeros(in_features, dtype=torch.float64, device=device)
        self._absmax = torch.zeros(in_features, device=device)
        self._counts = torch.zeros(ranges.N_BINS, dtype=torch.int64, device=device) if histogram else None
        self._dXXT = torch.zeros(in_features, in_features, device=device) if drift else None

    def add(self, X: Tensor) -> None:
        """X: [n_tokens, in], any float dtype."""
        dtype, X = X.dtype, X.float()
        self._n_tokens += len(X)
        self._sum += X.sum(0)
        self._absmax = torch.maximum(self._absmax, torch.maximum(X.amax(0), -X.amin(0)))
        if self._counts is not None:
            self._counts += ranges.count(X)
        squares = X.square()
        if self._H is None:
            self._squares += squares.sum(0)
        self._fourths += squares.square_().sum(0)
        if self._H is None:
            return
        with exact_products(dtype):
            for a in range(0, len(self._H), BLOCK):
                # Not addmm_: its kernel would add every product to the large running sum and lose the small ones.
                self._H[a : a + BLOCK, a:] += X[:, a : a + BLOCK].T @ X[:, a:]

    @property
    def has_drift(self) -> bool:
        return self._dXXT is not None

    def add_drift(self, X: Tensor, X0: Tensor) -> None:
        """``X``: [n_tokens, in] as it was added, ``X0``: the same tokens' in the model before it was quantized."""
        assert self._dXXT is not None
        self._dXXT += (X0.float() - X.float()).T @ X.float()

    def stats(self) -> Stats:
        """The means so far. The meter gives its H away: it cannot gather more."""
        n = max(1, self._n_tokens)
        H, self._H = self._H, None
        dXXT = None if self._dXXT is None else self._dXXT.div_(n)
        if H is not None:
            for a in range(0, len(H), BLOCK):
                H[a : a + BLOCK, a : a + BLOCK].triu_()
                H[a:, a : a + BLOCK] += H[a : a + BLOCK, a:].T.tril(-1)
            H /= n
        importance = (self._squares / n).float() if H is None else H.diagonal().clone()
        histogram = None if self._counts is None else (self._counts / max(1, int(self._counts.sum()))).float()
        mean = (self._sum / n).float()
        fourth = (self._fourths / n).float()
        return Stats(importance, self._absmax, mean, self._n_tokens, H, histogram, fourth, dXXT)


@contextmanager
def exact_products(dtype: torch.dtype) -> Iterator[None]:
    """Within the context, a GPU may multiply float32 numbers that were ``dtype`` on its tensor cores, if TF32 is exact for it."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if dtype in (torch.bfloat16, torch.float16) else before
    try:
        yield
    finally:
        matmul.fp32_precision = before
