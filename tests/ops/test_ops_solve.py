"""The solvers' ops against the slow truth: group fits, the GPTQ chunk, the choice among grids, dense bits."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from quantcli import ops
from quantcli.errors import KernelError, NumericsError
from quantcli.ops.affine import TINY, affine_errors, fit_affine
from quantcli.ops.bits import BITS, KERNEL_BITS, codes_per_run, pack_bits, unpack_bits
from quantcli.ops.choice import choose_grid, group_errors
from quantcli.ops.solve import gptq_chunk
from quantcli.tensors import Grid
from support import oracles
from support.kernel_cases import (
    equals_reference,
    factor_of,
    importance_of,
    on_every_kernel,
    random,
    weights_of_every_sort,
)


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    """The best instruction set and one thread, whatever a test chose."""
    yield
    ops.use(None)
    ops.set_threads(1)


def grid_of(scale: Tensor, zero: Tensor, bits: int, sym: bool, group_size: int) -> Grid:
    half = 2 ** (bits - 1)
    offset = None if sym else -(scale * zero)
    return Grid(scale, offset, -half if sym else 0, half - 1 if sym else 2 * half - 1, group_size)


def measures(W: Tensor, importance: Tensor, scale: Tensor, zero: Tensor, bits: int, sym: bool, group_size: int) -> Tensor:
    """Σ importance·(w − ŵ)² of each group, in float64: [out, n_groups]."""
    grid = grid_of(scale, zero, bits, sym, group_size)
    E = W.double() - grid.decode(grid.encode(W)).double()
    return (E.square() * importance.double()).view(W.shape[0], -1, group_size).sum(2)


# --- fit_affine ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_minmax_symmetric_is_gptqs_convention(bits: int) -> None:
    W = weights_of_every_sort(8, 64)
    scale, zero = fit_affine(W, None, bits=bits, group_size=32, sym=True, search=False)
    absmax = W.view(8, 2, 32).abs().amax(2)
    expected = (2 * absmax / (2**bits - 1)).half().float().clamp_min(TINY[torch.float16])
    assert torch.equal(scale, torch.where(absmax == 0, 1.0, expected))
    assert zero.dtype == torch.int32
    assert bool((zero == 2 ** (bits - 1)).all())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_minmax_asymmetric_spans_the_range_widened_to_zero(bits: int) -> None:
    W = weights_of_every_sort(8, 64)[[0, 1, 2, 3, 7]]
    scale, zero = fit_affine(W, None, bits=bits, group_size=32, sym=False, search=False)
    low, high = W.view(5, 2, 32).amin(2).clamp_max(0), W.view(5, 2, 32).amax(2).clamp_min(0)
    assert torch.equal(scale, ((high - low) / (2**bits - 1)).half().float())
    assert torch.equal(zero, (-low / scale).round().clamp(0, 2**bits - 1).int())
    grid = grid_of(scale, zero, bits, False, 32)
    error = (grid.decode(grid.encode(W)) - W).abs().view(5, 2, 32).amax(2)
    assert bool((error <= scale * (1.01 if bits < 8 else 1.2)).all())


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [16, 32, -1])
def test_search_is_never_worse_than_minmax_and_better_on_the_whole(bits: int, sym: bool, group_size: int) -> None:
    W, importance = weights_of_every_sort(24, 96), importance_of(96)
    size = 96 if group_size == -1 else group_size
    options = {"bits": bits, "group_size": group_size, "sym": sym}
    found = measures(W, importance, *fit_affine(W, importance, search=True, **options), bits, sym, size)
    plain = measures(W, importance, *fit_affine(W, importance, search=False, **options), bits, sym, size)
    assert bool((found <= plain * (1 + 1e-5)).all())
    gaussian = slice(0, None, 8)
    assert float(found[gaussian].sum()) < (0.98 if bits == 8 else 0.85) * float(plain[gaussian].sum())


@pytest.mark.parametrize(("sym", "excess"), [(True, 1.01), (False, 1.05)])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_search_comes_close_to_the_exhaustive_one(bits: int, sym: bool, excess: float) -> None:
    W, importance = random(6, 48), importance_of(48)
    W[::2, ::7] *= 3  # a heavy tail
    scale, zero = fit_affine(W, importance, bits=bits, group_size=48, sym=sym, search=True)
    ours = best = 0.0
    for row, s, z in zip(W.numpy(), scale[:, 0].tolist(), zero[:, 0].tolist(), strict=True):
        ours += oracles.affine_error(row, importance.numpy(), s, z, 2**bits - 1)
        best += oracles.brute_force_affine(row, importance.numpy(), bits, sym)[2]
    assert best * (1 - 1e-9) <= ours <= best * excess


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize("dtype", TINY)
def test_scales_are_numbers_of_the_files_dtype_above_zero_and_zero_points_are_codes(sym: bool, search: bool, dtype: torch.dtype) -> None:
    W = weights_of_every_sort(16, 64)
    scale, zero = fit_affine(W, importance_of(64), bits=4, group_size=32, sym=sym, search=search, scale_dtype=dtype)
    assert torch.equal(scale, scale.to(dtype).float())
    assert bool((scale >= TINY[dtype]).all())
    assert bool(((zero >= 0) & (zero <= 15)).all())


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("search", [True, False])
def test_groups_of_zeros_decode_to_exact_zeros(sym: bool, search: bool) -> None:
    W = random(3, 64)
    W[1, 32:] = 0
    scale, zero = fit_affine(W, None, bits=4, group_size=32, sym=sym, search=search)
    grid = grid_of(scale, zero, 4, sym, 32)
    assert torch.equal(grid.decode(grid.encode(W))[1, 32:], torch.zeros(32))


def test_the_unit_of_importance_does_not_matter_and_zero_importance_is_equal_importance() -> None:
    W, importance = random(4, 64), importance_of(64)
    options = {"bits": 4, "group_size": 32, "sym": False, "search": True}
    scale, zero = fit_affine(W, importance, **options)
    for unit in (2.0**100, 2.0**-100):
        again = fit_affine(W, importance * unit, **options)
        assert torch.equal(scale, again[0])
        assert torch.equal(zero, again[1])
    assert torch.equal(fit_affine(W, torch.zeros(64), **options)[0], fit_affine(W, None, **options)[0])


def test_a_group_does_not_depend_on_its_neighbours() -> None:
    W = weights_of_every_sort(16, 64)
    options = {"bits": 3, "group_size": 32, "sym": False, "search": True}
    scale, zero = fit_affine(W, None, **options)
    alone = fit_affine(W[5:6, 32:].contiguous(), None, **options)
    assert float(scale[5, 1]) == float(alone[0])
    assert int(zero[5, 1]) == int(alone[1])


def test_fit_affine_names_the_weight_that_is_not_finite_and_the_group_whose_scale_overflows() -> None:
    options = {"bits": 4, "group_size": 32, "sym": True, "search": True}
    W = random(4, 64)
    W[2, 40] = float("nan")
    with pytest.raises(NumericsError, match="W holds nan at row 2, column 40"):
        fit_affine(W, None, **options)
    W[2, 40] = 1e30
    with pytest.raises(NumericsError, match=r"row 2, group 1: the largest weight 1e\+30 .* 65504"):
        fit_affine(W, None, **options)
    W[2, 40] = 0
    with pytest.raises(NumericsError, match="importance holds inf at row 0, column 7"):
        fit_affine(W, torch.ones(64).index_fill(0, torch.tensor(7), float("inf")), **options)
    with pytest.raises(NumericsError, match="importance is negative at input 3"):
        fit_affine(W, torch.ones(64).index_fill(0, torch.tensor(3), -1.0), **options)


def test_fit_affine_refuses_what_it_cannot_take_with_the_actual_values() -> None:
    with pytest.raises(KernelError, match="group_size 48 does not divide the 64 inputs"):
        fit_affine(random(4, 64), None, bits=4, group_size=48, sym=True, search=True)
    with pytest.raises(KernelError, match=r"W is torch.float64 \[4, 64\]"):
        fit_affine(random(4, 64).double(), None, bits=4, group_size=32, sym=True, search=True)
    with pytest.raises(KernelError, match=r"importance is \[32\]; expected \[64\]"):
        fit_affine(random(4, 64), torch.ones(32), bits=4, group_size=32, sym=True, search=True)
    with pytest.raises(KernelError, match="bits is 9"):
        fit_affine(random(4, 64), None, bits=9, group_size=32, sym=True, search=True)


@on_every_kernel
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("n_rows", "n", "group_size", "dtype"),
    [(37, 96, 32, torch.float16), (1, 35, 7, torch.bfloat16), (16, 66, 33, torch.bfloat16), (19, 50, -1, torch.float32)],
)
def test_fit_affine_is_the_reference_on_every_kernel(
    kernel: str | None, device: str, sym: bool, bits: int, n_rows: int, n: int, group_size: int, dtype: torch.dtype
) -> None:
    W, importance = weights_of_every_sort(n_rows, n, seed=bits), importance_of(n)
    options = {"bits": bits, "group_size": group_size, "sym": sym, "scale_dtype": dtype}
    assert equals_reference(kernel, device, lambda d: fit_affine(W.to(d), importance, search=True, **options))
    assert equals_reference(kernel, device, lambda d: fit_affine(W.to(d), None, search=False, **options))


@on_every_kernel
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize(("n_rows", "n", "group_size"), [(19, 96, 32), (1, 21, 7), (34, 40, -1)])
def test_errors_in_another_basis_are_those_of_scaling_fitting_and_decoding(
    kernel: str | None, device: str, sym: bool, n_rows: int, n: int, group_size: int
) -> None:
    W, importance, basis = weights_of_every_sort(n_rows, n), importance_of(n), random(n, seed=2).exp()
    options = {"bits": 4, "group_size": group_size, "sym": sym, "search": True}
    scale, zero = fit_affine(W * basis, importance, **options)
    size = n if group_size == -1 else group_size
    grid = grid_of(scale, zero - (8 if sym else 0), 4, sym, size)
    expected = (W * basis - grid.decode(grid.encode(W * basis))) / basis
    assert torch.equal(affine_errors(W, basis, importance, **options), expected)
    assert equals_reference(kernel, device, lambda there: (affine_errors(W.to(there), basis.to(there), importance.to(there), **options),))


def test_errors_in_another_basis_name_the_group_whose_scale_overflows_there() -> None:
    W, basis = torch.ones(3, 8), torch.ones(8)
    basis[5] = 1e9
    for kernel in ops.available():
        ops.use(kernel)
        with pytest.raises(NumericsError, match=r"row 0, group 1: the largest weight 1e\+09"):
            affine_errors(W, basis, torch.ones(8), bits=4, group_size=4, sym=True, search=True)
    basis[5] = torch.inf
    with pytest.raises(NumericsError, match="column 5"):
        affine_errors(W, basis, torch.ones(8), bits=4, group_size=4, sym=True, search=True)


# --- gptq_chunk ------------------------------------------------------------------------------------------------------------------


def chunk_case(name: str, n_rows: int, n: int) -> dict:
    """Arguments of gptq_chunk for a kind of grid, with columns of two groups interleaved as act-order leaves them."""
    W = weights_of_every_sort(n_rows, n)[:, torch.randperm(n, generator=torch.Generator().manual_seed(5))].contiguous()
    group = (torch.arange(n) * 7 % 2).int()
    scale = (random(n_rows, 2, seed=6).abs() * 0.3 + 0.05).half().float()
    scale[::5, 1] = 0.0
    case = {"W": W, "U": factor_of(n)[1], "scale": scale, "offset": None, "group": group, "lo": -8, "hi": 7}
    if name == "asymmetric":
        case |= {"offset": -(scale * 6), "lo": 0, "hi": 15}
    elif name == "unsigned 8 bits":
        case |= {"offset": -(scale * 100), "lo": 0, "hi": 255}
    elif name == "negative scales":
        case["scale"] = -scale
    elif name == "book":
        case |= {"book": torch.tensor([-1.0, -0.7, -0.4, -0.1, 0.0, 0.2, 0.45, 1.0]), "lo": 0, "hi": 7}
    if name.endswith("descent"):
        case |= {"D": W + random(n_rows, n, seed=7) * 0.1} | (chunk_case("book", n_rows, n) if name.startswith("book") else {})
    return case


CHUNKS = ("symmetric", "asymmetric", "unsigned 8 bits", "negative scales", "book", "descent", "book descent")


def loop_by_loop(case: dict) -> tuple[np.ndarray, np.ndarray]:
    """gptq_chunk for one weight at a time in numpy float32 scalars."""
    w, U, scale = case["W"].numpy().copy(), case["U"].numpy(), case["scale"].numpy()
    offset = np.zeros_like(scale) if case["offset"] is None else case["offset"].numpy()
    book = case.get("book")
    codes, E = np.zeros(w.shape, np.int64), np.zeros_like(w)
    for r in range(w.shape[0]):
        for j in range(w.shape[1]):
            s, o = scale[r, case["group"][j]], offset[r, case["group"][j]]
            v = np.float32(0) if s == 0 else (w[r, j] - o) / s
            if book is None:
                codes[r, j] = value = min(max(np.rint(v), np.float32(case["lo"])), np.float32(case["hi"]))
            else:
                codes[r, j] = np.abs(book.numpy().astype(np.float64) - v).argmin()
                value = book.numpy()[codes[r, j]]
            error = w[r, j] - (s * value + o) if case.get("D") is None else (s * value + o) - case["D"].numpy()[r, j]
            E[r, j] = error / U[j, j]
            for k in range(j + 1, w.shape[1]):
                w[r, k] = w[r, k] - E[r, j] * U[j, k]
    return codes, E


@pytest.mark.parametrize("name", CHUNKS)
def test_the_chunk_equals_a_scalar_loop_bit_for_bit(name: str) -> None:
    case = chunk_case(name, 16, 24)
    before = case["W"].clone()
    codes, E = gptq_chunk(**case)
    expected_codes, expected_E = loop_by_loop(case)
    assert np.array_equal(codes.numpy(), expected_codes)
    assert np.array_equal(E.numpy().view(np.int32), expected_E.view(np.int32))
    assert torch.equal(case["W"], before)
    assert codes.dtype == (torch.uint8 if case["hi"] > 127 else torch.int8)


@on_every_kernel
@pytest.mark.parametrize("name", CHUNKS)
@pytest.mark.parametrize(("n_rows", "n"), [(37, 31), (1, 1), (16, 66), (3, 32), (24, 5)])
def test_the_chunk_is_the_reference_on_every_kernel(kernel: str | None, device: str, name: str, n_rows: int, n: int) -> None:
    case = chunk_case(name, n_rows, n)

    def run(device: str) -> tuple[Tensor, ...]:
        return gptq_chunk(**{key: value.to(device) if isinstance(value, Tensor) else value for key, value in case.items()})

    assert equals_reference(kernel, device, run)


@pytest.mark.parametrize("sym", [True, False])
def test_the_chunk_is_obq_with_an_explicit_inverse(sym: bool) -> None:
    n = 32
    W, (H, U) = random(24, n), factor_of(n)
    grid = grid_of(*fit_affine(W, None, bits=4, group_size=16, sym=sym, search=True), 4, sym, 16)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(9))
    U = torch.linalg.cholesky(torch.linalg.inv(H[order][:, order]), upper=True).float()

    def encode_decode(q: int, w: Tensor) -> Tensor:
        scale, offset = grid.columns(torch.tensor([q]))
        offset = torch.zeros_like(scale) if offset is None else offset
        codes = ((w[:, None] - offset.double()) / scale.double()).round().clamp(grid.lo, grid.hi)
        return (scale.double() * codes + offset.double())[:, 0]

    expected = oracles.obq(W, H, encode_decode, order.tolist())
    codes, _ = gptq_chunk(W[:, order].contiguous(), U, grid.scale, grid.offset, (order // 16).int(), grid.lo, grid.hi)
    found = grid.decode(codes[:, order.argsort()].contiguous()).double()
    assert float((found == expected).double().mean()) > 0.99  # a tie may fall apart in float32
    error, best, plain = (float(((D @ H) * D).sum()) for D in (W - found, W - expected, W - grid.decode(grid.encode(W)).double()))
    assert error == pytest.approx(best, rel=1e-2)
    assert error < 0.6 * plain


def test_cutting_a_chunk_in_two_changes_nothing_but_rounding() -> None:
    case = chunk_case("asymmetric", 16, 48)
    W, U, group = case["W"], case["U"], case["group"]
    codes, E = gptq_chunk(**case)
    first, E_first = gptq_chunk(**case | {"W": W[:, :20].contiguous(), "U": U[:20, :20], "group": group[:20]})
    rest = W[:, 20:] - E_first @ U[:20, 20:]
    second, E_second = gptq_chunk(**case | {"W": rest, "U": U[20:, 20:], "group": group[20:]})
    assert float((torch.cat([first, second], 1) == codes).double().mean()) > 0.99
    torch.testing.assert_close(E_first, E[:, :20], rtol=0, atol=0)
    assert float((E_second - E[:, 20:]).abs().median()) < 1e-4


def test_the_chunk_refuses_what_does_not_fit_together() -> None:
    case = chunk_case("symmetric", 8, 16)
    for change, message in (
        ({"W": case["W"].double()}, "W is torch.float64"),
        ({"U": case["U"][:8]}, r"U is \[8, 16\]; expected \[16, 16\]"),
        ({"offset": case["scale"][:3]}, r"offset is \[3, 2\]; expected \[8, n_groups\]"),
        ({"group": case["group"] + 1}, "group runs from 1 to 2; expected 0 to 1"),
        ({"group": case["group"][:5]}, r"group is \[5\]; expected \[16\]"),
        ({"lo": -8, "hi": 255}, "codes -8 to 255 fit neither int8 nor uint8"),
        ({"book": torch.zeros(4)}, r"book is \[4\] for codes -8 to 7"),
        ({"D": case["W"][:2]}, r"D is torch.float32 \[2, 16\]; expected float32 \[8, 16\], as W"),
    ):
        with pytest.raises(KernelError, match=message):
            gptq_chunk(**case | change)


# --- choose_grid -----------------------------------------------------------------------------------------------------------------


def choice_case(bits: int, size: int, sym: bool, n_rows: int, n_groups: int = 3, mean: float = 0.0) -> dict:
    """Random weights, blocks of the moments of inputs about ``mean``, and the fitted grid with twenty multiples after it."""
    W, X = random(n_rows, n_groups * size), random(200, n_groups * size, seed=1) + mean
    X[:, ::7] *= 5
    blocks = torch.stack([block.T @ block / len(X) for block in X.split(size, 1)])
    scale, zero = fit_affine(W, X.square().mean(0), bits=bits, group_size=size, sym=sym, search=True)
    grid = grid_of(scale, zero, bits, sym, size)
    factors = torch.cat([torch.ones(1), torch.linspace(0.8, 1.15, 20)])[:, None, None]
    offset = None if grid.offset is None else grid.offset * factors
    return {"W": W, "blocks": blocks, "scale": grid.scale * factors, "offset": offset, "lo": grid.lo, "hi": grid.hi}


def errors_of_all(case: dict) -> Tensor:
    """eᵀ·B·e of every grid in float64: [n, out, n_groups]."""
    offsets = [None] * len(case["scale"]) if case["offset"] is None else case["offset"].double()
    grids = [Grid(s.double(), o, case["lo"], case["hi"], case["blocks"].shape[1]) for s, o in zip(case["scale"], offsets, strict=True)]
    return torch.stack([group_errors(case["W"].double(), grid, case["blocks"].double()) for grid in grids])


CHOICES = [(4, 128, False), (4, 32, True), (3, 64, False), (2, 16, False), (5, 48, True), (4, 200, False), (8, 32, False), (4, 300, True)]


@pytest.mark.parametrize("mean", [0.0, 3.0])
@pytest.mark.parametrize(("bits", "size", "sym"), CHOICES)
def test_the_grid_chosen_has_the_smallest_error(bits: int, size: int, sym: bool, mean: float) -> None:
    case = choice_case(bits, size, sym, n_rows=37, mean=mean)
    errors = errors_of_all(case)
    for kernel in ("reference", ops.available()[-1]):
        ops.use(kernel)
        best = choose_grid(**case)
        chosen = errors.gather(0, best[None].long())[0]
        assert float((chosen / errors.amin(0)).max()) < 1.0005
        assert float((best == errors.argmin(0)).double().mean()) > 0.97
        assert len(best.unique()) > 5


@on_every_kernel
@pytest.mark.parametrize(("bits", "size", "sym"), CHOICES)
@pytest.mark.parametrize("n_rows", [1, 70])
def test_the_grid_chosen_is_the_same_on_every_kernel(kernel: str | None, device: str, bits: int, size: int, sym: bool, n_rows: int) -> None:
    case = choice_case(bits, size, sym, n_rows) | {"W": weights_of_every_sort(n_rows, 3 * size)}
    case["scale"][5, ::3] = torch.inf
    case["scale"][0, ::5] = 0
    ops.use(ops.available()[1])
    expected = choose_grid(**case)
    ops.use(kernel)
    there = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in case.items()}
    for n_threads in (1, 3):
        ops.set_threads(n_threads)
        assert torch.equal(choose_grid(**there).cpu(), expected)


@pytest.mark.parametrize("kernel", ops.available())
def test_a_group_of_zeros_keeps_the_first_grid_and_one_without_an_error_is_never_chosen(kernel: str) -> None:
    ops.use(kernel)
    case = choice_case(4, 32, True, n_rows=4)
    case["W"][1] = 0
    case["scale"][:] = case["scale"][:1] * torch.cat([torch.tensor([0.5, torch.nan, torch.inf]), torch.linspace(0.6, 1, 18)])[:, None, None]
    best = choose_grid(**case)
    assert best[1].tolist() == [0] * 3
    assert bool((best[[0, 2, 3]] > 2).all())


def test_a_choice_refuses_what_does_not_fit_together() -> None:
    case = choice_case(4, 32, False, n_rows=4)
    for change, message in (
        ({"W": case["W"].double()}, r"W is torch.float64 \[4, 96\]"),
        ({"blocks": case["blocks"][:2]}, r"blocks is \[2, 32, 32\]; expected \[n_groups, size, size\] with 96 inputs"),
        ({"scale": case["scale"][:, :3]}, r"scale is \[21, 3, 3\]; expected \[n, 4, 3\]"),
        ({"offset": case["offset"][:5]}, r"offset is \[5, 4, 3\]; expected \[n, 4, 3\]"),
    ):
        with pytest.raises(KernelError, match=message):
            choose_grid(**case | change)


# --- pack_bits, unpack_bits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("runs", [0, 1, 3, 37])
def test_bits_are_dense_and_least_significant_first(bits: int, runs: int) -> None:
    n = codes_per_run(bits) * runs
    codes = torch.randint(0, 2**bits, (5, n), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    codes[0] = 2**bits - 1
    words = pack_bits(codes, bits)
    assert words.dtype == torch.int32
    assert words.tolist() == [oracles.pack_dense(row, bits) for row in codes.tolist()]
    assert torch.equal(unpack_bits(words, bits, n), codes)
    assert [oracles.unpack_dense(row, bits) for row in words.tolist()] == codes.tolist()


@on_every_kernel
@pytest.mark.parametrize("bits", KERNEL_BITS)
@pytest.mark.parametrize(("n_rows", "runs"), [(1, 1), (7, 5), (130, 129)])
def test_bits_are_the_references_on_every_kernel(kernel: str | None, device: str, bits: int, n_rows: int, runs: int) -> None:
    n = codes_per_run(bits) * runs
    codes = torch.randint(0, 2**bits, (n_rows, n), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)

    def run(device: str) -> tuple[Tensor, ...]:
        words = pack_bits(codes.to(device), bits)
        return words, unpack_bits(words, bits, n)

    assert equals_reference(kernel, device, run)


def test_three_bit_codes_10_and_21_lie_across_words() -> None:
    codes = torch.zeros(1, 32, dtype=torch.uint8)
    codes[0, 10], codes[0, 21] = 0b101, 0b011
    assert pack_bits(codes, 3).tolist() == [[1 << 30, (1 << 0) - (1 << 31), 0b01]]


def test_bits_refuse_ragged_rows_wrong_dtypes_and_codes_out_of_range() -> None:
    with pytest.raises(KernelError, match="codes has 9 columns; expected a multiple of 8 for 4 bits"):
        pack_bits(torch.zeros(2, 9, dtype=torch.uint8), 4)
    with pytest.raises(KernelError, match="the largest code is 4; expected at most 3"):
        pack_bits(torch.full((1, 16), 4, dtype=torch.uint8), 2)
    with pytest.raises(KernelError, match=r"codes is torch\.int8"):
        pack_bits(torch.zeros(2, 8, dtype=torch.int8), 4)
    with pytest.raises(KernelError, match="bits is 9"):
        pack_bits(torch.zeros(2, 32, dtype=torch.uint8), 9)
    with pytest.raises(KernelError, match="16 codes of 4 bits do not fill 1 words"):
        unpack_bits(torch.zeros(2, 1, dtype=torch.int32), 4, 16)
