"""Claims of conversions: which grids hold which, on real codes, and that no code goes over that would not decode as before."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quantcli import conversions, qtypes
from quantcli.errors import NumericsError, UnsupportedError
from quantcli.ops.blocks import unpack_blocks
from quantcli.passes import rtn
from quantcli.qtypes import Parts, QType
from quantcli.qtypes.shared.affine import Affine, AffineCodes, divides
from quantcli.tensors import Grid, QuantizedTensor, Scheme, TensorSpec

IN_FEATURES = 256
GROUPS = ("g32", "g128", "channel")
BOOKS = {"iq3_s", "iq3_xxs", "iq2_xs", "iq2_xxs", "iq2_s"}
"""Number formats whose codes come from a book, as no other's do."""
SCHEMES = [
    *(f"int{bits}-{group}-{sym}" for bits in (2, 3, 4, 8) for group in GROUPS for sym in ("sym", "asym")),
    *("int4-g48-sym-sf32", "int4-g64-sym-sbf16", "int8-channel-sym-sf32+int8-token", "int4-g64-sym-desc", "int4-g64-asym-desc"),
    *("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q4_k", "q6_k", "q2_k", "q3_k", "iq4_nl", "iq4_xs", "tq1_0", "tq2_0"),
    *("nf4-b64", "nf4-b64-dq", "nf4-b128", "fp4-b64", "fp4-b64-dq", "llm_int8"),
    *(
        "fp8-tensor",
        "fp8-channel",
        "fp8-block",
        "fp8-channel-sbf16",
        "fp8-channel-e5m2",
        "mxfp4",
        "mxfp8",
        "nvfp4",
        "ggml_mxfp4",
        "ggml_nvfp4",
        "ggml_nvfp4-scaled",
    ),
]


def known(text: str) -> Scheme:
    return Scheme.parse(text)


def weights(n_in: int = IN_FEATURES) -> Tensor:
    W = torch.randn(24, n_in, generator=torch.Generator().manual_seed(7))
    W[3] *= 40
    W[5] = 0
    W[7, 11] = 25
    return W


def coded(scheme: Scheme) -> QuantizedTensor:
    tensor = rtn.quantize(weights(), scheme)
    if not scheme.get("desc_act"):
        return tensor
    shuffled = tensor.parts["g_idx"][torch.randperm(IN_FEATURES, generator=torch.Generator().manual_seed(1))]
    return replace(tensor, parts={**tensor.parts, "g_idx": shuffled})


@pytest.fixture(scope="module")
def sources() -> dict[str, QuantizedTensor]:
    return {text: coded(known(text)) for text in SCHEMES if text != "int4-g48-sym-sf32"}


@pytest.mark.parametrize("text", [text for text in SCHEMES if text != "int4-g48-sym-sf32"])
def test_an_exact_pair_decodes_bit_for_bit_and_kept_codes_nearly_so(sources: dict[str, QuantizedTensor], text: str) -> None:
    tensor = sources[text]
    W = conversions.decode(tensor)
    for target in map(known, SCHEMES):
        degree = conversions.exactness(tensor.scheme, target, IN_FEATURES)
        if degree is None:
            with pytest.raises(UnsupportedError, match="does not hold"):
                conversions.convert(tensor, target)
            continue
        out, is_exact = conversions.convert(tensor, target)
        assert out.scheme == target
        assert out.shape == tensor.shape
        W_hat = conversions.decode(out)
        assert is_exact == torch.equal(W_hat, W)
        assert is_exact or degree == conversions.CODES
        assert torch.allclose(W_hat, W, rtol=2e-3, atol=2e-3 * float(W.abs().max())), f"{text} as {target}"


@pytest.mark.parametrize(
    ("source", "target", "degree"),
    [
        ("int4-g128-sym", "q4_0", "exact"),
        ("int2-g32-sym", "q4_0", "exact"),
        ("int4-channel-sym", "q4_0", "exact"),
        ("int4-g128-sym", "int4-g128-asym", "exact"),
        ("int4-g128-sym", "int4-g32-sym", "exact"),
        ("int4-g128-asym", "int8-g128-sym", "exact"),
        ("int4-g128-asym", "q5_0", "exact"),
        ("int4-g128-asym", "q4_1", "codes"),
        ("int3-g64-asym", "q4_0", "exact"),
        ("int8-g32-sym", "q8_0", "exact"),
        ("int8-channel-sym-sf32", "q8_0", "codes"),
        ("llm_int8", "q8_0", "codes"),
        ("llm_int8", "int8-channel-sym-sf32", "codes"),
        ("q4_0", "q8_0", "exact"),
        ("nf4-b64-dq", "nf4-b64", "exact"),
        ("fp8-tensor", "fp8-channel", "exact"),
        ("fp8-tensor", "fp8-block", "exact"),
        ("fp8-channel-sbf16", "fp8-channel-sf32", "exact"),
        ("fp8-channel", "fp8-channel-sbf16", "codes"),
        ("int8-channel-sym+int8-token", "int8-channel-sym", "exact"),
        ("mxfp4", "ggml_mxfp4", "exact"),
        ("ggml_mxfp4", "mxfp4", "exact"),
        ("ggml_mxfp4", "mxfp4+mxfp4-g32", "exact"),
        ("nvfp4", "ggml_nvfp4", None),
        ("nvfp4", "ggml_nvfp4-scaled", "codes"),
        ("int4-g32-sym", "int4-g128-sym", None),
        ("int4-g128-asym", "int4-g128-sym", None),
        ("int4-g128-asym", "q4_0", None),
        ("int4-g64-sym-desc", "int4-g64-sym", None),
        ("int4-g64-sym-desc", "q4_0", None),
        ("int8-g128-asym", "q8_0", None),
        ("int4-g64-sym-sbf16", "int4-g64-sym", "codes"),
        ("nf4-b64", "nf4-b64-dq", None),
        ("nf4-b64", "fp4-b64", None),
        ("fp8-channel", "fp8-tensor", None),
        ("fp8-channel", "fp8-channel-e5m2", None),
        ("q4_k", "q5_k", None),
        ("int8-channel-sym", "int8-channel-sym+int8-tensor", None),
    ],
)
def test_the_pairs_people_ask_for(source: str, target: str, degree: str | None) -> None:
    assert conversions.exactness(known(source), known(target), IN_FEATURES) == degree


def test_every_grid_holds_itself_however_it_was_searched() -> None:
    for scheme in map(known, SCHEMES):
        assert conversions.exactness(scheme, scheme, IN_FEATURES) == conversions.EXACT
    assert conversions.exactness(known("int4-minmax"), known("int4"), IN_FEATURES) == conversions.EXACT


def test_every_number_format_of_the_house_is_among_the_pairs() -> None:
    assert {known(text).qtype for text in SCHEMES} | {"f32", "f16", "bf16", "q5_k", "hqq"} | BOOKS >= set(qtypes.names())


def test_groups_that_do_not_cut_the_sources_evenly_are_refused() -> None:
    assert conversions.exactness(known("int4-g48-sym-sf32"), known("q4_0"), 96) is None
    assert conversions.exactness(known("int4-channel-sym"), known("q4_0"), 80) is None


def test_a_scale_that_the_target_cannot_hold_is_an_error_and_no_infinity() -> None:
    huge = rtn.quantize(weights() * 1e6, known("int8-channel-sym-sf32"))
    with pytest.raises(NumericsError, match="a scale of the source does not fit F16"):
        conversions.convert(huge, known("q8_0"))


def test_candidates_begin_with_the_source_itself_and_prefer_small_types() -> None:
    order = [str(scheme) for scheme in conversions.candidates(known("int4-g128-asym"))]
    assert order[0] == "int4-g128-asym"
    assert order[-5:] == ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0"]
    without_activations = next(s for s in conversions.candidates(known("int8-channel-sym+int8-token")) if not s.get("act"))
    assert str(without_activations) == "int8-channel-sym"


def hqq_coded(bits: float, group_size: int, axis: int = 1) -> QuantizedTensor:
    """Random codes with zero points that are no integers."""
    random = torch.Generator().manual_seed(3)
    n_groups = 24 * IN_FEATURES // group_size
    codes = torch.randint(0, math.ceil(2**bits), (24, IN_FEATURES), generator=random, dtype=torch.uint8)
    scale = (0.01 + 0.02 * torch.rand(n_groups, generator=random)).half()
    zero = (2**bits * torch.rand(n_groups, generator=random)).half()
    scheme = Scheme.of("hqq", bits=bits, group_size=group_size, axis=axis, scale_dtype="F16")
    return QuantizedTensor(scheme, (24, IN_FEATURES), {"codes": codes, "scale": scale, "zero": zero})


@pytest.mark.parametrize(("bits", "target"), [(1.58, "q4_1"), (2, "q4_1"), (3, "q4_1"), (4, "q4_1"), (4, "q5_1"), (5, "q5_1")])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_hqqs_codes_go_over_with_the_zero_point_in_the_minimum(bits: float, target: str, group_size: int) -> None:
    tensor = hqq_coded(bits, group_size)
    out, _ = conversions.convert(tensor, Scheme.of(target))
    codes, params = unpack_blocks(out.parts["blocks"], target, IN_FEATURES)
    assert torch.equal(codes.to(torch.uint8), tensor.parts["codes"])
    assert torch.equal(params["d"], tensor.parts["scale"].view(24, -1).repeat_interleave(group_size // 32, 1))
    exact = (tensor.parts["codes"].view(-1, group_size) - tensor.parts["zero"].float()[:, None]) * tensor.parts["scale"].float()[:, None]
    torch.testing.assert_close(conversions.decode(out), exact.view(24, -1), rtol=0, atol=float(exact.abs().max()) * 2**-10)


@pytest.mark.parametrize(
    ("bits", "group_size", "axis", "target"),
    [(5, 64, 1, "q4_1"), (8, 64, 1, "q5_1"), (4, 16, 1, "q4_1"), (4, 64, 0, "q4_1"), (4, 64, 1, "q4_0")],
)
def test_hqqs_codes_stay_behind_where_there_is_no_place_for_them(bits: float, group_size: int, axis: int, target: str) -> None:
    assert conversions.exactness(hqq_coded(bits, group_size, axis).scheme, Scheme.of(target), IN_FEATURES) is None


def nvfp4_with(global_scale: float, sign: int = 0) -> QuantizedTensor:
    tensor = rtn.quantize(weights(), known("nvfp4"))
    scale = (tensor.parts["scale"].view(torch.uint8) | sign).view(torch.float8_e4m3fn)
    return replace(tensor, parts={**tensor.parts, "scale": scale, "global_scale": torch.tensor([global_scale])})


def test_nvfp4_goes_over_exactly_where_the_reciprocal_of_its_global_scale_is_a_float() -> None:
    target = known("ggml_nvfp4-scaled")
    for global_scale, is_exact in ((64.0, True), (70.7, False)):
        tensor = nvfp4_with(global_scale)
        out, said = conversions.convert(tensor, target)
        assert said == is_exact
        torch.testing.assert_close(conversions.decode(out), conversions.decode(tensor), rtol=3e-7, atol=0)


def test_nvfp4_with_a_negative_scale_is_refused() -> None:
    with pytest.raises(NumericsError, match="negative or no number"):
        conversions.convert(nvfp4_with(64.0, sign=128), known("ggml_nvfp4-scaled"))


class Nibbles(QType):
    """A made-up number format: symmetric 4 bits and a float32 scale for each 16 inputs."""

    name = "nibbles"
    takes_groups = True

    def layout(self, shape: tuple[int, ...], scheme: Scheme) -> dict[str, TensorSpec]:
        n_groups = shape[1] // 16
        return {"k": TensorSpec.dense("k", "I8", shape), "d": TensorSpec.dense("d", "F32", (shape[0], n_groups))}

    def fit(self, W: Tensor, scheme: Scheme, importance: Tensor | None = None, *, fused: Parts | None = None) -> Grid:
        return Grid(W.view(len(W), -1, 16).abs().amax(2).clamp_min(1e-9) / 7, None, -8, 7, 16)

    def pack(self, codes: Tensor, grid: Grid, scheme: Scheme) -> QuantizedTensor:
        return QuantizedTensor(scheme, tuple(codes.shape), {"k": codes.to(torch.int8), "d": grid.scale})

    def unpack(self, tensor: QuantizedTensor) -> Tensor:
        return tensor.parts["k"].float() * tensor.parts["d"].repeat_interleave(16, 1)

    def affine(self, scheme: Scheme) -> Affine:
        return Affine(-8, 7, 16, "F32")

    def integers(self, tensor: QuantizedTensor) -> AffineCodes:
        return AffineCodes(tensor.parts["k"].to(torch.int16), tensor.parts["d"])

    def relatives(self, scheme: Scheme) -> Iterator[Scheme]:
        yield Scheme.parse("int4-g16-sym-sf32")

    def holds(self, source: Scheme, target: Scheme, in_features: int) -> str | None:
        have = qtypes.of(source.qtype).affine(source)
        fits = have is not None and have.zeros == "none" and have.lo >= -8 and have.hi <= 7 and divides(16, have.group_size, in_features)
        return conversions.EXACT if fits else None

    def take(self, tensor: QuantizedTensor, target: Scheme) -> QuantizedTensor:
        have = qtypes.of(tensor.scheme.qtype).integers(tensor)
        scale = have.scale.float().repeat_interleave(have.k.shape[1] // 16 // have.scale.shape[1], 1)
        return QuantizedTensor(target, tuple(have.k.shape), {"k": have.k.to(torch.int8), "d": scale})


class EightBytes(Nibbles):
    """The same in eight bytes each, under a name that comes before those of all shorter types."""

    name = "a_wide_one"

    def layout(self, shape: tuple[int, ...], scheme: Scheme) -> dict[str, TensorSpec]:
        return {"k": TensorSpec.dense("k", "F64", shape)}


def made_up_types(monkeypatch: pytest.MonkeyPatch, *types: QType) -> None:
    known_of, known_names, by_name = qtypes.of, qtypes.names(), {made.name: made for made in types}
    monkeypatch.setattr(qtypes, "of", lambda name: by_name.get(name) or known_of(name))
    monkeypatch.setattr("quantcli.tensors.options_of", lambda name: {} if name in by_name else known_of(name).options)
    monkeypatch.setattr(qtypes, "names", lambda: tuple(sorted((*known_names, *by_name))))


def test_the_shorter_type_is_tried_first_whatever_the_names(monkeypatch: pytest.MonkeyPatch) -> None:
    made_up_types(monkeypatch, EightBytes())
    order = [scheme.qtype for scheme in conversions.candidates(Scheme.parse("int4-g32-sym"))]
    assert order[-6:] == ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "a_wide_one"]


def test_a_new_number_format_that_converts_is_one_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else knows of it: not the conversions, nor the formats that it converts to and from."""
    nibbles = Nibbles()
    made_up_types(monkeypatch, nibbles)
    made_up, int4 = Scheme.of("nibbles"), Scheme.parse("int4-g16-sym-sf32")
    assert made_up in set(conversions.candidates(Scheme.parse("int4-g32-sym")))
    assert int4 in set(conversions.candidates(made_up))
    tensor = nibbles.encode(weights(), made_up)
    out, is_exact = conversions.convert(tensor, int4)
    assert is_exact
    assert conversions.exactness(made_up, int4, 256) == conversions.EXACT
    rounded = rtn.quantize(weights(), Scheme.parse("int4-g32-sym"))
    taken, is_exact = conversions.convert(rounded, made_up)
    assert is_exact
    assert torch.equal(conversions.decode(taken), conversions.decode(rounded))
    again, is_exact = conversions.convert(out, made_up)
    assert is_exact
    assert torch.equal(again.parts["k"], tensor.parts["k"])
    assert conversions.exactness(made_up, Scheme.parse("q4_0"), 256) is None  # whose blocks are of 32
    assert conversions.exactness(Scheme.parse("int8-g32-sym"), made_up, 256) is None
