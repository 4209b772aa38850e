"""AWQ against the slow truth: losses from outputs token by token, scales and clipping tried one by one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from quantcli import qtypes
from quantcli.calibration.data import Windows
from quantcli.errors import RecipeError
from quantcli.formats import open_checkpoint
from quantcli.passes import awq, gptq, rtn
from quantcli.passes.shared import basis
from quantcli.planning.arrange import open_forward
from quantcli.tensors import Absorber, Layer, Scheme, Stats, output_error, relative_error
from support.runs import run
from support.tiny_models import TinyLlama

ASYM = Scheme.parse("int4-g32-asym")


def problem(n_out: int = 24, n_in: int = 64, seed: int = 0, n_tokens: int = 256) -> tuple[Tensor, Tensor]:
    """W [out, in] and inputs X [n_tokens, in], correlated and with a few loud channels."""
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(n_out, n_in, generator=g)
    mixing = torch.randn(n_in, n_in, generator=g) / n_in**0.5 + torch.diag(torch.rand(n_in, generator=g) * 2)
    X = torch.randn(n_tokens, n_in, generator=g) @ mixing
    X[:, ::13] *= 12
    return W, X


def stats_of(X: Tensor) -> Stats:
    return Stats(X.square().mean(0), X.abs().amax(0), X.mean(0), len(X), X.T @ X / len(X))


def layer_of(W: Tensor, scheme: Scheme = ASYM, norm_dtype: torch.dtype = torch.float32) -> Layer:
    """One linear behind a norm."""
    norm = torch.linspace(0.5, 1.5, W.shape[1]).to(norm_dtype)
    absorber = Absorber(("norm.weight",), torch.arange(W.shape[1]))
    return Layer("l", {"a.weight": W, "norm.weight": norm}, {"a.weight": scheme}, {"a.weight": "a"}, absorbers={"a": absorber})


def decode(layer: Layer, name: str = "a.weight") -> Tensor:
    return qtypes.of(layer.schemes[name].qtype).unpack(layer.quantized[name])


def output_loss(W: Tensor, X: Tensor, s: Tensor, scheme: Scheme) -> float:
    """The paper's: run the module with the scaled, rounded weights on the divided inputs, and compare outputs token by token."""
    W_hat = rtn_of(W * s, scheme, X.square().mean(0) / s.square()).double()
    total = 0.0
    for x in X.double().split(64):
        total += float((x @ W.double().T - (x / s) @ W_hat.T).square().sum())
    return total / len(X)


def rtn_of(W: Tensor, scheme: Scheme, importance: Tensor) -> Tensor:
    return qtypes.of(scheme.qtype).unpack(rtn.quantize(W, scheme, importance))


@pytest.mark.parametrize("scheme", ["int4-g32-asym", "int3-g64-sym", "q4_0", "q4_1", "nf4-b64"])
def test_the_loss_from_h_is_the_loss_of_the_modules_output(scheme: str) -> None:
    W, X = problem()
    stats, parsed = stats_of(X), Scheme.parse(scheme)
    s = torch.rand(64, generator=torch.Generator().manual_seed(5)) + 0.5
    loss = float(basis.rounding_error({parsed: [W, W[:8]]}, s, stats.importance, stats.H))
    assert loss == pytest.approx(output_loss(W, X, s, parsed) + output_loss(W[:8], X, s, parsed), rel=1e-4)


@pytest.mark.parametrize("n", [1, 255, 256, 700])
def test_an_output_error_is_taken_from_the_upper_blocks_of_h(n: int) -> None:
    E, X = problem(n_out=9, n_in=n)
    H = X.T @ X / len(X)
    expected = float((X.double() @ E.T.double()).square().sum() / len(X))
    assert float(output_error(E, H)) == pytest.approx(expected, rel=1e-5)
    H[256:, :256] = torch.nan
    assert float(output_error(E, H)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("seed", range(6))
def test_the_search_finds_the_ratio_that_a_search_on_the_modules_outputs_finds(seed: int) -> None:
    W, X = problem(seed=seed)
    absorber = layer_of(W).absorbers["a"]
    scales = [awq.input_scales(X.square().mean(0), absorber, i / 20) for i in range(20)]
    direct = [output_loss(W, X, s, ASYM) for s in scales]
    found = awq.search([basis.Read({ASYM: [W]}, stats_of(X))], absorber)
    assert found.ratio > 0
    assert direct[round(found.ratio * 20)] <= 1.0001 * min(direct)
    assert found.loss == pytest.approx(direct[round(found.ratio * 20)] / direct[0], rel=1e-3)


def test_on_a_model_the_ratios_are_those_of_a_search_on_what_its_modules_put_out(tiny_llama: TinyLlama) -> None:
    """Every tap of a layer: all its linears run on the inputs they truly read, scaled, rounded and divided back, ratio by ratio."""
    ids = torch.randint(512, (8, 32), generator=torch.Generator().manual_seed(0))
    inputs: dict[str, list[Tensor]] = {}
    with open_checkpoint(str(tiny_llama(layers=1, hidden=64, intermediate=128))) as source:
        forward = open_forward(source)
        with forward.layer(0) as layer:
            layer.observe(forward.embed(ids), ids, lambda tap, X: inputs.setdefault(tap, []).append(X.clone()))
        weights = {tap: [source.read(name).float() for name, read in forward.taps.items() if read == tap] for tap in inputs}
    assert len(weights) == 4
    for tap, Ws in weights.items():
        X = torch.cat(inputs[tap])
        absorber = Absorber(("",), torch.arange(X.shape[1]))
        scales = [awq.input_scales(X.square().mean(0), absorber, i / 20) for i in range(20)]
        direct = [sum(output_loss(W, X, s, ASYM) for W in Ws) for s in scales]
        found = awq.search([basis.Read({ASYM: Ws}, stats_of(X))], absorber)
        assert direct[round(found.ratio * 20)] <= 1.0001 * min(direct), tap


def test_without_scales_and_clipping_awq_is_rtn_bit_for_bit() -> None:
    W, X = problem()
    layer = layer_of(W)
    awq.PASS.run(layer, {"a": stats_of(X)}, awq.Options(n_grid=1, clip=False))
    expected = rtn.quantize(W, ASYM, X.square().mean(0))
    assert all(torch.equal(layer.quantized["a.weight"].parts[part], tensor) for part, tensor in expected.parts.items())
    assert torch.equal(layer.tensors["norm.weight"], torch.linspace(0.5, 1.5, 64))
    assert not layer.scales


@pytest.mark.parametrize("scheme", ["int4-g32-asym", "int4-g64-sym", "int3-g32-sym", "q4_1"])
def test_clipping_takes_the_best_multiple_of_each_groups_scale(scheme: str) -> None:
    W, X = problem(n_out=6)
    parsed = Scheme.parse(scheme)
    qtype = qtypes.of(parsed.qtype)
    grid = qtype.fit(W, parsed, X.square().mean(0))
    chosen = awq.clipped(W, grid, parsed, stats_of(X).H)
    size = grid.group_size

    def group_losses(candidate: Tensor) -> dict[tuple[int, int], float]:
        losses = {}
        for row in range(len(W)):
            for group in range(W.shape[1] // size):
                inputs = slice(group * size, (group + 1) * size)
                losses[row, group] = float(((W - candidate)[row, inputs].double() @ X[:, inputs].T.double()).square().mean())
        return losses

    best = group_losses(grid.decode(grid.encode(W)))
    for factor in awq.CLIP_FACTORS:
        moved = qtype.moved(grid, grid.scale * factor, None if grid.offset is None else grid.offset * factor, parsed)
        best = {key: min(best[key], loss) for key, loss in group_losses(moved.decode(moved.encode(W))).items()}
    found = group_losses(chosen.decode(chosen.encode(W)))
    assert found == pytest.approx(best, rel=1e-3)


def test_scales_and_clipping_each_lower_the_error() -> None:
    W, X = problem(n_out=64)
    errors = {}
    for name, options in {
        "rtn": awq.Options(n_grid=1, clip=False),
        "scales": awq.Options(clip=False),
        "clip": awq.Options(n_grid=1),
        "both": awq.Options(),
    }.items():
        layer = layer_of(W)
        errors[name] = awq.PASS.run(layer, {"a": stats_of(X)}, options).tensors[0].relative_error
        s = layer.scales.get("a", torch.ones(64)).float()
        assert errors[name] == pytest.approx(relative_error(W, decode(layer) / s, stats_of(X).H), rel=1e-3)
    assert errors["both"] < errors["clip"] < errors["rtn"]
    assert errors["both"] < errors["scales"] < errors["rtn"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_norm_keeps_its_dtype_and_the_weights_make_up_for_its_rounding(dtype: torch.dtype) -> None:
    W, X = problem()
    layer = layer_of(W.double(), norm_dtype=dtype)
    before = layer.tensors["norm.weight"].double() * layer.tensors["a.weight"]
    s = awq.input_scales(X.square().mean(0), layer.absorbers["a"], 0.5)
    folded = basis.fold(layer, "a", s)
    assert layer.tensors["norm.weight"].dtype == dtype
    torch.testing.assert_close(layer.tensors["norm.weight"].double() * layer.tensors["a.weight"], before, rtol=1e-12, atol=0)
    torch.testing.assert_close(folded.float(), s, rtol=2**-8, atol=0)


def test_a_norm_weight_of_zero_keeps_its_place() -> None:
    W, _ = problem()
    layer = layer_of(W)
    layer.tensors["norm.weight"][3] = 0
    s = basis.fold(layer, "a", torch.full((64,), 2.0))
    assert s[3] == 1
    assert torch.equal(layer.tensors["a.weight"][:, 3], W[:, 3])


def test_a_dense_reader_of_the_same_input_is_scaled_with_the_coded_ones() -> None:
    W, X = problem()
    layer = layer_of(W)
    layer.tensors["router.weight"], layer.taps["router.weight"] = W[:4].bfloat16(), "a"
    awq.PASS.run(layer, {"a": stats_of(X)})
    assert layer.tensors["router.weight"].dtype == torch.bfloat16
    torch.testing.assert_close(
        layer.tensors["router.weight"].float(), (W[:4].bfloat16() * layer.scales["a"].float()).float(), rtol=2**-7, atol=0
    )


def shared_by_two(schemes: int = 2) -> tuple[Layer, dict[str, Tensor]]:
    """Two experts behind one norm, ``schemes`` of them coded now, and their router; what they read: 64 and 256 tokens."""
    Ws, inputs = {}, {}
    for e, n_tokens in enumerate((64, 256)):
        Ws[f"{e}.weight"], inputs[str(e)] = problem(seed=e, n_tokens=n_tokens)
    absorber = Absorber(("norm.weight",), torch.arange(64), readers={"0.weight": "0", "1.weight": "1", "router.weight": "0"})
    tensors = {**Ws, "router.weight": torch.ones(2, 64), "norm.weight": torch.ones(64)}
    coded = [(name, ASYM) for name in Ws]
    layer = Layer(
        "l", tensors, dict(coded[:schemes]), dict(absorber.readers), absorbers=dict.fromkeys("01", absorber), deferred=dict(coded[schemes:])
    )
    return layer, inputs


def test_experts_behind_one_norm_share_the_ratio_that_is_best_for_all_their_tokens() -> None:
    layer, inputs = shared_by_two()
    before, stats = dict(layer.tensors), {tap: stats_of(X) for tap, X in inputs.items()}
    every = torch.cat(list(inputs.values())).square().mean(0)
    scales = [awq.input_scales(every, layer.absorbers["0"], i / 20) for i in range(20)]
    losses = [sum(len(X) * output_loss(before[f"{tap}.weight"], X, s, ASYM) for tap, X in inputs.items()) for s in scales]
    reports = awq.PASS.run(layer, stats).tensors
    best = min(range(20), key=losses.__getitem__)
    assert best > 0
    assert {report.settings["awq_ratio"] for report in reports} == {best / 20}
    assert reports[0].settings["awq_loss"] == pytest.approx(losses[best] / losses[0], abs=1e-3)
    torch.testing.assert_close(layer.scales["0"], layer.scales["1"])
    torch.testing.assert_close(layer.scales["0"].float(), scales[best], rtol=1e-4, atol=0)
    for name in ("0.weight", "1.weight", "router.weight"):
        torch.testing.assert_close(layer.tensors[name], before[name] * layer.scales["0"].float())


def test_an_expert_that_is_coded_later_takes_part_and_is_scaled_without_rounding() -> None:
    ratios = {}
    for n_coded in (2, 1):
        layer, inputs = shared_by_two(n_coded)
        layer.tensors["1.weight"] = layer.tensors["1.weight"].bfloat16()
        W = layer.tensors["1.weight"].float()
        ratios[n_coded] = awq.PASS.run(layer, {tap: stats_of(X) for tap, X in inputs.items()}).tensors[0].settings["awq_ratio"]
        torch.testing.assert_close(layer.tensors["1.weight"], W * layer.scales["1"].float())
        assert len(layer.quantized) == n_coded
    assert ratios[1] == ratios[2] > 0


def test_experts_without_tokens_leave_the_choice_to_the_others() -> None:
    layer, inputs = shared_by_two(1)
    alone = awq.PASS.run(layer_of(layer.tensors["0.weight"]), {"a": stats_of(inputs["0"])}).tensors[0].settings
    none = Stats(torch.zeros(64), torch.zeros(64), torch.zeros(64), 0, torch.zeros(64, 64))
    assert awq.PASS.run(layer, {"0": stats_of(inputs["0"]), "1": none}).tensors[0].settings == alone
    assert torch.equal(layer.scales["1"], layer.scales["0"])


def test_a_tap_that_nothing_can_absorb_is_reported_and_clipped_all_the_same() -> None:
    W, X = problem()
    layer = layer_of(W)
    layer.absorbers.clear()
    report = awq.PASS.run(layer, {"a": stats_of(X)}).tensors[0]
    assert "can absorb a scale" in report.notes[0]
    assert not layer.scales
    assert report.relative_error < relative_error(W, rtn_of(W, ASYM, X.square().mean(0)), stats_of(X).H)


def test_an_input_that_calibration_never_saw_is_neither_blown_up_nor_crushed() -> None:
    W, X = problem()
    X[:, 7] = 0
    s = awq.input_scales(X.square().mean(0), layer_of(W).absorbers["a"], 0.95)
    assert s.min() < s[7] < s.max()


def test_rescaled_statistics_are_those_of_the_divided_inputs() -> None:
    _, X = problem()
    s = torch.rand(64) + 0.5
    got, expected = basis.rescaled(stats_of(X), s), stats_of(X / s)
    for field in ("importance", "absmax", "mean", "H"):
        torch.testing.assert_close(getattr(got, field), getattr(expected, field), rtol=1e-4, atol=1e-6)


def test_what_gptq_leaves_of_an_error_is_what_it_leaves() -> None:
    W, X = problem(n_out=16)
    H = stats_of(X).H
    damped = H.double() + 0.01 * H.diagonal().double().mean() * torch.eye(64)
    factor = gptq.factorize(H, damp_ratio=0.01)
    grid = qtypes.of("int").fit(W, ASYM, H.diagonal())
    E = (W - grid.decode(gptq.solve(W, grid, factor))).double()
    d, residue, column_errors = awq.left_by_gptq(H).double(), W[:, factor.order].double(), torch.empty(64, dtype=torch.float64)
    W_hat = (W.double() - E)[:, factor.order]
    for j in range(64):
        error = residue[:, j] - W_hat[:, j]
        column_errors[factor.order[j]] = error.square().sum()
        residue -= torch.outer(error / factor.U[j, j].double(), factor.U[j].double())
    assert float((d * column_errors).sum()) == pytest.approx(float(((E @ damped) * E).sum()), rel=1e-3)


def test_statistics_without_h_are_refused() -> None:
    W, X = problem()
    stats = stats_of(X)
    with pytest.raises(RecipeError, match="needs the Hessian"):
        awq.PASS.run(layer_of(W), {"a": Stats(stats.importance, stats.absmax, stats.mean, 1)})
    with pytest.raises(RecipeError, match="no statistics for its tap"):
        awq.PASS.run(layer_of(W), {})


def quantized(folder: Path, target: Path, recipe: str) -> dict[str, Tensor]:
    ids = torch.randint(512, (8, 32), generator=torch.Generator().manual_seed(0))
    run(folder, target, recipe, Windows(ids))
    return load_file(target / "model.safetensors")


def test_the_folder_has_the_folded_norms_and_says_what_was_chosen(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    folder = tiny_llama(layers=1, bias=True)
    written, source = quantized(folder, tmp_path / "out", "awq-int4"), load_file(folder / "model.safetensors")
    for norm in ("input_layernorm", "post_attention_layernorm"):
        name = f"model.layers.0.{norm}.weight"
        assert written[name].dtype == source[name].dtype
        assert not torch.equal(written[name], source[name])
    assert not torch.equal(written["model.layers.0.mlp.up_proj.bias"], source["model.layers.0.mlp.up_proj.bias"])
    assert torch.equal(written["model.layers.0.mlp.gate_proj.bias"], source["model.layers.0.mlp.gate_proj.bias"])
    assert torch.equal(written["model.norm.weight"], source["model.norm.weight"])
    assert '"awq_ratio"' in (tmp_path / "out" / "quantcli.json").read_text()
