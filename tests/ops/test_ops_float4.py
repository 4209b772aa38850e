"""Four-bit blocks: kernels against their reference, on every instruction set and at every odd size; the reference against a scalar loop."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from quantcli import ops
from quantcli.errors import KernelError
from quantcli.ops.float4 import Book, dequantize_float4, float4_errors, pack_float4, quantize_float4, unpack_float4
from quantcli.qtypes import fp4, nf4
from quantcli.qtypes.shared.float4 import book_of

KERNELS = [pytest.param(name, "cpu", id=name) for name in ops.available(hidden=True) if name != "reference"]
NO_CUDA = not torch.cuda.is_available()
CUDA = pytest.param(None, "cuda", id="cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(NO_CUDA, reason="no CUDA device")])
BOOKS = {"nf4": book_of(nf4.LEVELS), "fp4": book_of(fp4.LEVELS)}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

on_every_kernel = pytest.mark.parametrize(("kernel", "device"), [*KERNELS, CUDA])


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    """The best instruction set and one thread, whatever a test chose."""
    yield
    ops.use(None)
    ops.set_threads(1)


def weights_of_every_sort(n: int, seed: int = 0) -> Tensor:
    """Runs of 96 that are Gaussian, heavy-tailed, one-sided, constant, zero, denormal and huge, in turn; half of the rest lie on a level's
    midpoint, exactly or next to it, where a tie or a rounding would show."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(n, generator=generator)
    for k, start in enumerate(range(0, n, 96)):
        run = W[start : start + 96]
        changes = (run, run**3, run.abs() + 0.25, run * 0 - 0.0371, run * 0, run * 1e-40, run * 1e4, midpoints(run, generator))
        W[start : start + 96] = changes[k % 8]
    return W


def midpoints(run: Tensor, generator: torch.Generator) -> Tensor:
    """Midpoints of NF4 and FP4 and their neighbours, beside a peak of one."""
    mids = torch.cat([book.mids for book in BOOKS.values()])
    values = mids[torch.randint(len(mids), run.shape, generator=generator)]
    values = torch.where(run > 0.5, torch.nextafter(values, torch.tensor(2.0)), values)
    return torch.where(torch.arange(len(run)) % 32 == 0, 1.0, values)


def run_all(W: Tensor, book: Book, block_size: int) -> tuple[Tensor, ...]:
    packed, scale = quantize_float4(W, book, block_size=block_size)
    decoded = dequantize_float4(packed, scale, book, block_size=block_size, n=W.numel())
    return packed, scale, decoded, *float4_errors(W, packed, scale, book, block_size=block_size)


@on_every_kernel
@pytest.mark.parametrize("kind", BOOKS)
@pytest.mark.parametrize("block_size", [32, 64, 96, 4096])
@pytest.mark.parametrize("n", [0, 1, 31, 64, 4096, 64 * 33 + 17, 12345])
def test_kernels_equal_the_reference(kernel: str | None, device: str, kind: str, block_size: int, n: int) -> None:
    for dtype in DTYPES:
        W = weights_of_every_sort(n).to(dtype)
        ops.use("reference")
        expected = run_all(W, BOOKS[kind], block_size)
        ops.use(kernel)
        for n_threads in (1, 3):
            ops.set_threads(n_threads)
            for got, want in zip(run_all(W.to(device), BOOKS[kind], block_size), expected, strict=True):
                assert torch.equal(got.cpu(), want), (dtype, n_threads)


def scalar_quantize(block: Tensor, levels: Tensor, is_whole: bool) -> tuple[list[float], float]:
    """The nearest level of each weight by looking at all sixteen, in float32 steps; ties to the lower level."""
    scale = block.abs().max() if is_whole else block.abs().max().clamp_min(1e-38)
    ascending = sorted(levels.tolist())
    found = []
    for w in block:
        v = w * (1 / scale.clamp_min(1e-38)) if is_whole else w / scale
        below = [x for x, y in pairwise(ascending) if float((torch.tensor(x) + torch.tensor(y)) / 2) < float(v)]
        found.append(ascending[len(below)])
    return found, float(scale)


@pytest.mark.parametrize("kind", BOOKS)
def test_the_reference_picks_the_nearest_level_of_all_sixteen(kind: str) -> None:
    ops.use("reference")
    book, W = BOOKS[kind], weights_of_every_sort(96 * 8 + 45)
    packed, scale = quantize_float4(W, book, block_size=32)
    levels = book.levels[unpack_float4(packed, W.numel()).int()]
    for i, start in enumerate(range(0, W.numel(), 32)):
        block = W[start : start + 32]
        expected, s = scalar_quantize(block, book.levels, len(block) == 32)
        assert levels[start : start + 32].tolist() == expected
        assert float(scale[i]) == s


def test_an_odd_tensor_ends_with_the_code_of_zero() -> None:
    for book in BOOKS.values():
        packed, _ = quantize_float4(torch.randn(65), book, block_size=32)
        assert float(book.levels[int(packed[-1]) & 15]) == 0


def test_packing_puts_the_even_code_high_and_unpacks_to_itself() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    assert pack_float4(codes)[:2].tolist() == [0x01, 0x23]
    assert torch.equal(unpack_float4(pack_float4(codes[:13]), 13), codes[:13])


def test_the_search_tree_holds_every_midpoint_in_order() -> None:
    def walk(place: int) -> list[int]:
        return [*walk(2 * place), place, *walk(2 * place + 1)] if place < 16 else []

    for book in BOOKS.values():
        assert torch.equal(book.heap[walk(1)], book.mids)


def test_errors_are_those_of_the_decoded_weights() -> None:
    W, book = weights_of_every_sort(96 * 8)[:96], BOOKS["nf4"]
    _, _, decoded, error, energy = run_all(W, book, 32)
    assert float(error.sum()) == pytest.approx(float((W - decoded).square().sum()), rel=1e-5)
    assert float(energy.sum()) == pytest.approx(float(W.square().sum()), rel=1e-5)


def test_what_does_not_fit_is_refused_in_words() -> None:
    book, W = BOOKS["nf4"], torch.randn(64)
    packed, scale = quantize_float4(W, book, block_size=32)
    with pytest.raises(KernelError, match="multiple of 32"):
        quantize_float4(W, book, block_size=48)
    with pytest.raises(KernelError, match=r"float64"):
        quantize_float4(W.double(), book, block_size=32)
    with pytest.raises(KernelError, match=r"66 weights in blocks of 32 have 33 bytes and 3 float32 scales, got 32 and 2"):
        dequantize_float4(packed, scale, book, block_size=32, n=66)
    with pytest.raises(KernelError, match="16 finite levels"):
        Book.of(torch.zeros(15))
