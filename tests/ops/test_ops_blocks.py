"""ggml's block ops: ggml's bytes on every instruction set, whatever the shape and the number of threads."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
import torch
from gguf import GGMLQuantizationType, quants
from torch import Tensor

from quantcli import ops
from quantcli.errors import KernelError
from quantcli.ops import dispatch
from quantcli.ops.blocks import KINDS
from support.block_inputs import (
    INPUTS,
    assert_as_ggml,
    assert_same_bytes,
    gaussian,
    importance,
    load_golden,
    weightings,
)
from support.ggml_peer import Ggml

SETS = ops.available(hidden=True)
COMPILED = [name for name in SETS if name != "reference"]


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    yield
    ops.use(None)
    ops.set_threads(1)


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_golden()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SETS)
def test_quantize_gives_ggmls_bytes(name: str, kind: str, golden: dict[str, Tensor]) -> None:
    ops.use(name)
    W = torch.cat([golden[f"{case}/W"] for case in INPUTS])
    for weights, suffix in weightings(kind, W.shape[1]):
        got = ops.quantize_blocks(W, kind, weights).split(2)
        for case, blocks in zip(INPUTS, got, strict=True):
            assert_as_ggml(blocks, golden.get(f"{case}/{kind}{suffix}"), f"{case}{suffix}", kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SETS)
def test_dequantize_gives_ggmls_floats(name: str, kind: str, golden: dict[str, Tensor]) -> None:
    ops.use(name)
    W = ops.dequantize_blocks(gaussian(golden, kind), kind, 512)
    assert torch.equal(W.view(torch.int32), golden[f"decoded/{kind}"].view(torch.int32))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("rows", [1, 3, 17])
def test_any_number_of_rows_and_threads_equals_the_reference(name: str, kind: str, rows: int) -> None:
    W = torch.randn(rows, 768, generator=torch.Generator().manual_seed(rows))
    weights = importance(768)
    ops.use("reference")
    blocks = ops.quantize_blocks(W, kind, weights)
    params = ops.fit_blocks(W, kind, weights)
    codes, _ = ops.unpack_blocks(blocks, kind, 768)
    ops.use(name)
    for n_threads in (1, 3):
        ops.set_threads(n_threads)
        assert_same_bytes(ops.quantize_blocks(W, kind, weights), blocks, "quantize", kind)
        fitted = ops.fit_blocks(W, kind, weights)
        assert fitted.keys() == params.keys()
        assert all(torch.equal(fitted[part], params[part]) and fitted[part].dtype == params[part].dtype for part in params)
        assert torch.equal(ops.unpack_blocks(blocks, kind, 768)[0], codes)
        assert_same_bytes(ops.pack_blocks(codes, params, kind), blocks, "pack", kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SETS)
def test_unpack_then_pack_is_the_identity_on_any_bytes(name: str, kind: str) -> None:
    ops.use(name)
    sizes = KINDS[kind]
    blocks = torch.randint(0, 256, (5, 3 * sizes.n_bytes), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    codes, params = ops.unpack_blocks(blocks, kind, 3 * sizes.block)
    if kind == "tq1_0":  # whose bytes are fractions, several to the same five trits: it gives back those that it makes
        blocks = ops.pack_blocks(codes, params, kind)
        assert torch.equal(ops.unpack_blocks(blocks, kind, 3 * sizes.block)[0], codes)
        return
    assert_same_bytes(ops.pack_blocks(codes, params, kind), blocks, "pack", kind)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SETS)
def test_sixteen_bit_weights_quantize_as_their_float32_values(name: str, kind: str, dtype: torch.dtype) -> None:
    ops.use(name)
    W = torch.cat((INPUTS["gaussian"], INPUTS["mixed_scales"] * 1e-6))[:, :512].to(dtype)  # float16 subnormals among them
    weights, _ = weightings(kind, 512)[0]
    assert_same_bytes(ops.quantize_blocks(W, kind, weights), ops.quantize_blocks(W.float(), kind, weights), str(dtype), kind)


def test_every_float16_becomes_the_same_float32() -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    finite = torch.where(every.isfinite(), every, 0).view(-1, 32)
    for name in SETS:
        ops.use(name)
        blocks = torch.zeros(finite.numel(), 34, dtype=torch.uint8)
        blocks[:, :2] = finite.view(-1, 1).contiguous().view(torch.uint8)
        blocks[:, 2] = 1
        W = ops.dequantize_blocks(blocks, "q8_0", 32)[:, 0]
        assert torch.equal(W, finite.float().flatten())


def test_rounding_to_float16_is_to_nearest_even_with_subnormals_and_overflow() -> None:
    generator = torch.Generator().manual_seed(2)
    exponents = torch.randint(-30, 18, (20000,), generator=generator)
    values = torch.ldexp(torch.rand(20000, generator=generator) + 1, exponents)
    ties = torch.ldexp(torch.arange(1024, 2049).float() + 0.5, torch.tensor(-24))
    peaks = torch.cat((values, ties, torch.tensor([65504.0, 65519.99, 65520.0, 1e30]))) * 127
    for name in COMPILED:
        ops.use(name)
        W = peaks[:, None] * torch.eye(1, 32)
        d = ops.fit_blocks(W, "q8_0")["d"].flatten()
        assert torch.equal(d, (peaks / 127).half())


def test_importance_changes_the_codes_of_every_searched_type() -> None:
    W = INPUTS["gaussian"]
    for kind in [kind for kind in KINDS if KINDS[kind].is_weighted and not KINDS[kind].needs_importance]:
        assert not torch.equal(ops.quantize_blocks(W, kind), ops.quantize_blocks(W, kind, importance(W.shape[1])))


def test_a_row_that_is_no_whole_number_of_blocks_is_refused() -> None:
    with pytest.raises(KernelError, match="in_features 300 is not a positive multiple of the q4_k block 256"):
        ops.quantize_blocks(torch.zeros(2, 300), "q4_k")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind].needs_importance])
@pytest.mark.parametrize("name", SETS)
def test_a_type_that_needs_importance_is_refused_without(name: str, kind: str) -> None:
    ops.use(name)
    for op in (ops.quantize_blocks, ops.fit_blocks):
        with pytest.raises(KernelError, match=f"{kind} needs importance, got none"):
            op(torch.zeros(2, 256), kind)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind].has_book])
@pytest.mark.parametrize("name", SETS)
def test_every_point_of_a_code_book_decodes_as_in_the_gguf_package(name: str, kind: str) -> None:
    ops.use(name)
    blocks = torch.randint(0, 256, (64, 4 * KINDS[kind].n_bytes), generator=torch.Generator().manual_seed(5), dtype=torch.uint8)
    d = blocks.view(-1, KINDS[kind].n_bytes)
    d[:, 1] &= 0x3F  # no infinity
    expected = quants.dequantize(blocks.numpy(), getattr(GGMLQuantizationType, kind.upper()))
    assert torch.equal(ops.dequantize_blocks(blocks, kind, 1024), torch.from_numpy(expected))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind].has_book])
@pytest.mark.parametrize("name", SETS)
def test_packing_codes_that_are_no_points_takes_points_near_them(name: str, kind: str) -> None:
    ops.use(name)
    _, params = ops.unpack_blocks(torch.zeros(1, KINDS[kind].n_bytes, dtype=torch.uint8), kind, 256)
    codes = torch.randint(-127, 128, (1, 256), generator=torch.Generator().manual_seed(6), dtype=torch.int8)
    packed = ops.pack_blocks(codes, params, kind)
    stored, _ = ops.unpack_blocks(packed, kind, 256)
    assert_same_bytes(ops.pack_blocks(stored, params, kind), packed, "pack", kind)
    ops.use("reference")
    assert_same_bytes(packed, ops.pack_blocks(codes, params, kind), "reference", kind)


def test_an_unknown_kind_is_refused_with_the_known_ones() -> None:
    with pytest.raises(KernelError, match="no block type 'q9_k'; there are: q8_0"):
        ops.quantize_blocks(torch.zeros(2, 256), "q9_k")


@pytest.mark.skipif(not COMPILED, reason="this installation has no compiled kernels")
def test_the_binding_names_the_argument_that_does_not_fit() -> None:
    ops.use(COMPILED[0])
    with pytest.raises(KernelError, match=r"importance: expected float32 \[256\], got float32 \[128\] on cpu"):
        ops.quantize_blocks(torch.zeros(1, 256), "q4_k", torch.ones(128))
    with pytest.raises(KernelError, match=r"W: expected float32\|bfloat16\|float16 \[1, 256\], got float64"):
        ops.quantize_blocks(torch.zeros(1, 256, dtype=torch.float64), "q4_k")
    with pytest.raises(KernelError, match=r"blocks: expected uint8 \[2, 144\], got uint8 \[2, 100\]"):
        ops.dequantize_blocks(torch.zeros(2, 100, dtype=torch.uint8), "q4_k", 256)


@pytest.mark.skipif(not COMPILED, reason="this installation has no compiled kernels")
def test_the_binding_wants_the_parameters_of_the_type_and_no_other() -> None:
    ops.use(COMPILED[0])
    codes, d = torch.zeros(1, 32, dtype=torch.int8), torch.ones(1, 1, dtype=torch.float16)
    with pytest.raises(KernelError, match="q4_1: the parameter m is missing"):
        ops.pack_blocks(codes, {"d": d}, "q4_1")
    with pytest.raises(KernelError, match="q4_0: expected the parameters d alone, got 2"):
        ops.pack_blocks(codes, {"d": d, "m": d}, "q4_0")
    with pytest.raises(KernelError, match=r"m: expected float16 \[1, 1\], got float16 \[1, 2\] on cpu"):
        ops.pack_blocks(codes, {"d": d, "m": torch.ones(1, 2, dtype=torch.float16)}, "q4_1")


def test_an_instruction_set_this_machine_lacks_is_refused_with_those_it_has() -> None:
    with pytest.raises(KernelError, match=r"'sse9' is not available.*reference"):
        ops.use("sse9")


@pytest.mark.parametrize("name", SETS)
def test_the_environment_forces_a_set(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTCLI_KERNELS", name)
    monkeypatch.setattr("quantcli.ops.dispatch._forced_reference", None)
    assert ops.active() == name


def test_without_compiled_kernels_the_references_run_and_nothing_else_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    W = INPUTS["gaussian"][:, :256]
    expected = ops.quantize_blocks(W, "q4_k")
    monkeypatch.setitem(sys.modules, "quantcli._kernels", None)  # importing it is then a ModuleNotFoundError
    dispatch._compiled.cache_clear()
    try:
        ops.use(None)
        assert (ops.active(), ops.available()) == ("reference", ("reference",))
        assert_same_bytes(ops.quantize_blocks(W, "q4_k"), expected, "gaussian", "q4_k")
        with pytest.raises(KernelError, match="'avx2' is not available: this installation has no compiled kernels"):
            ops.use("avx2")
    finally:
        dispatch._compiled.cache_clear()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [SETS[-1], "reference"])
def test_cuda_gives_ggmls_bytes_and_floats(name: str, kind: str, golden: dict[str, Tensor]) -> None:
    ops.use(name)
    W = torch.cat([golden[f"{case}/W"] for case in INPUTS]).cuda()
    for weights, suffix in weightings(kind, W.shape[1]):
        blocks = ops.quantize_blocks(W, kind, weights)
        for case, got in zip(INPUTS, blocks.cpu().split(2), strict=True):
            assert_as_ggml(got, golden.get(f"{case}/{kind}{suffix}"), f"{case}{suffix}", kind)
        codes, params = ops.unpack_blocks(blocks, kind, W.shape[1])
        assert_same_bytes(ops.pack_blocks(codes, params, kind), blocks, "pack", kind)
        fitted = ops.fit_blocks(W, kind, weights)
        assert all(torch.equal(fitted[part].view(torch.uint8), params[part].view(torch.uint8)) for part in params)
    decoded = ops.dequantize_blocks(gaussian(golden, kind).cuda(), kind, 512).cpu()
    assert torch.equal(decoded.view(torch.int32), golden[f"decoded/{kind}"].view(torch.int32))


@pytest.mark.peer
@pytest.mark.skipif("QUANTCLI_LIBGGML" not in os.environ, reason="QUANTCLI_LIBGGML does not name a libggml-base.so")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", COMPILED)
def test_live_ggml_agrees_on_many_random_blocks(name: str, kind: str) -> None:
    ggml = Ggml(os.environ["QUANTCLI_LIBGGML"])
    ops.use(name)
    for case, W in INPUTS.items():
        for weights, suffix in weightings(kind, W.shape[1]):
            expected = ggml.quantize_if_it_can(W, kind, weights)
            assert_as_ggml(ops.quantize_blocks(W, kind, weights), expected, f"{case}{suffix}", kind)
            if expected is None:
                continue
            decoded = ggml.dequantize(expected, kind, W.shape[1])
            assert torch.equal(ops.dequantize_blocks(expected, kind, W.shape[1]).view(torch.int32), decoded.view(torch.int32)), case


@pytest.mark.peer
@pytest.mark.slow
@pytest.mark.skipif("QUANTCLI_LIBGGML" not in os.environ, reason="QUANTCLI_LIBGGML does not name a libggml-base.so")
@pytest.mark.parametrize("kind", KINDS)
def test_live_ggml_agrees_on_ten_thousand_random_blocks(kind: str) -> None:
    ggml = Ggml(os.environ["QUANTCLI_LIBGGML"])
    generator = torch.Generator().manual_seed(7)
    n = 10_000 * KINDS[kind].block // 8
    rows, cols = (n // 2048, 8 * 2048) if KINDS[kind].block == 256 else (n // 256, 8 * 256)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    W = randn(rows, cols) * torch.exp(randn(rows, 1)) * torch.exp(randn(rows, cols) * torch.rand(rows, 1, generator=generator))
    W.view(-1, KINDS[kind].block)[::5, 7] *= 100  # one outlier in a fifth of the blocks
    for weights in (None, torch.exp(2 * randn(cols))):
        if weights is None and KINDS[kind].needs_importance:
            continue
        expected = ggml.quantize(W, kind, weights)
        for name in COMPILED:
            ops.use(name)
            assert_same_bytes(ops.quantize_blocks(W, kind, weights), expected, name, kind)
