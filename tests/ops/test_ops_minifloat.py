"""Small floats on every kernel, against torch references and against their definition."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from quantcli import ops
from quantcli.errors import KernelError
from quantcli.ops import minifloat
from quantcli.ops.minifloat import dequantize_fp4, dequantize_fp8, fit_fp4, quantize_fp4, quantize_fp8, tile_absmax
from support.kernel_cases import equals_reference, on_every_kernel, random, weights_of_every_sort

TILES = [(5, 352), (1, 352), (128, 128), (2, 100), (1, 32), (3, 7)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _restore() -> None:
    ops.use(None)
    ops.set_threads(1)


def near_every_tie(dtype: str) -> Tensor:
    """Each number of a float, each midpoint between two, and the float32 numbers on both sides of these, with both signs."""
    if dtype == "e2m1":
        numbers = torch.tensor(minifloat.FP4_LEVELS)
    else:
        numbers = torch.arange(128, dtype=torch.uint8).view(minifloat.FLOAT8[dtype].dtype).float()
        numbers = numbers[numbers <= minifloat.FLOAT8[dtype].largest]
    marks = torch.cat((numbers, (numbers[1:] + numbers[:-1]) / 2, numbers[-1:] * torch.tensor([1.01, 1.0625, 2.0, 1e30])))
    around = torch.cat((marks, marks.nextafter(torch.tensor(torch.inf)), marks.nextafter(torch.tensor(-torch.inf))))
    values = torch.cat((around, -around))
    return torch.cat((values, values.new_zeros(-len(values) % 32)))[None]


def nearest_even(x: float, numbers: list[float]) -> float:
    """The nearest of ascending ``numbers`` by definition; a tie goes to the one whose index, and so whose last bit, is even."""
    x = min(x, numbers[-1])
    return min(numbers, key=lambda n: (abs(n - x), numbers.index(n) % 2))


@pytest.mark.parametrize("dtype", ["e4m3", "e5m2"])
def test_fp8_rounds_to_the_nearest_number_and_ties_to_even(dtype: str) -> None:
    values = near_every_tie(dtype)
    numbers = torch.arange(128, dtype=torch.uint8).view(minifloat.FLOAT8[dtype].dtype).double()
    numbers = numbers[numbers <= minifloat.FLOAT8[dtype].largest].tolist()
    found = quantize_fp8(values, torch.ones(1, 1), tuple(values.shape), dtype).double()
    expected = [nearest_even(abs(v), numbers) * (-1 if v < 0 else 1) for v in values[0].double().tolist()]
    assert found[0].tolist() == expected


def test_fp4_rounds_to_the_nearest_level_and_ties_to_even() -> None:
    values = near_every_tie("e2m1")
    step = torch.ones(1, values.shape[1] // 32)
    found = dequantize_fp4(quantize_fp4(values, step), step)
    expected = [nearest_even(abs(v), list(minifloat.FP4_LEVELS)) * (-1 if v < 0 else 1) for v in values[0].tolist()]
    assert found[0].tolist() == expected


def test_a_negative_weight_that_rounds_to_zero_keeps_its_sign_bit_and_minus_zero_does_not() -> None:
    V = torch.tensor([[-0.1, 0.1, -0.0, 0.0] + [0.0] * 12])
    assert quantize_fp4(V, torch.ones(1, 1))[0, :2].tolist() == [0x08, 0x00]
    assert quantize_fp8(V * 1e-3, torch.ones(1, 1), (1, 16)).view(torch.uint8)[0, :2].tolist() == [0x80, 0x00]


@on_every_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_absmax_of_tiles_equals_the_reference(kernel: str | None, device: str, dtype: torch.dtype, tile: tuple[int, int]) -> None:
    for shape in ((5, 352), (130, 260), (3, 7), (1, 1)):
        W = weights_of_every_sort(*shape).to(dtype)
        assert equals_reference(kernel, device, lambda d, W=W: (tile_absmax(W.to(d), tile),))


@on_every_kernel
def test_absmax_is_nan_where_a_weight_is(kernel: str | None, device: str) -> None:
    ops.use(kernel)
    W = random(3, 40)
    W[0, 37], W[1, 2] = torch.nan, -torch.inf
    found = tile_absmax(W.to(device), (1, 40)).flatten().tolist()
    assert found[0] != found[0]
    assert found[1] == torch.inf
    assert found[2] == float(W[2].abs().max())


@on_every_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fp8", ["e4m3", "e5m2"])
def test_fp8_equals_the_reference(kernel: str | None, device: str, dtype: torch.dtype, fp8: str) -> None:
    for shape, tile in itertools.product(((5, 352), (130, 260), (3, 7), (1, 1), (9, 1031)), TILES):
        W = weights_of_every_sort(*shape).to(dtype)
        scale = tile_absmax(W, tile).clamp(1e-38, 1e30) / 300  # some weights saturate, some vanish

        def both(d: str, W: Tensor = W, scale: Tensor = scale, tile: tuple[int, int] = tile) -> tuple[Tensor, ...]:
            data = quantize_fp8(W.to(d), scale.to(d), tile, fp8)
            return data.view(torch.uint8), dequantize_fp8(data, scale.to(d), tile)

        assert equals_reference(kernel, device, both)


@on_every_kernel
@pytest.mark.parametrize("fp8", ["e4m3", "e5m2"])
def test_every_byte_of_fp8_decodes_as_torch_has_it(kernel: str | None, device: str, fp8: str) -> None:
    ops.use(kernel)
    data = torch.arange(256, dtype=torch.uint8).view(1, 256).view(minifloat.FLOAT8[fp8].dtype)
    found = dequantize_fp8(data.to(device), torch.ones(1, 1, device=device), (1, 256)).cpu()
    assert torch.equal(found.nan_to_num(nan=1e9), data.float().nan_to_num(nan=1e9))
    assert torch.equal(found.signbit() | found.isnan(), data.float().signbit() | found.isnan())


@on_every_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [16, 32])
def test_fp4_equals_the_reference(kernel: str | None, device: str, dtype: torch.dtype, group: int) -> None:
    for rows, n_groups in ((5, 22), (8, 1), (1, 3)):
        W = weights_of_every_sort(rows, n_groups * group).to(dtype)
        step = tile_absmax(W, (1, group)).clamp(1e-38, 1e30) / 5

        def both(d: str, W: Tensor = W, step: Tensor = step) -> tuple[Tensor, ...]:
            packed = quantize_fp4(W.to(d), step.to(d))
            return packed, dequantize_fp4(packed, step.to(d))

        assert equals_reference(kernel, device, both)


@on_every_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "group"), [("mxfp4", 32), ("nvfp4", 16)])
@pytest.mark.parametrize("weighted", [True, False])
def test_the_search_for_scale_bytes_equals_the_reference(
    kernel: str | None, device: str, dtype: torch.dtype, kind: str, group: int, weighted: bool
) -> None:
    for rows, n_groups in ((9, 22), (8, 1), (1, 3)):
        W = weights_of_every_sort(rows, n_groups * group).to(dtype)
        importance = random(n_groups * group, seed=3).square() if weighted else None
        # Bytes at both ends of their range and in the midst of it: clamped candidates, too.
        start = torch.randint(
            0, 127 if kind == "nvfp4" else 255, (rows, n_groups), dtype=torch.uint8, generator=torch.Generator().manual_seed(2)
        )
        assert equals_reference(kernel, device, lambda d, W=W, start=start, i=importance: (fit_fp4(W.to(d), start.to(d), kind, 300.0, i),))


@pytest.mark.parametrize(("kind", "group"), [("mxfp4", 32), ("nvfp4", 16)])
def test_the_search_finds_the_least_weighted_error_among_its_candidates(kind: str, group: int) -> None:
    W, importance = random(4, 3 * group), random(3 * group, seed=1).square()
    start = torch.full((4, 3), 125 if kind == "mxfp4" else 60, dtype=torch.uint8)
    found = fit_fp4(W, start, kind, 1.0, importance)
    first, last = minifloat.CANDIDATES[kind]
    errors = []
    for offset in range(first, last + 1):
        step = minifloat.group_step((start.int() + offset).to(torch.uint8), kind, 1.0)
        squares = (W - dequantize_fp4(quantize_fp4(W, step), step)).square() * importance
        errors.append(squares.view(4, 3, group).sum(2))
    assert torch.equal(torch.stack(errors).argmin(0) + first, found.int() - start.int())


def test_a_scale_of_another_shape_is_refused() -> None:
    with pytest.raises(KernelError, match=r"scale is \[1, 2\] for weights \[4, 300\] in tiles of \[128, 128\]"):
        quantize_fp8(random(4, 300), torch.ones(1, 2), (128, 128))
    with pytest.raises(KernelError, match="expected groups of 16 or 32 inputs"):
        quantize_fp4(random(4, 64), torch.ones(4, 8))
    with pytest.raises(KernelError, match="expected groups of 16 or 32 inputs"):
        fit_fp4(random(4, 64), torch.ones(4, 3, dtype=torch.uint8), "nvfp4")
