"""Weights that kernels are tried on, and the kernels of this machine against the torch reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from quantcli import ops

KERNELS = [pytest.param(name, "cpu", id=name) for name in ops.available(hidden=True) if name != "reference"]
NO_CUDA = not torch.cuda.is_available()
CUDA = pytest.param(None, "cuda", id="cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(NO_CUDA, reason="no CUDA device")])
on_every_kernel = pytest.mark.parametrize(("kernel", "device"), [*KERNELS, CUDA])


def equals_reference(kernel: str | None, device: str, run: Callable[[str], tuple[Tensor, ...]]) -> bool:
    """Whether ``run(device)`` gives the same numbers by ``kernel``, on one thread and on three, as by the torch reference on the CPU."""
    ops.use("reference")
    expected = run("cpu")
    ops.use(kernel)
    found = []
    for n_threads in (1, 3):
        ops.set_threads(n_threads)
        found.append(run(device))
    return all(torch.equal(a.cpu(), b) and a.dtype == b.dtype for once in found for a, b in zip(once, expected, strict=True))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights_of_every_sort(n_rows: int, n: int, seed: int = 0) -> Tensor:
    """Rows Gaussian, heavy-tailed, one-sided, constant, zero, denormal, huge and with a single outlier, in turn."""
    W = random(n_rows, n, seed=seed)
    W[1::8] = W[1::8] ** 3
    W[2::8] = W[2::8].abs() + 0.25
    W[3::8] = -0.0371
    W[4::8] = 0.0
    W[5::8] *= 1e-40
    W[6::8] *= 1e4
    W[7::8, n // 2] = 40.0
    return W


def importance_of(n: int, seed: int = 1) -> Tensor:
    return random(n, seed=seed).square() ** 2 + 1e-3


def factor_of(n: int, seed: int = 3) -> tuple[Tensor, Tensor]:
    """A Hessian of correlated inputs, damped, and U with H⁻¹ = UᵀU: float64, float32."""
    X = random(4 * n, n, seed=seed).double() + random(4 * n, 1, seed=seed + 1).double()
    H = X.T @ X / len(X) + 0.01 * torch.eye(n, dtype=torch.float64)
    return H, torch.linalg.cholesky(torch.linalg.inv(H), upper=True).float()
