"""RTN: the nearest code of every weight, and an error measured in pieces that is the error of the whole."""

from __future__ import annotations

import pytest
import torch

from quantcli import qtypes
from quantcli.passes import rtn
from quantcli.tensors import Layer, Scheme, relative_error

SCHEMES = ["int4-g32-sym", "int3-g64-asym", "int8-channel-asym", "int4-g32-sym-desc", "q8_0", "q4_0", "bf16"]


def weights(n_out: int = 24, n_in: int = 128) -> torch.Tensor:
    return torch.randn(n_out, n_in, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("chunk_elements", [1, 5 * 128, 1 << 18])
def test_the_error_is_that_of_the_whole_matrix(scheme: str, chunk_elements: int) -> None:
    W = weights()
    tensor = rtn.quantize(W, Scheme.parse(scheme))
    decoded = qtypes.of(tensor.scheme.qtype).unpack(tensor)
    assert rtn.weight_error(W, tensor, chunk_elements=chunk_elements) == pytest.approx(relative_error(W, decoded), rel=1e-5)


@pytest.mark.parametrize("scheme", ["int4-g32-sym", "int3-g64-asym", "int2-channel-asym"])
def test_no_other_code_is_nearer(scheme: str) -> None:
    W = weights()
    qtype = qtypes.of(Scheme.parse(scheme).qtype)
    grid = qtype.fit(W, Scheme.parse(scheme))
    decoded = qtype.unpack(rtn.quantize(W, Scheme.parse(scheme)))
    codes = torch.arange(grid.lo, grid.hi + 1)[:, None, None]
    every = torch.stack([grid.decode(code.expand(W.shape).to(torch.int16)) for code in codes])  # [n_codes, out, in]
    assert ((W - decoded).abs() <= (every - W).abs().amin(0) + 1e-6).all()


def test_every_tensor_of_the_layer_is_coded_and_reported() -> None:
    layer = Layer("l", {"a": weights(), "b": weights(8)}, {"a": Scheme.parse("q8_0"), "b": Scheme.parse("int4-g32-sym")})
    report = rtn.PASS.run(layer, {})
    assert [r.name for r in report.tensors] == list(layer.quantized) == ["a", "b"]
    assert all(0 < r.relative_error < 0.02 for r in report.tensors)
