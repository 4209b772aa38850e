"""SmoothQuant against the slow truth: scales one by one, expected errors next to outputs computed from rounded inputs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quantcli import qtypes
from quantcli import recipe as recipes
from quantcli.errors import RecipeError
from quantcli.formats import open_checkpoint
from quantcli.ops import round_inputs
from quantcli.passes import rtn, smoothquant
from quantcli.passes.shared import basis
from quantcli.planning import plan as planning
from quantcli.planning.arrange import arrange
from quantcli.tensors import Absorber, Layer, Scheme, Stats
from support.tiny_models import TinyLlama

W8A8 = Scheme.parse("int8-channel-sym+int8-token")
STATIC = Scheme.parse("int8-channel-sym+int8-tensor")


def problem(seed: int = 0, n_tokens: int = 512, loud: float = 40.0) -> tuple[Tensor, Tensor]:
    """W [48, 64] and inputs X [n_tokens, 64], some of whose channels are ``loud``."""
    g = torch.Generator().manual_seed(seed)
    W, X = torch.randn(48, 64, generator=g), torch.randn(n_tokens, 64, generator=g)
    X[:, ::17] *= loud
    return W, X


def stats_of(X: Tensor) -> Stats:
    return Stats(X.square().mean(0), X.abs().amax(0), X.mean(0), len(X), X.T @ X / len(X))


def layer_of(W: Tensor, scheme: Scheme, absorber: str = "norm.weight") -> Layer:
    tensors = {"a.weight": W, "norm.weight": torch.ones(64), "v.weight": torch.eye(64)}
    return Layer("l", tensors, {"a.weight": scheme}, {"a.weight": "a"}, absorbers={"a": Absorber((absorber,), torch.arange(64))})


def true_error(W: Tensor, X: Tensor, s: Tensor, scheme: Scheme) -> float:
    """Mean over tokens of the squared output error, weights and inputs rounded as the engine does."""
    qtype, act = qtypes.of(scheme.qtype), str(scheme.get("act"))
    W_hat = qtype.unpack(rtn.quantize(W * s, scheme, X.square().mean(0) / s.square()))
    scale = ((X / s).abs().max() / 127).reshape(1) if scheme.static_activations else None
    return float((round_inputs(X / s, act, scale) @ W_hat.T - X @ W.T).square().sum(1).mean())


def test_scales_are_those_of_the_paper_one_by_one() -> None:
    W, X = problem()
    X[:, 5] = 0
    layer = layer_of(W.clone(), W8A8)
    smoothquant.PASS.run(layer, {"a": stats_of(X)}, smoothquant.Options(alpha=0.75))
    for j in range(64):
        s = 1.0 if j == 5 else float(X[:, j].abs().max()) ** 0.75 / float(W[:, j].abs().max()) ** 0.25
        assert float(layer.scales["a"][j]) == pytest.approx(s, rel=1e-5)
        torch.testing.assert_close(layer.tensors["a.weight"][:, j], W[:, j] * s)
        assert float(layer.tensors["norm.weight"][j]) == pytest.approx(1 / s, rel=1e-5)


def test_heads_that_share_a_value_share_its_scale() -> None:
    W, X = problem()
    absorber = Absorber(("v.weight",), torch.arange(32).view(2, 16).repeat_interleave(2, 0).flatten())
    layer = Layer("l", {"a.weight": W, "v.weight": torch.randn(32, 8)}, {"a.weight": W8A8}, {"a.weight": "a"}, absorbers={"a": absorber})
    alpha, s = smoothquant.scales(layer, "a", {"a": stats_of(X)}, 0.5)
    assert alpha == 0.5
    for j in range(64):
        twins = (absorber.channel == absorber.channel[j]).nonzero().flatten()
        assert float(s[j]) == pytest.approx(float(X[:, twins].abs().max()) ** 0.5 / float(W[:, twins].abs().max()) ** 0.5, rel=1e-5)


def test_experts_behind_one_norm_share_the_largest_magnitudes_of_all() -> None:
    (W0, X0), (W1, X1) = problem(0), problem(1, loud=90.0)
    absorber = Absorber(("norm.weight",), torch.arange(64), readers={"0.weight": "0", "1.weight": "1"})
    tensors = {"0.weight": W0.clone(), "1.weight": W1.clone(), "norm.weight": torch.ones(64)}
    layer = Layer(
        "l", tensors, {"0.weight": W8A8}, dict(absorber.readers), absorbers=dict.fromkeys("01", absorber), deferred={"1.weight": W8A8}
    )
    report = smoothquant.PASS.run(layer, {"0": stats_of(X0), "1": stats_of(X1)}, smoothquant.Options(alpha=0.5)).tensors
    s = torch.cat([X0, X1]).abs().amax(0).sqrt() / torch.cat([W0, W1]).abs().amax(0).sqrt()
    assert [r.settings for r in report] == [{"smoothquant_alpha": 0.5}]
    for name, W in (("0.weight", W0), ("1.weight", W1)):
        torch.testing.assert_close(layer.tensors[name], W * s)
    assert layer.scales.keys() == {"0", "1"}


def test_the_expected_error_of_static_inputs_is_the_error() -> None:
    for seed in range(3):
        W, X = problem(seed)
        for s in (torch.ones(64), smoothquant.input_scales(X.abs().amax(0), W.abs().amax(0), 0.5)):
            expected = float(smoothquant.expected_error({STATIC: [W]}, s, stats_of(X)))
            assert expected == pytest.approx(true_error(W, X, s, STATIC), rel=0.15)


@pytest.mark.parametrize("scheme", [W8A8, STATIC, Scheme.parse("int4-g32-sym+int8-token")])
@pytest.mark.parametrize("seed", range(3))
def test_the_alpha_found_is_nearly_the_best_on_the_inputs_themselves(scheme: Scheme, seed: int) -> None:
    W, X = problem(seed)
    absmax, largest = X.abs().amax(0), W.abs().amax(0)
    errors = [true_error(W, X, smoothquant.input_scales(absmax, largest, alpha), scheme) for alpha in smoothquant.ALPHAS]
    plain = true_error(W, X, torch.ones(64), scheme)
    _, s = smoothquant.search([basis.Read({scheme: [W]}, stats_of(X))], absmax, largest)
    assert true_error(W, X, s, scheme) <= min(1.15 * min(errors), plain)


def test_even_inputs_of_even_weights_keep_their_basis_without_rounded_activations() -> None:
    W, X = torch.ones(8, 64), torch.ones(16, 64)
    layer = layer_of(W, Scheme.parse("int8-channel-sym"))
    report = smoothquant.PASS.run(layer, {"a": stats_of(X)}).tensors[0]
    assert report.settings == {"smoothquant_alpha": 0.0}
    assert not layer.scales


def test_linears_take_scales_over_only_when_told() -> None:
    W, X = problem()
    for linears in (True, False):
        layer = layer_of(W, W8A8, absorber="v.weight")
        smoothquant.PASS.run(layer, {"a": stats_of(X)}, smoothquant.Options(linears=linears))
        assert bool(layer.scales) == linears


def test_a_tap_that_nothing_can_absorb_is_reported() -> None:
    W, X = problem()
    layer = layer_of(W, W8A8)
    layer.absorbers.clear()
    assert "can absorb a scale" in smoothquant.PASS.run(layer, {"a": stats_of(X)}).tensors[0].notes[0]


@pytest.mark.parametrize("alpha", [-0.1, 1.5, "much", None])
def test_an_alpha_that_is_no_share_is_refused(alpha: object) -> None:
    with pytest.raises(RecipeError, match="alpha is a share"):
        smoothquant.Options(alpha=alpha)


def test_the_automatic_alpha_needs_h_and_a_given_one_does_not() -> None:
    W, X = problem()
    diagonal = replace(stats_of(X), H=None)
    smoothquant.PASS.run(layer_of(W, W8A8), {"a": diagonal}, smoothquant.Options(alpha=0.5))
    with pytest.raises(RecipeError, match="needs the Hessian"):
        smoothquant.PASS.run(layer_of(W, W8A8), {"a": diagonal})


def test_the_basis_serves_any_pass_after_it() -> None:
    W, X = problem()
    layer = layer_of(W, W8A8)
    smoothquant.PASS.run(layer, {"a": stats_of(X)})
    s = layer.scales["a"].float()
    stats = basis.rescaled(stats_of(X), layer.scales["a"])
    rtn.PASS.run(layer, {"a": stats})
    assert not torch.equal(layer.tensors["a.weight"], W)
    W_hat = qtypes.of("int").unpack(layer.quantized["a.weight"])
    assert float(((W_hat / s - W) @ X.T).square().mean()) < 1e-2 * float((W @ X.T).square().mean())


@pytest.mark.parametrize(
    ("change", "words"),
    [({"passes": ["smoothquant"]}, "chooses no codes; put rtn or gptq"), ({"true_sequential": True}, "a whole layer at once")],
)
def test_a_recipe_that_cannot_work_is_refused_in_the_plan(tiny_llama: TinyLlama, change: dict, words: str) -> None:
    recipe = recipes.load("smoothquant-w8a8")
    wrong = recipes.parse({**recipe.to_dict(), **change}, "wrong")
    with open_checkpoint(str(tiny_llama())) as source, pytest.raises(RecipeError, match=words):
        planning.make(arrange(source, wrong, run=False), wrong)
