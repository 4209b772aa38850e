"""GPTQ against the slow truth: OBQ with an explicit inverse, in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quantcli import qtypes
from quantcli.errors import NumericsError, RecipeError
from quantcli.passes import gptq, rtn
from quantcli.recipe import PassSpec
from quantcli.tensors import Layer, Scheme, Stats, relative_error
from support.oracles import gptaq, obq

SCHEMES = ["int4-g32-sym", "int4-g32-asym", "int3-g64-sym", "int2-channel-asym", "int8-g32-sym"]


def problem(n_out: int = 24, n_in: int = 64, seed: int = 0, n_tokens: int = 512) -> tuple[Tensor, Tensor]:
    """W [out, in] and H [in, in] of correlated inputs with a few loud channels."""
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(n_out, n_in, generator=g)
    mixing = torch.randn(n_in, n_in, generator=g) / n_in**0.5 + torch.diag(torch.rand(n_in, generator=g) * 2)
    X = torch.randn(n_tokens, n_in, generator=g) @ mixing
    X[:, :3] *= 5
    return W, X.T @ X / n_tokens


def stats_of(H: Tensor) -> Stats:
    d = H.diagonal()
    return Stats(importance=d, absmax=d.sqrt(), mean=torch.zeros_like(d), n_tokens=512, H=H)


def decode(tensor: object) -> Tensor:
    return qtypes.of(tensor.scheme.qtype).unpack(tensor)


def quantize(W: Tensor, H: Tensor, scheme: str, **options: object) -> Tensor:
    chosen = gptq.Options(**{"sweeps": 0} | options)
    factor = gptq.factorize(H, damp_ratio=chosen.damp_ratio, act_order=chosen.act_order)
    return decode(gptq.quantize(W, Scheme.parse(scheme), H, factor, chosen))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("seed", [0, 1])
def test_gptq_equals_obq_with_an_explicit_inverse(scheme: str, act_order: bool, seed: int) -> None:
    W, H = problem(seed=seed)
    W_hat = quantize(W, H, scheme, act_order=act_order)
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(len(H))
    grid = qtypes.of("int").fit(W, Scheme.parse(scheme), damped.diagonal())
    scale, offset = grid.columns(torch.arange(W.shape[1]))

    def encode_decode(q: int, w: Tensor) -> Tensor:
        o = 0.0 if offset is None else offset[:, q].double()
        return ((w - o) / scale[:, q].double()).round().clamp(grid.lo, grid.hi) * scale[:, q].double() + o

    order = H.diagonal().argsort(descending=True, stable=True).tolist() if act_order else range(W.shape[1])
    truth = obq(W, damped, encode_decode, list(order))
    torch.testing.assert_close(W_hat.double(), truth, rtol=0, atol=1e-5)


def drifted(n_in: int = 64, seed: int = 0, size: float = 0.2) -> tuple[Tensor, Tensor, Tensor]:
    """W [24, in], inputs X [n_tokens, in], and X₀, which X was before something moved it by about ``size`` of itself, not at random."""
    W, _ = problem(n_in=n_in, seed=seed)
    g = torch.Generator().manual_seed(seed + 100)
    X0 = torch.randn(512, n_in, generator=g) @ (torch.randn(n_in, n_in, generator=g) / n_in**0.5)
    return W, X0 + size * X0 @ (torch.randn(n_in, n_in, generator=g) / n_in**0.5), X0


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("alpha", [0.25, 1.0])
def test_asymmetric_calibration_equals_its_update_with_explicit_inverses(scheme: str, act_order: bool, alpha: float) -> None:
    W, X, X0 = drifted()
    H, dXXT = X.T @ X / len(X), (X0 - X).T @ X / len(X)
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(len(H))
    grid = qtypes.of("int").fit(W, Scheme.parse(scheme), damped.diagonal())
    scale, offset = grid.columns(torch.arange(W.shape[1]))

    def encode_decode(q: int, w: Tensor) -> Tensor:
        o = 0.0 if offset is None else offset[:, q].double()
        return ((w - o) / scale[:, q].double()).round().clamp(grid.lo, grid.hi) * scale[:, q].double() + o

    order = H.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(len(H))
    truth = gptaq(W, damped, dXXT, alpha, encode_decode, order.tolist())
    factor = gptq.asymmetric(gptq.factorize(H, damp_ratio=0.01, act_order=act_order), dXXT, alpha)
    torch.testing.assert_close(
        decode(gptq.quantize(W, Scheme.parse(scheme), H, factor, gptq.Options(sweeps=0))).double(), truth, rtol=0, atol=1e-5
    )


def test_asymmetric_calibration_brings_the_output_nearer_to_that_of_the_original_inputs() -> None:
    W, X, X0 = drifted(n_in=128)
    stats = replace(stats_of(X.T @ X / len(X)), dXXT=(X0 - X).T @ X / len(X))
    errors = []
    for alpha in (0.0, 0.25, 1.0):
        layer = Layer("l", {"a": W}, {"a": Scheme.parse("int4-g32-sym")}, {"a": "tap"})
        gptq.PASS.run(layer, {"tap": stats}, gptq.Options(gptaq_alpha=alpha))
        errors.append(float((X @ decode(layer.quantized["a"]).T - X0 @ W.T).square().sum()))
    assert errors[2] < 0.9 * errors[1] < 0.9 * errors[0]


def test_without_a_difference_asymmetric_calibration_is_gptq() -> None:
    W, H = problem()
    factor = gptq.factorize(H, damp_ratio=0.01)
    asymmetric = gptq.asymmetric(factor, torch.zeros_like(H), 1.0)
    scheme = Scheme.parse("int4-g32-sym")
    assert torch.equal(decode(gptq.quantize(W, scheme, H, asymmetric)), decode(gptq.quantize(W, scheme, H, factor)))


def test_only_asymmetric_calibration_needs_a_second_walk() -> None:
    assert PassSpec("gptq").needs == {"H"}
    assert PassSpec("gptq", {"gptaq_alpha": 0.25}).needs == {"H", "dXXT"}


@pytest.mark.parametrize("chunk", [1, 7, 32, 64, 1000])
def test_the_chunk_size_changes_nothing(chunk: int) -> None:
    W, H = problem(n_in=96)
    assert torch.equal(quantize(W, H, "int4-g32-sym", chunk=chunk), quantize(W, H, "int4-g32-sym", chunk=128))


@pytest.mark.parametrize(
    "scheme",
    [
        *SCHEMES[:4],
        "q4_0",
        "q4_1",
        "q5_0",
        "q5_1",
        "q8_0",
        "q4_k",
        "q5_k",
        "q6_k",
        "q2_k",
        "q3_k",
        "iq4_nl",
        "iq4_xs",
        "ggml_mxfp4",
        "ggml_nvfp4",
        "tq1_0",
        "tq2_0",
    ],
)
def test_gptq_beats_rounding_to_nearest_on_every_grid(scheme: str) -> None:
    W, H = problem(n_in=256)
    parsed = Scheme.parse(scheme)
    nearest = relative_error(W, decode(rtn.quantize(W, parsed, H.diagonal())), H)
    assert relative_error(W, quantize(W, H, scheme), H) < 0.8 * nearest


@pytest.mark.parametrize("scheme", ["int4-g128-sym", "int3-g64-sym", "int3-g128-asym", "int2-g64-asym"])
def test_the_searched_grid_is_the_default_and_better_than_gptqs_own(scheme: str) -> None:
    assert Scheme.parse(scheme).option("search") == "mse"
    searched, own = (sum(relative_error(W, quantize(W, H, f"{scheme}{word}"), H) for W, H in map(at, range(4))) for word in ("", "-minmax"))
    assert searched < 0.95 * own


def at(seed: int) -> tuple[Tensor, Tensor]:
    return problem(n_out=64, n_in=128, seed=seed)


def test_uncorrelated_inputs_leave_nothing_to_compensate() -> None:
    W, _ = problem()
    H = torch.diag(torch.linspace(0.5, 2, W.shape[1]))
    factor = gptq.factorize(H, damp_ratio=0.01)
    importance = H.diagonal() + 0.01 * H.diagonal().mean()
    grid = qtypes.of("int").fit(W, Scheme.parse("int4-g32-sym"), importance)
    assert torch.equal(gptq.solve(W, grid, factor), grid.encode(W))


def test_dead_inputs_are_rounded_to_nearest_and_reported() -> None:
    W, H = problem()
    H[5] = H[:, 5] = 0
    layer = Layer("l", {"a.weight": W}, {"a.weight": Scheme.parse("int4-g32-sym")}, {"a.weight": "a"})
    report = gptq.PASS.run(layer, {"a": stats_of(H)})
    assert "1 of 64 inputs were never active" in report.tensors[0].notes[0]
    W_hat = decode(layer.quantized["a.weight"])
    scale = layer.quantized["a.weight"].parts["scale"].float()[:, 0]
    assert ((W - W_hat)[:, 5].abs() <= scale / 2 + 1e-6).all() or (W[:, 5].abs() > 7 * scale).any()


def test_dynamic_order_stores_the_group_of_every_input_and_helps() -> None:
    W, H = problem(n_in=128)
    W[:, :3] *= 4
    scheme = Scheme.parse("int3-g32-sym").with_options(desc_act=True)
    factor = gptq.factorize(H, damp_ratio=0.01)
    tensor = gptq.quantize(W, scheme, H, factor)
    g_idx = tensor.parts["g_idx"]
    assert g_idx.tolist() == (factor.order.argsort() // 32).tolist()
    assert relative_error(W, decode(tensor), H) < relative_error(W, decode(rtn.quantize(W, Scheme.parse("int3-g32-sym"))), H)


def test_linears_of_one_tap_share_the_factor_and_agree_with_each_alone() -> None:
    W, H = problem()
    V, _ = problem(n_out=8, seed=3)
    scheme = Scheme.parse("int4-g32-asym")
    both = Layer("l", {"a": W, "b": V}, dict.fromkeys("ab", scheme), dict.fromkeys("ab", "tap"))
    gptq.PASS.run(both, {"tap": stats_of(H)})
    for name, weight in (("a", W), ("b", V)):
        assert torch.equal(decode(both.quantized[name]), quantize(weight, H, "int4-g32-asym", sweeps=gptq.Options().sweeps))


def test_the_upper_factor_squares_to_the_inverse() -> None:
    _, H = problem()
    H = H.double()
    order = torch.randperm(len(H), generator=torch.Generator().manual_seed(0))
    U = gptq.upper_factor(H, order, 0.5)
    assert U is not None
    assert torch.equal(U, U.triu())
    damped = (H + 0.5 * torch.eye(len(H), dtype=H.dtype))[order][:, order]
    torch.testing.assert_close(U.T @ U, torch.linalg.inv(damped), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("n", [1, 100, 128, 129, 700])
def test_the_factor_by_panels_is_a_cholesky_factor_with_any_number_of_threads(n: int) -> None:
    X = torch.randn(n, 2 * n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    H = X @ X.T / n + 0.1 * torch.eye(n, dtype=X.dtype)
    factors = []
    n_threads = torch.get_num_threads()
    for k in (1, 2):
        torch.set_num_threads(k)
        A = H.float()
        assert gptq.cholesky_(A)
        factors.append(A.tril())
    torch.set_num_threads(n_threads)
    assert torch.equal(*factors)
    A = H.clone()
    assert gptq.cholesky_(A)
    torch.testing.assert_close(A.tril(), torch.linalg.cholesky(H), rtol=1e-10, atol=1e-10)
    H[n // 2, n // 2] = -1
    assert not gptq.cholesky_(H)


def test_damping_is_raised_and_reported_when_h_is_not_positive_definite() -> None:
    W, H = problem()
    H -= 0.05 * H.diagonal().mean() * torch.eye(len(H))
    H -= torch.linalg.eigvalsh(H)[0].clamp(min=0) * torch.eye(len(H))
    layer = Layer("l", {"a": W}, {"a": Scheme.parse("int4-g32-sym")}, {"a": "tap"})
    report = gptq.PASS.run(layer, {"tap": stats_of(H)})
    assert any("damping raised" in note for note in report.tensors[0].notes)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda H: H.fill_(float("nan")), "NaN or Inf"),
        (lambda H: H.copy_(-torch.eye(len(H)) * 1e3 + torch.diag(torch.full((len(H),), 1001.0))).sub_(50.0), "not positive definite"),
    ],
)
def test_a_hopeless_hessian_is_an_error_that_names_the_tap(spoil: object, words: str) -> None:
    W, H = problem()
    spoil(H)
    layer = Layer("l", {"a": W}, {"a": Scheme.parse("int4-g32-sym")}, {"a": "layers.3.mlp.down_proj"})
    with pytest.raises(NumericsError, match=words) as error:
        gptq.PASS.run(layer, {"layers.3.mlp.down_proj": stats_of(H)})
    assert "layers.3.mlp.down_proj" in str(error.value)


@pytest.mark.parametrize("scheme", ["int4-g32-sym", "int4-g32-sym-desc", "q4_0"])
def test_a_tap_of_zeros_is_rounded_to_nearest_and_says_why(scheme: str) -> None:
    W, H = problem()
    layer = Layer("l", {"a": W}, {"a": Scheme.parse(scheme)}, {"a": "tap"})
    (report,) = gptq.PASS.run(layer, {"tap": replace(stats_of(H.zero_()), n_tokens=7)}).tensors
    assert torch.equal(decode(layer.quantized["a"]), decode(rtn.quantize(W, Scheme.parse(scheme))))
    assert report.notes == ("its inputs were zero on every calibration token: rounded to nearest by its weights alone",)
    assert report.relative_error == pytest.approx(rtn.weight_error(W, layer.quantized["a"]), rel=1e-4)


def test_missing_statistics_are_an_error() -> None:
    W, H = problem()
    layer = Layer("l", {"a": W}, {"a": Scheme.parse("int4-g32-sym")}, {"a": "tap"})
    with pytest.raises(RecipeError, match="no statistics for its tap 'tap'"):
        gptq.PASS.run(layer, {"other": stats_of(H)})


def test_statistics_of_another_width_are_those_of_another_model() -> None:
    W, H = problem()
    layer = Layer("l", {"a": W}, {"a": Scheme.parse("int4-g32-sym")}, {"a": "tap"})
    with pytest.raises(RecipeError, match="a: reads 64 inputs, the statistics of its tap 'tap' are of 32"):
        gptq.PASS.run(layer, {"tap": stats_of(H[:32, :32])})


@pytest.mark.parametrize("options", [{"damp_ratio": 0}, {"damp_ratio": 2}, {"chunk": 0}, {"gptaq_alpha": -0.1}, {"gptaq_alpha": 2.0}])
def test_senseless_options_are_refused(options: dict) -> None:
    with pytest.raises(RecipeError):
        gptq.Options(**options)
