"""Affine integers: parts, options, and the arithmetic that engines do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantcli.errors import NumericsError, RecipeError
from quantcli.qtypes.int import QTYPE as int_
from quantcli.tensors import Scheme, relative_error


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scheme_of(bits: int = 4, group_size: int = 32, sym: bool = True, **options: object) -> Scheme:
    return Scheme.of("int", bits=bits, group_size=group_size, sym=sym, **options)


ALL = pytest.mark.parametrize(
    "scheme", [scheme_of(b, g, s) for b in (2, 3, 4, 5, 6, 7, 8) for g in (32, 64, -1) for s in (True, False)], ids=str
)


@ALL
def test_pack_makes_the_parts_that_layout_announced(scheme: Scheme) -> None:
    W = random(6, 128)
    grid = int_.fit(W, scheme)
    tensor = int_.pack(grid.encode(W), grid, scheme)
    specs = int_.layout((6, 128), scheme)
    assert set(tensor.parts) == set(specs)
    for name, part in tensor.parts.items():
        assert (specs[name].shape, specs[name].nbytes) == (tuple(part.shape), part.numel() * part.element_size())
    assert (tensor.scheme, tensor.shape) == (scheme, (6, 128))


@ALL
def test_unpack_is_the_engines_arithmetic_and_equals_the_grids_to_the_bit(scheme: Scheme) -> None:
    W = random(6, 128)
    W[3, 32:64] = 0
    grid = int_.fit(W, scheme)
    codes = grid.encode(W)
    tensor = int_.pack(codes, grid, scheme)
    scale, zero = tensor.parts["scale"].float(), tensor.parts["zero"].int()
    group = torch.arange(128) // grid.group_size
    engine = scale[:, group] * (tensor.parts["codes"].int() - zero[:, group])
    assert torch.equal(int_.unpack(tensor), engine)
    assert torch.equal(int_.unpack(tensor), grid.decode(codes))
    assert int(tensor.parts["codes"].max()) <= 2 ** scheme.get("bits") - 1


@pytest.mark.parametrize(("bits", "below"), [(2, 0.2), (3, 0.05), (4, 0.012), (8, 1e-4)])
@pytest.mark.parametrize("sym", [True, False])
def test_more_bits_lose_less(bits: int, below: float, sym: bool) -> None:
    W = random(16, 128)
    grid = int_.fit(W, scheme_of(bits, 32, sym))
    assert relative_error(W, grid.decode(grid.encode(W))) < below


def test_symmetric_zero_points_are_the_middle_code() -> None:
    for bits in range(2, 9):
        grid = int_.fit(random(4, 64), scheme_of(bits, 32, True))
        tensor = int_.pack(grid.encode(random(4, 64)), grid, scheme_of(bits, 32, True))
        assert tensor.parts["zero"].dtype == torch.uint8
        assert tensor.parts["zero"].unique().tolist() == [2 ** (bits - 1)]


@pytest.mark.parametrize("sym", [True, False])
def test_the_search_follows_importance_and_minmax_does_not(sym: bool) -> None:
    W, importance = random(16, 128), torch.ones(128)
    W[:, 5] = 30.0
    importance[5] = 0.0
    H = torch.diag(importance)
    errors = {}
    for search in ("mse", "minmax"):
        scheme = scheme_of(4, 128, sym, search=search)
        grid = int_.fit(W, scheme, importance)
        errors[search] = relative_error(W, grid.decode(grid.encode(W)), H)
    assert errors["mse"] < 0.1 * errors["minmax"]
    assert str(scheme_of(4, 128, sym, search="mse")) == str(scheme_of(4, 128, sym))


def test_dynamic_act_order_stores_each_inputs_group() -> None:
    W, scheme = random(4, 64), scheme_of(4, 32, False, desc_act=True)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(2))
    ordered = W[:, order].contiguous()
    grid = int_.fit(ordered, scheme)
    codes = grid.encode(ordered)
    natural = torch.empty_like(codes)
    natural[:, order] = codes
    g_idx = torch.empty(64, dtype=torch.int32)
    g_idx[order] = torch.arange(64, dtype=torch.int32) // 32
    named = type(grid)(grid.scale, grid.offset, grid.lo, grid.hi, 32, parts={**grid.parts, "g_idx": g_idx})
    tensor = int_.pack(natural, named, scheme)
    assert tensor.parts.keys() == int_.layout((4, 64), scheme).keys()
    assert torch.equal(int_.unpack(tensor)[:, order], grid.decode(codes))
    assert int_.pack(codes, grid, scheme).parts["g_idx"].tolist() == [0] * 32 + [1] * 32
    with pytest.raises(RecipeError, match="set desc_act"):
        int_.pack(natural, named, scheme_of(4, 32, False))


def test_bad_options_and_widths_say_what_to_do() -> None:
    cases = (
        ((4, 64), scheme_of(bits=9), "int9-g32-sym: bits is 9; expected 2 to 8"),
        ((4, 64), scheme_of(group_size=0), "group_size is 0; expected a positive number of inputs, or -1"),
        ((4, 64), scheme_of(search="best"), "search is 'best'; expected mse or minmax"),
        ((4, 96), scheme_of(group_size=128), r"in_features 96 is not a multiple of the int4-g128-sym block 128; use group_size 32 or -1"),
        ((4, 33), scheme_of(), r"in_features 33 .*; use group_size -1"),
        ((64,), scheme_of(), r"got shape \[64\]; exclude this tensor"),
    )
    for shape, scheme, message in cases:
        with pytest.raises(RecipeError, match=message):
            int_.layout(shape, scheme)


def test_options_left_out_take_their_defaults() -> None:
    assert Scheme.parse("int4-g128-sym") == Scheme.of("int", **int_.options)
    W = random(4, 128)
    bare, full = int_.fit(W, Scheme.of("int")), int_.fit(W, Scheme.of("int", **int_.options))
    assert torch.equal(bare.scale, full.scale)
    assert bare.group_size == 128


def test_a_weight_that_is_not_finite_is_an_error() -> None:
    W = random(4, 64)
    W[1, 2] = float("-inf")
    with pytest.raises(NumericsError, match="row 1, column 2"):
        int_.fit(W, scheme_of())
