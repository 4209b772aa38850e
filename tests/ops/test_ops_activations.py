"""Inputs as engines round them, against a number-by-number account of each."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from quantcli import ops
from quantcli.errors import KernelError
from quantcli.ops import activations, round_inputs
from quantcli.tensors import ACTIVATIONS
from support.kernel_cases import on_every_kernel

F = np.float32
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
E4M3 = [m / 8 * 2.0**-6 for m in range(8)] + [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)][:-1]
"""Magnitudes in the order of their bits: an even place is an even mantissa."""


@pytest.fixture(autouse=True)
def _restore() -> None:
    ops.use(None)


def nearest(value: float, numbers: list[float]) -> float:
    """The number nearest to ``value``, of two the one in an even place, with its sign."""
    distances = [abs(abs(value) - n) for n in numbers]
    best = min(range(len(numbers)), key=lambda i: (distances[i], i % 2))
    return math.copysign(numbers[best], value)


def integer(value: float) -> float:
    return float(min(127, max(-128, round(value))))  # Python rounds ties to even, too


def rounded(group: list[float], scale: F, to: Callable[[float], float]) -> list[float]:
    return [float(F(to(float(F(x) / scale))) * scale) for x in group]


def peak(group: list[float]) -> F:
    return F(max(abs(x) for x in group))


def by_absmax(group: list[float], _scale: F, *, over: float, to: Callable[[float], float]) -> list[float]:
    return rounded(group, peak(group) / F(over) or F(2.0**-23), to)


def by_power(group: list[float], _scale: F, *, exponent: int, to: Callable[[float], float]) -> list[float]:
    """MX: the exponent of absmax, the next one from 1.75 on, less that of the largest element."""
    if not peak(group):
        return [0.0] * len(group)
    mantissa, e = math.frexp(float(peak(group)))  # 0.5 … 1
    return rounded(group, F(2.0 ** (e - 1 + (mantissa >= 0.875) - exponent)), to)


def by_two_scales(group: list[float], scale: F, *, to: Callable[[float], float]) -> list[float]:
    own = nearest(float(min(scale * (peak(group) / F(6)), F(448))), E4M3) or 0.125
    return rounded(group, F(own) / scale, to)


TO_E4M3, TO_E2M1 = partial(nearest, numbers=E4M3), partial(nearest, numbers=E2M1)
WHOLE = 10**9
ACCOUNTS: dict[str, tuple[int, Callable[..., list[float]]]] = {
    "int8-token": (WHOLE, partial(by_absmax, over=127.5, to=integer)),
    "int8-tensor": (WHOLE, partial(rounded, to=integer)),
    "fp8-token": (WHOLE, partial(by_absmax, over=448, to=TO_E4M3)),
    "fp8-tensor": (WHOLE, partial(rounded, to=TO_E4M3)),
    "fp8-g128": (128, partial(by_absmax, over=448, to=TO_E4M3)),
    "mxfp8-g32": (32, partial(by_power, exponent=8, to=TO_E4M3)),
    "mxfp4-g32": (32, partial(by_power, exponent=2, to=TO_E2M1)),
    "nvfp4-g16": (16, partial(by_two_scales, to=TO_E2M1)),
}
"""How many inputs share a scale, and what becomes of them."""

SCALES = {"int8-tensor": 0.05, "fp8-tensor": 0.01, "nvfp4-g16": 448 * 6 / 9.0}


def inputs(n_tokens: int, in_features: int) -> Tensor:
    """Tokens of very different size, one of zeros, an outlier column, ties among them."""
    X = torch.randn(n_tokens, in_features, generator=torch.Generator().manual_seed(6))
    X *= torch.logspace(-3, 0.5, n_tokens)[:, None]
    X[0] = 0
    X[:, 7] *= 8
    X[1, :16] = torch.arange(16) / 2  # ties of int8-token where absmax / 127.5 were 1
    X[1, 16] = 127.5
    return X


def account(X: Tensor, act: str, scale: float) -> Tensor:
    """``X`` [tokens, in] by the account of ``act``, number by number."""
    size, of = ACCOUNTS[act]
    rows = [[row[a : a + size] for a in range(0, len(row), size)] for row in X.tolist()]
    return torch.tensor([[x for group in row for x in of(group, F(scale))] for row in rows])


@on_every_kernel
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_inputs_are_rounded_as_the_account_says(act: str, kernel: str, device: str) -> None:
    ops.use(kernel)
    X = inputs(9, 160)
    scale = SCALES.get(act)
    found = round_inputs(X.to(device), act, None if scale is None else torch.tensor([scale])).cpu()
    assert torch.equal(found, account(X, act, scale or 0))
    assert not torch.equal(found, X)
    assert set(ACCOUNTS) == set(ACTIVATIONS)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_batches_and_dtypes_keep_their_shape(act: str) -> None:
    X = inputs(6, 64).view(2, 3, 64)
    scale = torch.tensor([SCALES[act]]) if act in SCALES else None
    assert torch.equal(round_inputs(X, act, scale).view(6, 64), round_inputs(X.view(6, 64), act, scale))
    half = round_inputs(X.bfloat16(), act, scale)
    assert (half.dtype, half.shape) == (torch.bfloat16, X.shape)
    assert torch.equal(half, round_inputs(X.bfloat16().float(), act, scale).bfloat16())


@pytest.mark.parametrize("act", ["mxfp4-g32", "nvfp4-g16", "fp8-g128", "mxfp8-g32"])
def test_a_short_last_group_has_a_scale_of_its_own(act: str) -> None:
    X = inputs(5, 150)
    scale = SCALES.get(act)
    found = round_inputs(X, act, None if scale is None else torch.tensor([scale]))
    assert torch.equal(found, account(X, act, scale or 0))


def llm_int8(X: Tensor, threshold: float) -> Tensor:
    """One call of bitsandbytes' engine, number by number: float16, outlier columns as they are, the rest by row."""
    rows = X.half().tolist()
    kept = {j for row in rows for j, x in enumerate(row) if threshold and abs(x) >= threshold}
    found = X.clone()
    for i, row in enumerate(rows):
        largest = F(max([abs(x) for x in row if not threshold or abs(x) < threshold], default=0))
        for j, x in enumerate(row):
            if j not in kept:
                found[i, j] = float(F(round(float(F(x) * (F(127) / largest)))) * (largest / F(127))) if largest else 0
    return found


@pytest.mark.parametrize("threshold", [6.0, 2.0, 0.0])
def test_llm_int8_keeps_columns_with_outliers_and_rounds_the_rest_by_row(threshold: float) -> None:
    X = inputs(9, 40).clamp(-70, 70)
    found = round_inputs(X, "llm-int8", threshold=threshold)
    assert torch.equal(found, llm_int8(X, threshold))
    kept = (found == X).all(0)
    assert bool(kept[7]) == (threshold > 0)
    assert not bool(kept.all())


def test_the_tokens_of_each_window_are_a_call_of_llm_int8_of_their_own() -> None:
    X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(8))
    X[0, 3, 4] = 9.0
    found = round_inputs(X, "llm-int8")
    assert torch.equal(found[0, :, 4], X[0, :, 4])
    assert not torch.equal(found[1, :, 4], X[1, :, 4])
    assert torch.equal(found, torch.stack([round_inputs(window, "llm-int8") for window in X]))


def test_a_token_of_outliers_alone_keeps_them() -> None:
    X = torch.full((2, 8), 7.0)
    assert torch.equal(round_inputs(X, "llm-int8"), X)


def test_misuse_is_an_error_that_says_what_to_do() -> None:
    X, scale = inputs(2, 32), torch.tensor([1.0])
    with pytest.raises(KernelError, match="known are: llm-int8, int8-token"):
        round_inputs(X, "int4-token")
    with pytest.raises(KernelError, match="int8-tensor: needs the scale"):
        round_inputs(X, "int8-tensor")
    with pytest.raises(KernelError, match="fp8-token: computes its own"):
        round_inputs(X, "fp8-token", scale)
    assert set(activations.STATIC) == set(SCALES)
