"""ggml's block types and the dense dtypes as qtypes: layout, grid, packing and errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantcli import ops, qtypes
from quantcli.errors import NumericsError, RecipeError, UnsupportedError
from quantcli.ops.blocks import KINDS
from quantcli.tensors import DTYPES, Scheme

BITS_PER_WEIGHT = {"q8_0": 8.5, "q4_0": 4.5, "q4_1": 5.0, "q5_0": 5.5, "q5_1": 6.0, "q4_k": 4.5, "q5_k": 5.5, "q6_k": 6.5625}
BITS_PER_WEIGHT |= {"q2_k": 2.625, "q3_k": 3.4375, "iq4_nl": 4.5, "iq4_xs": 4.25}
BITS_PER_WEIGHT |= {"iq3_s": 3.4375, "iq3_xxs": 3.0625, "iq2_xs": 2.3125, "iq2_xxs": 2.0625, "iq2_s": 2.5625}
BITS_PER_WEIGHT |= {"ggml_mxfp4": 4.25, "ggml_nvfp4": 4.5, "tq1_0": 1.6875, "tq2_0": 2.0625}
BLOCK_TYPES = tuple(BITS_PER_WEIGHT)
GRIDS = tuple(name for name in BLOCK_TYPES if not KINDS[name].has_book)
BOOKS = tuple(name for name in BLOCK_TYPES if KINDS[name].has_book)
NEEDY = tuple(name for name in BOOKS if KINDS[name].needs_importance)
SEARCHED = tuple(name for name in BLOCK_TYPES if KINDS[name].is_weighted and name not in NEEDY)


def needed(name: str, n: int) -> Tensor | None:
    """Importance [n] for a type that needs it."""
    return torch.ones(n) if name in NEEDY else None


@pytest.fixture
def W() -> Tensor:
    return torch.randn(6, 512, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_layout_is_the_shape_of_what_encode_stores(name: str, W: Tensor) -> None:
    qtype, scheme = qtypes.of(name), Scheme.parse(name)
    (spec,) = qtype.layout(tuple(W.shape), scheme).values()
    (blocks,) = qtype.encode(W, scheme, needed(name, 512)).parts.values()
    assert (spec.name, spec.dtype, spec.shape, spec.nbytes) == ("blocks", "U8", tuple(blocks.shape), blocks.numel())
    assert 8 * spec.nbytes / W.numel() == BITS_PER_WEIGHT[name]


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_encode_stores_ggmls_bytes(name: str, W: Tensor) -> None:
    importance = torch.linspace(0.1, 3, W.shape[1])
    stored = qtypes.of(name).encode(W, Scheme.parse(name), importance).parts["blocks"]
    assert torch.equal(stored, ops.quantize_blocks(W, name, importance))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", GRIDS)
def test_the_grid_decodes_to_what_ggml_decodes_from_the_packed_bytes(name: str, weighted: bool, W: Tensor) -> None:
    qtype, scheme = qtypes.of(name), Scheme.parse(name)
    W[0, :64] = 0  # a sub-block whose scale is zero
    grid = qtype.fit(W, scheme, torch.linspace(0, 3, W.shape[1]) if weighted else None)
    codes = torch.randint(grid.lo, grid.hi + 1, W.shape, generator=torch.Generator().manual_seed(1)).to(torch.int8)
    tensor = qtype.pack(codes, grid, scheme)
    assert torch.equal(qtype.unpack(tensor), grid.decode(codes))
    assert tuple(tensor.shape) == tuple(W.shape)


@pytest.mark.parametrize("name", GRIDS)
def test_the_grids_nearest_codes_are_as_good_as_ggmls(name: str, W: Tensor) -> None:
    qtype, scheme = qtypes.of(name), Scheme.parse(name)
    grid = qtype.fit(W, scheme)
    error = (grid.decode(grid.encode(W)) - W).square().sum()
    error_of_ggml = (qtype.unpack(qtype.encode(W, scheme)) - W).square().sum()
    assert error <= 1.001 * error_of_ggml


@pytest.mark.parametrize("name", SEARCHED)
def test_importance_lowers_the_weighted_error(name: str, W: Tensor) -> None:
    qtype, scheme = qtypes.of(name), Scheme.parse(name)
    importance = torch.rand(W.shape[1], generator=torch.Generator().manual_seed(2)) ** 4

    def weighted_error(weights: Tensor | None) -> Tensor:
        return ((qtype.unpack(qtype.encode(W, scheme, weights)) - W).square() * importance).sum()

    assert weighted_error(importance) < 0.97 * weighted_error(None)


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_a_row_that_is_no_whole_number_of_blocks_is_a_recipe_error(name: str) -> None:
    block = KINDS[name].block
    hint = "F16" if block == 32 else "Q8_0"
    with pytest.raises(RecipeError, match=f"in_features 2888 is not a multiple of the {name} block {block}; use {hint}"):
        qtypes.of(name).layout((4, 2888), Scheme.parse(name))


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_a_vector_is_a_recipe_error(name: str) -> None:
    with pytest.raises(RecipeError, match=r"codes matrices \[out, in\], got shape \[512\]"):
        qtypes.of(name).layout((512,), Scheme.parse(name))


@pytest.mark.parametrize("name", ["q4_1", "q5_1"])
def test_an_offset_beyond_float16_is_an_error_too(name: str, W: Tensor) -> None:
    W[3] = -1e5 + torch.arange(512) % 2  # a scale that fits, an offset that does not
    with pytest.raises(NumericsError, match=f"a scale or offset of {name} does not fit float16"):
        qtypes.of(name).encode(W, Scheme.parse(name))


def test_a_scaled_matrix_keeps_in_nvfp4_what_its_blocks_alone_lose_or_refuse(W: Tensor) -> None:
    qtype, plain, scaled = qtypes.of("ggml_nvfp4"), Scheme.parse("ggml_nvfp4"), Scheme.parse("ggml_nvfp4-scaled")
    usual = float((qtype.unpack(qtype.encode(W, plain)) - W).square().sum() / W.square().sum())
    for factor in (1e-6, 1e-3, 0.7, 3.3, 1e6):
        V = factor * W
        tensor = qtype.encode(V, scaled)
        assert {name: (part.dtype, tuple(part.shape)) for name, part in tensor.parts.items()} == {
            name: (DTYPES[spec.dtype], spec.shape) for name, spec in qtype.layout(tuple(V.shape), scaled).items()
        }
        assert float((qtype.unpack(tensor) - V).square().sum() / V.square().sum()) < 1.5 * usual
        grid = qtype.fit(V, scaled)
        codes = grid.encode(V)
        torch.testing.assert_close(qtype.unpack(qtype.pack(codes, grid, scaled)), grid.decode(codes), rtol=3e-7, atol=0)
    assert not qtype.unpack(qtype.encode(torch.zeros(2, 64), scaled)).any()


def test_the_largest_weight_of_a_scaled_matrix_always_fits(W: Tensor) -> None:
    qtype, scaled = qtypes.of("ggml_nvfp4"), Scheme.parse("ggml_nvfp4-scaled")
    for peak in torch.rand(200, generator=torch.Generator().manual_seed(3)) * 1000 + 10:
        row = torch.cat((peak.view(1), W[0, :63])).view(1, 64)
        assert float(qtype.unpack(qtype.encode(row, scaled))[0, 0]) == pytest.approx(float(peak), rel=1e-6)


def test_a_weight_beyond_nvfp4s_largest_scale_is_an_error(W: Tensor) -> None:
    qtype, scheme = qtypes.of("ggml_nvfp4"), Scheme.parse("ggml_nvfp4")
    W[3, 300] = 2688
    assert qtype.unpack(qtype.encode(W, scheme))[3, 300] == 2688
    W[3, 300] = -2689
    for run in (qtype.encode, qtype.fit):
        with pytest.raises(NumericsError, match=r"ggml_nvfp4 holds numbers up to 2688 \(largest .w. is 2.69e\+03\)"):
            run(W, scheme)


@pytest.mark.parametrize("name", [name for name in BLOCK_TYPES if KINDS[name].d_at is not None])
def test_a_scale_beyond_float16_is_an_error_with_the_largest_weight(name: str, W: Tensor) -> None:
    W[3, 300] = 1e9
    qtype, scheme = qtypes.of(name), Scheme.parse(name)
    for run in (qtype.encode, qtype.fit) if name in GRIDS else (qtype.encode,):
        with pytest.raises(NumericsError, match=f"a scale or offset of {name} does not fit float16 \\(largest .w. is 1e.09\\)"):
            run(W, scheme, needed(name, 512))


@pytest.mark.parametrize("name", BOOKS)
def test_weights_for_which_ggml_aborts_are_an_error(name: str, W: Tensor) -> None:
    W[3] = 3.4e38 * W[3].sign() if name == "iq2_xxs" else 3e37 * W[3]  # their squares are infinite, and so is every distance
    with pytest.raises(NumericsError, match=f"a scale or offset of {name} does not fit float16"):
        qtypes.of(name).encode(W, Scheme.parse(name), needed(name, 512))


@pytest.mark.parametrize("name", BOOKS)
def test_a_code_book_has_no_grid_for_single_weights(name: str, W: Tensor) -> None:
    with pytest.raises(RecipeError, match=f"{name} takes {8 if name.startswith('iq2') else 4} weights at once from a code book"):
        qtypes.of(name).fit(W, Scheme.parse(name))


@pytest.mark.parametrize("name", NEEDY)
def test_a_type_that_needs_importance_says_so(name: str, W: Tensor) -> None:
    with pytest.raises(RecipeError, match=f"{name} needs importance: quantize with statistics"):
        qtypes.of(name).encode(W, Scheme.parse(name))


@pytest.mark.parametrize(("name", "dtype"), [("f32", torch.float32), ("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_dense_types_store_the_cast_tensor_of_any_shape(name: str, dtype: torch.dtype) -> None:
    qtype, scheme = qtypes.of(name), Scheme.parse(name)
    for shape in ((7,), (3, 5), (2, 3, 4)):
        W = torch.randn(shape)
        (spec,) = qtype.layout(shape, scheme).values()
        tensor = qtype.encode(W, scheme)
        assert torch.equal(tensor.parts["data"], W.to(dtype))
        assert torch.equal(qtype.unpack(tensor), W.to(dtype).float())
        assert (spec.name, spec.shape, spec.nbytes) == ("data", shape, W.numel() * dtype.itemsize)


def test_a_value_beyond_float16_is_an_error_that_names_it() -> None:
    with pytest.raises(NumericsError, match="70000 is beyond the largest F16, 65504"):
        qtypes.of("f16").encode(torch.tensor([1.0, -70000.0]), Scheme.parse("f16"))


def test_a_dense_type_has_no_grid() -> None:
    with pytest.raises(UnsupportedError, match="BF16 stores values, not codes"):
        qtypes.of("bf16").fit(torch.zeros(2, 2), Scheme.parse("bf16"))


@pytest.mark.parametrize(
    ("name", "value"), [("q8_0", float("nan")), *((name, float("inf")) for name in ("q8_0", "q4_0", "q4_k", "iq4_nl", "ggml_nvfp4"))]
)
def test_weights_that_are_no_numbers_are_called_so_and_not_too_large(name: str, value: float, W: Tensor) -> None:
    W[3] = value
    with pytest.raises(NumericsError, match="the weights have NaN or Inf; check the source checkpoint"):
        qtypes.of(name).encode(W, Scheme.parse(name))
