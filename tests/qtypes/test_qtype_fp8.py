"""FP8 and MXFP8: compressed-tensors' bytes, layouts, and weights of every sort."""

from __future__ import annotations

import pytest
import torch

from quantcli import qtypes
from quantcli.errors import NumericsError, RecipeError
from quantcli.passes import gptq, rtn
from quantcli.qtypes.fp8 import QTYPE as fp8
from quantcli.qtypes.mxfp8 import QTYPE as mxfp8
from quantcli.tensors import QuantizedTensor, Scheme, relative_error
from support.kernel_cases import random, weights_of_every_sort
from support.minifloat_golden import GOLDEN, parts_equal

FP8 = ["fp8-tensor", "fp8-channel", "fp8-block"]
ALL = [*FP8, *(f"{name}-e5m2" for name in FP8), "fp8-channel-sbf16", "mxfp8"]


@pytest.mark.parametrize("name", [*FP8, "fp8-channel-sbf16", "mxfp8"])
def test_parts_are_the_bytes_of_compressed_tensors(name: str) -> None:
    scheme = Scheme.parse(name)
    W = GOLDEN["W"].bfloat16() if name.endswith("bf16") else GOLDEN["W"]
    assert parts_equal(qtypes.of(scheme.qtype).encode(W, scheme), name)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("shape", [(136, 160), (5, 64), (1, 32)])
def test_the_parts_have_the_dtypes_and_shapes_that_layout_announced(name: str, shape: tuple[int, int]) -> None:
    scheme = Scheme.parse(name)
    qtype = qtypes.of(scheme.qtype)
    specs = qtype.layout(shape, scheme)
    W = random(*shape)
    grid = qtype.fit(W, scheme)
    for tensor in (qtype.encode(W, scheme), qtype.pack(grid.encode(W), grid, scheme)):
        found = {key: (tuple(part.shape), part.numel() * part.element_size()) for key, part in tensor.parts.items()}
        assert found == {key: (spec.shape, spec.nbytes) for key, spec in specs.items()}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("shape", [(136, 160), (130, 96), (3, 32)])
def test_codes_of_the_grid_decode_as_unpack_does_and_are_the_nearest(name: str, shape: tuple[int, int]) -> None:
    scheme = Scheme.parse(name)
    qtype = qtypes.of(scheme.qtype)
    W = random(*shape)
    grid = qtype.fit(W, scheme)
    codes = grid.encode(W)
    packed = qtype.pack(codes, grid, scheme)
    assert torch.equal(qtype.unpack(packed), grid.decode(codes))
    # A grid has one zero and breaks ties downwards; nothing else differs from encode.
    assert torch.equal(qtype.unpack(qtype.encode(W, scheme)), grid.decode(codes))


def test_blocks_need_not_divide_the_sides() -> None:
    W = random(300, 200)
    W[256:, 128:] *= 100  # the cut corner has a scale of its own
    tensor = fp8.encode(W, Scheme.parse("fp8-block"))
    assert tuple(tensor.parts["scale"].shape) == (3, 2)
    assert float(tensor.parts["scale"][2, 1]) == pytest.approx(float(W[256:, 128:].abs().max()) / 448)
    assert relative_error(W, fp8.unpack(tensor)) < 1e-3


def test_a_stack_of_matrices_decodes_matrix_by_matrix() -> None:
    scheme = Scheme.parse("fp8-block")
    tensors = [fp8.encode(random(130, 150, seed=i), scheme) for i in range(3)]
    stack = {name: torch.stack([t.parts[name] for t in tensors]) for name in ("data", "scale")}
    assert fp8.layout((3, 130, 150), scheme)["scale"].shape == (3, 2, 2)
    decoded = fp8.unpack(QuantizedTensor(scheme, (3, 130, 150), stack))
    assert torch.equal(decoded, torch.stack([fp8.unpack(t) for t in tensors]))


@pytest.mark.parametrize("name", ALL)
def test_no_weight_of_any_sort_becomes_nan_or_infinite(name: str) -> None:
    W = weights_of_every_sort(136, 160)
    W[6] *= 1e33 if "16" not in name else 1.0
    scheme = Scheme.parse(name)
    qtype = qtypes.of(scheme.qtype)
    for part in (W, torch.zeros_like(W), W * 1e-38, W[5:6]):
        tensor = qtype.encode(part.contiguous(), scheme)
        assert bool(qtype.unpack(tensor).isfinite().all())
        assert bool((tensor.parts["scale"].float() > 0).all()) or name == "mxfp8"


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_are_refused(name: str, bad: float) -> None:
    W = random(130, 160)
    W[129, 159] = bad
    scheme = Scheme.parse(name)
    for run in (qtypes.of(scheme.qtype).encode, qtypes.of(scheme.qtype).fit):
        with pytest.raises(NumericsError, match="the weights have NaN or Inf"):
            run(W, scheme)


def test_a_scale_beyond_its_dtype_is_refused_with_the_way_out() -> None:
    with pytest.raises(NumericsError, match=r"does not fit F16 .*use scale_dtype F32"):
        fp8.encode(torch.full((2, 16), 1e8), Scheme.parse("fp8-channel-sf16"))


def test_joined_matrices_share_the_scale_of_the_largest() -> None:
    scheme = Scheme.parse("fp8-tensor")
    Ws = [random(8, 32), 3 * random(4, 32, seed=1)]
    shared = fp8.fused(Ws, scheme)
    assert torch.equal(shared["scale"], fp8.encode(Ws[1], scheme).parts["scale"])
    small = fp8.encode(Ws[0], scheme, fused=shared)
    assert torch.equal(small.parts["scale"], shared["scale"])
    assert relative_error(Ws[0], fp8.unpack(small)) < 1e-3
    assert fp8.fused(Ws, Scheme.parse("fp8-channel")) == {}


def test_static_activations_have_a_place_for_their_scale() -> None:
    assert fp8.layout((4, 32), Scheme.parse("fp8-tensor+fp8-tensor"))["input_scale"].shape == (1,)
    assert "input_scale" not in fp8.layout((4, 32), Scheme.parse("fp8-channel+fp8-token"))


@pytest.mark.parametrize("name", ["fp8-channel", "mxfp8"])
def test_gptq_loses_less_on_the_layers_outputs_than_rounding(name: str) -> None:
    scheme = Scheme.parse(name)
    qtype = qtypes.of(scheme.qtype)
    X = random(500, 64) @ (torch.eye(64) + 0.7 * random(64, 64, seed=2))
    H = X.T @ X / len(X)
    W = random(24, 64, seed=3)
    solved = gptq.quantize(W, scheme, H, gptq.factorize(H, damp_ratio=0.01))
    errors = [relative_error(W, qtype.unpack(tensor), H) for tensor in (solved, rtn.quantize(W, scheme))]
    assert errors[0] < 0.7 * errors[1]


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(RecipeError, match="in_features 48 is not a multiple of the mxfp8 block 32; use fp8-channel"):
        mxfp8.layout((4, 48), Scheme.parse("mxfp8"))
    with pytest.raises(RecipeError, match=r"got shape \[4\]"):
        fp8.layout((4,), Scheme.parse("fp8-channel"))
    with pytest.raises(RecipeError, match="strategy is 'row'; expected one of tensor, channel, block"):
        fp8.layout((4, 4), Scheme.of("fp8", strategy="row"))


@pytest.mark.parametrize("name", ALL)
def test_a_scheme_reads_back_from_its_name(name: str) -> None:
    assert str(Scheme.parse(name)) == name
