"""NF4, FP4 and LLM.int8: bitsandbytes' bytes from golden vectors, their layouts, and grids that solvers can use."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from quantcli import ops, qtypes
from quantcli.errors import NumericsError, RecipeError
from quantcli.passes import gptq, rtn
from quantcli.qtypes.fp4 import LEVELS as FP4_LEVELS
from quantcli.qtypes.llm_int8 import QTYPE as llm_int8
from quantcli.qtypes.nf4 import LEVELS as NF4_LEVELS
from quantcli.qtypes.nf4 import QTYPE as nf4
from quantcli.qtypes.shared import float4
from quantcli.tensors import Layer, QuantizedTensor, Scheme, Stats, relative_error
from support.places import DATA

GOLDEN = load_file(DATA / "bitsandbytes.safetensors")
INPUTS = sorted({name.split("/")[0] for name in GOLDEN} - {"map"})
FOUR_BITS = sorted({name.rpartition("/")[0] for name in GOLDEN if "4-b" in name})


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    yield
    ops.use(None)
    ops.set_threads(1)


def scheme_of(name: str = "nf4", block_size: int = 64, double_quant: bool = False) -> Scheme:
    return Scheme.of(name, block_size=block_size, double_quant=double_quant)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("case", FOUR_BITS)
@pytest.mark.parametrize("kernel", ["reference", None])
def test_four_bits_are_bitsandbytes_bytes(case: str, kernel: str | None) -> None:
    ops.use(kernel)
    name, _, words = case.partition("/")
    scheme = Scheme.parse(words)
    tensor = qtypes.of(scheme.qtype).encode(GOLDEN[f"{name}/W"], scheme)
    assert torch.equal(tensor.parts["packed"], GOLDEN[f"{case}/weight"].view(-1))
    assert torch.equal(tensor.parts["absmax"], GOLDEN[f"{case}/absmax"])
    if scheme.option("double_quant"):
        state = json.loads(bytes(GOLDEN[f"{case}/quant_state.bitsandbytes__{scheme.qtype}"].tolist()))
        assert torch.equal(tensor.parts["nested_absmax"], GOLDEN[f"{case}/nested_absmax"])
        assert float(tensor.parts["nested_offset"]) == state["nested_offset"]
    if (decoded := GOLDEN.get(f"{case}/decoded")) is not None:
        assert torch.equal(qtypes.of(scheme.qtype).unpack(tensor), decoded)


@pytest.mark.parametrize("name", INPUTS)
def test_int8_rows_are_bitsandbytes_bytes(name: str) -> None:
    tensor = llm_int8.encode(GOLDEN[f"{name}/W"], Scheme.of("llm_int8"))
    assert torch.equal(tensor.parts["codes"], GOLDEN[f"{name}/llm_int8/weight"])
    assert torch.equal(tensor.parts["scb"], GOLDEN[f"{name}/llm_int8/SCB"])
    if (decoded := GOLDEN.get(f"{name}/llm_int8/decoded")) is not None:
        assert torch.equal(llm_int8.unpack(tensor), decoded)


def test_tables_are_bitsandbytes_tables() -> None:
    for kind, levels in (("nf4", NF4_LEVELS), ("fp4", FP4_LEVELS)):
        assert torch.equal(float4.book_of(levels).levels, GOLDEN[f"map/{kind}"])
    assert torch.equal(float4.dynamic_map(), GOLDEN["map/dynamic"])


def two_halves(offset: float) -> Tensor:
    """NF4 as bitsandbytes made its constants: eight positive and seven negative quantiles, evenly spaced from ``offset`` to 1/2."""
    ends = (torch.linspace(offset, 0.5, 9)[:-1], torch.linspace(offset, 0.5, 8)[:-1])
    positive, negative = (torch.special.ndtri(end.double()) for end in ends)
    return torch.cat((positive, torch.zeros(1, dtype=torch.float64), -negative)).sort().values / positive.max()


def paper_equation_4() -> Tensor:
    """QLoRA's equation 4 taken at its word: midpoints of neighbouring quantiles i/17, brought to −1 … 1."""
    quantiles = torch.special.ndtri(torch.arange(1, 17, dtype=torch.float64) / 17)
    mids = (quantiles[1:] + quantiles[:-1]) / 2
    return torch.cat((mids, -mids[:1])).sort().values / mids.abs().max()


def even_quantiles() -> Tensor:
    """What tutorials compute: sixteen evenly spaced quantiles, brought to −1 … 1."""
    quantiles = torch.special.ndtri((torch.arange(16, dtype=torch.float64) + 0.5) / 16)
    return quantiles / quantiles.abs().max()


def test_the_levels_are_engines_constants_and_not_a_formula_of_the_literature() -> None:
    """Engines decode by the constants: codes that were chosen for other levels come out as other weights."""
    ours = torch.tensor(NF4_LEVELS, dtype=torch.float64)
    assert float((two_halves(0.9677083) - ours).abs().max()) < 1e-6
    W = random(64, 256)
    right = nf4.encode(W, scheme_of())
    for other in (paper_equation_4(), even_quantiles()):
        assert float((other - ours).abs().max()) > 0.02
        theirs = float4.Float4Type("nf4", tuple(other.tolist())).encode(W, scheme_of())
        read = QuantizedTensor(scheme_of(), theirs.shape, theirs.parts)
        assert relative_error(W, nf4.unpack(read)) > 1.2 * relative_error(W, nf4.unpack(right))


ALL = pytest.mark.parametrize("scheme", [scheme_of(n, b, d) for n in ("nf4", "fp4") for b in (32, 64, 256) for d in (False, True)], ids=str)


@ALL
@pytest.mark.parametrize("shape", [(6, 256), (5, 33), (1, 1), (300, 130)])
def test_encode_makes_the_parts_that_layout_announced(scheme: Scheme, shape: tuple[int, int]) -> None:
    qtype = qtypes.of(scheme.qtype)
    specs, tensor = qtype.layout(shape, scheme), qtype.encode(random(*shape), scheme)
    assert set(tensor.parts) == set(specs)
    for name, part in tensor.parts.items():
        assert (specs[name].shape, specs[name].nbytes) == (tuple(part.shape), part.nbytes), name
    assert tuple(qtype.unpack(tensor).shape) == shape


@ALL
def test_the_grid_decodes_what_pack_stores_to_the_bit(scheme: Scheme) -> None:
    qtype, W = qtypes.of(scheme.qtype), random(6, 512)
    W[2] = 0
    grid = qtype.fit(W, scheme)
    codes = grid.encode(W)
    tensor = qtype.pack(codes, grid, scheme)
    assert torch.equal(qtype.unpack(tensor), grid.decode(codes))
    assert {name: part.dtype for name, part in tensor.parts.items()} == {n: p.dtype for n, p in qtype.encode(W, scheme).parts.items()}
    exact = relative_error(W, qtype.unpack(qtype.encode(W, scheme)))
    assert relative_error(W, grid.decode(codes)) == pytest.approx(exact, rel=0.01 if scheme.option("double_quant") else 1e-4)


@ALL
def test_errors_equal_the_difference_to_the_decoded_weights(scheme: Scheme) -> None:
    qtype, W = qtypes.of(scheme.qtype), random(65, 130).bfloat16()
    tensor = qtype.encode(W, scheme)
    error, energy = qtype.errors(W, tensor)
    assert error / energy == pytest.approx(relative_error(W.float(), qtype.unpack(tensor)), rel=1e-4)


@ALL
def test_gptq_solves_onto_the_grid(scheme: Scheme) -> None:
    """A book of levels instead of integers, and the result is a tensor like any other: less error where the inputs are correlated."""
    qtype, W = qtypes.of(scheme.qtype), random(16, 256)
    X = random(2048, 256, seed=1) @ random(256, 256, seed=2)
    H = X.T @ X / len(X)
    stats = {"tap": Stats(H=H, importance=H.diagonal(), absmax=X.abs().amax(0), mean=X.mean(0), n_tokens=len(X))}
    layer = Layer("layer", {"w": W}, {"w": scheme}, {"w": "tap"})
    (report,) = gptq.PASS.run(layer, stats).tensors
    solved, rounded = (qtype.unpack(tensor) for tensor in (layer.quantized["w"], qtype.encode(W, scheme)))
    assert report.relative_error == pytest.approx(relative_error(W, solved, H), rel=1e-3)
    assert relative_error(W, solved, H) < 0.6 * relative_error(W, rounded, H)


def test_a_grid_needs_rows_of_whole_blocks() -> None:
    with pytest.raises(RecipeError, match=r"in_features 96 is not a multiple of the nf4-b64 block 64.*rtn"):
        nf4.fit(random(4, 96), scheme_of())
    assert nf4.fit(random(4, 96), scheme_of(block_size=32)).scale.shape == (4, 3)


def test_double_quantization_costs_little_and_saves_what_it_says() -> None:
    W = random(256, 512)
    plain, nested = (nf4.encode(W, scheme_of(double_quant=nested)) for nested in (False, True))
    assert relative_error(W, nf4.unpack(nested)) < 1.02 * relative_error(W, nf4.unpack(plain))
    assert sum(part.nbytes for part in nested.parts.values()) == 65536 + 2048 + 8 * 4 + 4


def test_the_bytes_do_not_depend_on_the_number_of_threads() -> None:
    """From 32768 scales on torch's own mean does."""
    W, found = random(2048, 1100).bfloat16(), []
    for n in (1, 2, 3):
        ops.set_threads(n)
        found.append(nf4.encode(W, scheme_of(double_quant=True)).parts)
    assert all(torch.equal(parts[name], found[0][name]) for parts in found for name in found[0])


def test_options_that_engines_do_not_have_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"block_size is 48; bitsandbytes has 32, 64"):
        nf4.layout((4, 96), scheme_of(block_size=48))
    with pytest.raises(RecipeError, match="double_quant is yes"):
        nf4.layout((4, 96), Scheme.of("nf4", block_size=64, double_quant="yes"))
    with pytest.raises(RecipeError, match=r"matrices .out, in., got shape .2, 4, 64."):
        nf4.layout((2, 4, 64), scheme_of())


def test_int8_rows_lose_what_eight_bits_lose_and_their_grid_agrees_to_an_ulp() -> None:
    W, scheme = random(16, 128), Scheme.of("llm_int8")
    W[3] = 0
    grid = llm_int8.fit(W, scheme)
    codes = grid.encode(W)
    decoded = llm_int8.unpack(llm_int8.pack(codes, grid, scheme))
    assert torch.allclose(decoded, grid.decode(codes), rtol=2e-7, atol=0)
    assert relative_error(W, decoded) < 1e-4
    assert relative_error(W, llm_int8.unpack(llm_int8.encode(W, scheme))) < 1e-4


@pytest.mark.parametrize("scheme", [scheme_of(), scheme_of("fp4", double_quant=True), Scheme.of("llm_int8")], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_an_error(scheme: Scheme, value: float) -> None:
    """Though a maximum passes over a NaN, and codes are chosen for it."""
    W = random(4, 256)
    W[2, 7] = value
    with pytest.raises(NumericsError, match=r"NaN.*Inf"):
        rtn.PASS.run(Layer("layer", {"w": W}, {"w": scheme}), {})


def test_a_weight_beyond_float16_is_an_error_and_no_infinity() -> None:
    for value in (1e5, float("nan")):
        W = random(4, 64)
        W[2, 7] = value
        with pytest.raises(NumericsError, match="float16"):
            llm_int8.encode(W, Scheme.of("llm_int8"))
