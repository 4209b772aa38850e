"""MXFP4 and NVFP4: compressed-tensors' bytes without the search, less error with it, and weights of every sort."""

from __future__ import annotations

import pytest
import torch

from quantcli import qtypes
from quantcli.errors import NumericsError, RecipeError
from quantcli.ops.minifloat import FP4_LEVELS, group_step
from quantcli.passes import gptq, rtn
from quantcli.qtypes.mxfp4 import QTYPE as mxfp4
from quantcli.qtypes.nvfp4 import QTYPE as nvfp4
from quantcli.tensors import QuantizedTensor, Scheme, relative_error
from support.kernel_cases import random, weights_of_every_sort
from support.minifloat_golden import GOLDEN, parts_equal

NAMES = ["mxfp4", "nvfp4"]
ALL = [*NAMES, *(f"{name}-minmax" for name in NAMES)]


@pytest.mark.parametrize("name", NAMES)
def test_minmax_makes_the_bytes_of_compressed_tensors(name: str) -> None:
    scheme = Scheme.parse(f"{name}-minmax")
    assert parts_equal(qtypes.of(scheme.qtype).encode(GOLDEN["W"], scheme), name)


def test_nvfp4_decodes_as_compressed_tensors_does() -> None:
    parts = {part: GOLDEN[f"nvfp4/{part}"] for part in ("packed", "scale", "global_scale")}
    decoded = nvfp4.unpack(QuantizedTensor(Scheme.parse("nvfp4"), (136, 160), parts))
    assert torch.equal(decoded.bfloat16(), GOLDEN["nvfp4/decoded"])


@pytest.mark.parametrize("name", NAMES)
def test_unpack_is_level_times_scale_pair_by_pair(name: str) -> None:
    scheme, W = Scheme.parse(name), random(3, 64)
    tensor = qtypes.of(name).encode(W, scheme)
    decoded = qtypes.of(name).unpack(tensor)
    group = 64 // tensor.parts["scale"].shape[1]
    for row, column in ((0, 0), (1, 33), (2, 62), (2, 63)):
        byte = int(tensor.parts["packed"][row, column // 2])
        code = byte & 15 if column % 2 == 0 else byte >> 4
        level = FP4_LEVELS[code & 7] * (-1 if code & 8 else 1)
        stored = tensor.parts["scale"][row, column // group]
        step = 2.0 ** (int(stored) - 127) if name == "mxfp4" else float(stored.float() / tensor.parts["global_scale"])
        assert float(decoded[row, column]) == pytest.approx(level * step, rel=1e-7)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("shape", [(136, 160), (5, 64), (1, 32)])
def test_the_parts_have_the_dtypes_and_shapes_that_layout_announced(name: str, shape: tuple[int, int]) -> None:
    scheme, W = Scheme.parse(name), random(*shape)
    qtype = qtypes.of(scheme.qtype)
    grid = qtype.fit(W, scheme)
    for tensor in (qtype.encode(W, scheme), qtype.pack(grid.encode(W), grid, scheme)):
        found = {key: (tuple(part.shape), part.numel() * part.element_size()) for key, part in tensor.parts.items()}
        assert found == {key: (spec.shape, spec.nbytes) for key, spec in qtype.layout(shape, scheme).items()}


@pytest.mark.parametrize("name", ALL)
def test_codes_of_the_grid_decode_as_unpack_does_and_are_the_nearest(name: str) -> None:
    scheme, W = Scheme.parse(name), random(24, 160)
    qtype = qtypes.of(scheme.qtype)
    grid = qtype.fit(W, scheme)
    codes = grid.encode(W)
    assert torch.equal(qtype.unpack(qtype.pack(codes, grid, scheme)), grid.decode(codes))
    assert torch.equal(qtype.unpack(qtype.encode(W, scheme)), grid.decode(codes))


@pytest.mark.parametrize(("name", "gain"), [("mxfp4", 0.999), ("nvfp4", 0.85)])
@pytest.mark.parametrize("weighted", [True, False])
def test_the_search_loses_less_than_minmax_in_its_own_measure(name: str, gain: float, weighted: bool) -> None:
    W, importance = random(64, 256), random(256, seed=1).square() if weighted else None
    H = torch.diag(importance) if importance is not None else None
    qtype, scheme = qtypes.of(name), Scheme.parse(name)
    errors = {
        search: relative_error(W, qtype.unpack(qtype.encode(W, scheme.with_options(search=search), importance)), H)
        for search in ("mse", "minmax")
    }
    assert errors["mse"] < gain * errors["minmax"]


@pytest.mark.parametrize("name", ALL)
def test_no_weight_of_any_sort_becomes_nan_or_infinite(name: str) -> None:
    W = weights_of_every_sort(136, 160)
    scheme = Scheme.parse(name)
    qtype = qtypes.of(scheme.qtype)
    huge = torch.full((4, 32), 3e38)
    for part in (W, torch.zeros_like(W), W * 1e-38, W[5:6], huge, -huge):
        assert bool(qtype.unpack(qtype.encode(part.contiguous(), scheme)).isfinite().all())


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_infinity_are_refused(name: str, bad: float) -> None:
    W = random(3, 64)
    W[2, 63] = bad
    scheme = Scheme.parse(name)
    for run in (qtypes.of(scheme.qtype).encode, qtypes.of(scheme.qtype).fit):
        with pytest.raises(NumericsError, match="the weights have NaN or Inf"):
            run(W, scheme)


def test_joined_matrices_share_the_global_scale_of_the_largest() -> None:
    scheme, Ws = Scheme.parse("nvfp4"), [random(8, 32), 3 * random(4, 32, seed=1)]
    shared = nvfp4.fused(Ws, scheme)
    assert float(shared["global_scale"]) == pytest.approx(448 * 6 / float(Ws[1].abs().max()))
    for W in Ws:
        for tensor in (nvfp4.encode(W, scheme, fused=shared), rtn_by_grid(W, scheme, shared)):
            assert torch.equal(tensor.parts["global_scale"], shared["global_scale"])
            assert relative_error(W, nvfp4.unpack(tensor)) < 0.01


def rtn_by_grid(W: torch.Tensor, scheme: Scheme, shared: dict[str, torch.Tensor]) -> QuantizedTensor:
    grid = nvfp4.fit(W, scheme, fused=shared)
    return nvfp4.pack(grid.encode(W), grid, scheme)


def test_e8m0_bytes_are_powers_of_two_and_the_last_is_nan() -> None:
    step = group_step(torch.tensor([0, 1, 127, 254, 255], dtype=torch.uint8), "mxfp4")
    assert step[:4].tolist() == [2.0**-127, 2.0**-126, 1.0, 2.0**127]
    assert bool(step[4].isnan())


@pytest.mark.parametrize("name", NAMES)
def test_gptq_loses_less_on_the_layers_outputs_than_rounding(name: str) -> None:
    scheme, qtype = Scheme.parse(name), qtypes.of(name)
    X = random(500, 64) @ (torch.eye(64) + 0.7 * random(64, 64, seed=2))
    H = X.T @ X / len(X)
    W = random(24, 64, seed=3)
    solved = gptq.quantize(W, scheme, H, gptq.factorize(H, damp_ratio=0.01))
    errors = [relative_error(W, qtype.unpack(tensor), H) for tensor in (solved, rtn.quantize(W, scheme))]
    assert errors[0] < 0.7 * errors[1]


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(RecipeError, match="in_features 48 is not a multiple of the mxfp4 block 32; use nvfp4"):
        mxfp4.layout((4, 48), Scheme.parse("mxfp4"))
    with pytest.raises(RecipeError, match="in_features 40 is not a multiple of the nvfp4 block 16; use fp8-channel"):
        nvfp4.layout((4, 40), Scheme.parse("nvfp4"))
    with pytest.raises(RecipeError, match="search is 'best'; expected mse or minmax"):
        nvfp4.layout((4, 32), Scheme.of("nvfp4", search="best"))


@pytest.mark.parametrize("name", [*ALL, "nvfp4+nvfp4-g16"])
def test_a_scheme_reads_back_from_its_name(name: str) -> None:
    assert str(Scheme.parse(name)) == name
