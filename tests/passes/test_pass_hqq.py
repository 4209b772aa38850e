"""HQQ against a plain loop of its equations, against hqq's own solver, and what it is worth on a trained model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quantcli import qtypes, recipe
from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.errors import RecipeError, UnsupportedError
from quantcli.formats import open_checkpoint
from quantcli.forward import tokenizer
from quantcli.passes import hqq, rtn
from quantcli.passes.hqq import Options, Solved, half_quadratic
from quantcli.recipe import PassSpec
from quantcli.tensors import Layer, Scheme
from quantcli.text import texts
from quantcli.walk import evaluate, pipeline
from support.places import DATA, PICO

GOLDEN = load_file(DATA / "hqq_golden.safetensors")
P = 0.7


def loop(group: list[float], scale: float, zero: float, *, hi: int, free: bool, options: Options) -> list[tuple[float, float, float]]:
    """Scale, zero point and mean |error|^p of every round, one weight at a time, in double: eq. 3 to 5, then the scale's step."""
    rounds = []
    beta, p = options.beta, options.p
    for _ in range(options.iters):
        codes = [min(max(round(w / scale + zero), 0), hi) for w in group]
        errors = [w - scale * (q - zero) for w, q in zip(group, codes, strict=True)]
        rounds.append((scale, zero, sum(abs(e) ** p for e in errors) / len(group)))
        targets = []
        for w, e in zip(group, errors, strict=True):
            shrunk = max(0.0, abs(e) - abs(e) ** (p - 1) / beta) if e else 0.0
            targets.append(w - (shrunk if e > 0 else -shrunk))
        if free:
            zero = sum(q - t / scale for q, t in zip(codes, targets, strict=True)) / len(group)
        above = sum((q - zero) * t for q, t in zip(codes, targets, strict=True))
        below = sum((q - zero) ** 2 for q in codes)
        scale = above / below if above > 0 and below > 0 else scale
        beta *= options.kappa
    return rounds


def start_of(V: torch.Tensor, bits: int, *, rounded: bool) -> Solved:
    """Min–max of each group, its zero point as it is or rounded."""
    low, high = V.amin(1, keepdim=True), V.amax(1, keepdim=True)
    scale = (high - low) / (2**bits - 1)
    zero = -low / scale
    return Solved(scale, zero.round() if rounded else zero, torch.full_like(scale, torch.inf))


def p_error(V: torch.Tensor, solved: Solved, bits: int) -> torch.Tensor:
    codes = (V / solved.scale + solved.zero).round().clamp(0, 2**bits - 1)
    return (V - solved.scale * (codes - solved.zero)).abs().pow(P).mean()


@pytest.mark.parametrize("free", [True, False])
@pytest.mark.parametrize("beta", [10.0, 300.0])
def test_it_is_the_plain_loop_of_the_equations(free: bool, beta: float) -> None:
    V = torch.randn(12, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.05
    options = Options(beta=beta)
    start = start_of(V, 3, rounded=not free)
    best = half_quadratic(V, start, lo=0, hi=7, free=free, options=options)
    moved = 0
    for i, group in enumerate(V.tolist()):
        rounds = loop(group, float(start.scale[i]), float(start.zero[i]), hi=7, free=free, options=options)
        scale, zero, error = min(rounds, key=lambda r: r[2])
        assert float(best.error[i]) == pytest.approx(error, rel=1e-3)  # errors of zero count as 1e-4 of a spacing
        assert float(best.scale[i]) == pytest.approx(scale, rel=1e-3)
        assert float(best.zero[i]) == pytest.approx(zero, rel=1e-3)
        moved += scale != rounds[0][0]
    assert moved > 6


def test_a_larger_beta_is_another_solution() -> None:
    """Or W_e of the test above might be nothing in both of its cases."""
    V = torch.randn(200, 64, generator=torch.Generator().manual_seed(0)) * 0.05
    start = start_of(V, 3, rounded=True)
    ten, more = (half_quadratic(V, start, lo=0, hi=7, free=False, options=Options(beta=beta)) for beta in (10.0, 300.0))
    assert float(p_error(V, more, 3)) < 0.99 * float(p_error(V, ten, 3))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_with_a_free_zero_point_it_is_no_worse_than_hqq_itself(bits: int) -> None:
    V = GOLDEN["grid-W"].view(-1, 64)
    theirs = Solved(GOLDEN[f"grid-{bits}/scale"], GOLDEN[f"grid-{bits}/zero"], torch.empty(0))
    ours = half_quadratic(V, start_of(V, bits, rounded=False), lo=0, hi=2**bits - 1, free=True)
    assert float(p_error(V, ours, bits)) <= float(p_error(V, theirs, bits))


@pytest.mark.parametrize("bits", [2, 4])
def test_rounding_the_papers_zero_point_loses_what_it_gained(bits: int) -> None:
    """Why integers need the step of the scale."""
    V = torch.randn(500, 64, generator=torch.Generator().manual_seed(1)) * 0.05
    minmax = start_of(V, bits, rounded=True)
    scale, zero = minmax.scale, start_of(V, bits, rounded=False).zero
    for _ in range(20):  # eq. 5 with W_e = 0, the scale as it is
        zero = ((V / scale + zero).round().clamp(0, 2**bits - 1) - V / scale).mean(1, keepdim=True)
    papers, rounded = Solved(scale, zero, zero), Solved(scale, zero.round(), zero)
    assert float(p_error(V, papers, bits)) < 0.985 * float(p_error(V, minmax, bits))
    assert float(p_error(V, rounded, bits)) > 0.995 * float(p_error(V, minmax, bits))


@pytest.mark.parametrize(
    "word", ["int4-g64-asym", "int2-g32-asym", "int4-g32-sym", "int3-channel-asym", "int4-g64-asym-sbf16", "q4_1", "q5_1"]
)
def test_no_group_is_worse_than_the_search_in_its_own_measure(word: str) -> None:
    scheme = Scheme.parse(word)
    qtype = qtypes.of(scheme.qtype)
    g = torch.Generator().manual_seed(2)
    W = torch.randn(40, 128, generator=g) ** 3 / 50
    W[3, :64] = 0
    W[5] = 0.25
    W[7] = 1e-6 * torch.randn(128, generator=g)
    grid = qtype.fit(W, scheme)
    solved = hqq.solve(W, grid, scheme)
    before, after = ((W - x.decode(x.encode(W))).abs().pow(P).view(40, -1, grid.group_size).sum(2) for x in (grid, solved))
    assert bool((after <= before).all())
    if word != "int4-g32-sym":  # where the search stands already: with W_e = 0 the scale's step is its own
        assert float(after.sum()) < 0.999 * float(before.sum())
    tensor = hqq.quantize(W, scheme)
    assert torch.equal(qtype.unpack(tensor), solved.decode(solved.encode(W)))  # the file holds the grid that was judged
    for name, spec in qtype.layout((40, 128), scheme).items():
        assert tuple(tensor.parts[name].shape) == spec.shape
    if "asym" in word:
        assert int(tensor.parts["zero"].max()) < 2 ** scheme.get("bits")


def test_chunks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    W = torch.randn(50, 64, generator=torch.Generator().manual_seed(3))
    scheme = Scheme.parse("int4-g32-asym")
    whole = hqq.quantize(W, scheme)
    monkeypatch.setattr(hqq, "CHUNK_ELEMENTS", 64 * 7)
    assert all(torch.equal(part, hqq.quantize(W, scheme).parts[name]) for name, part in whole.parts.items())


def test_it_fills_a_layer_and_reports_its_error() -> None:
    W = torch.randn(16, 64, generator=torch.Generator().manual_seed(4)).bfloat16()
    layer = Layer("model.layers.0", {"a.weight": W}, {"a.weight": Scheme.parse("int4-g32-asym")})
    report = hqq.PASS.run(layer, {})
    assert [r.name for r in report.tensors] == ["a.weight"]
    assert report.tensors[0].relative_error == pytest.approx(rtn.weight_error(W, layer.quantized["a.weight"]), rel=1e-4)


@pytest.mark.parametrize("word", ["q4_k", "nf4", "q8_0", "f16"])
def test_number_formats_without_a_free_scale_are_refused(word: str) -> None:
    with pytest.raises(UnsupportedError, match="it supports int, q4_1, q5_1"):
        hqq.quantize(torch.ones(4, 256), Scheme.parse(word))


@pytest.mark.parametrize("option", [{"p": 0.0}, {"p": 1.5}, {"beta": -1.0}, {"kappa": 0.5}, {"iters": 0}])
def test_options_out_of_range_are_refused(option: dict[str, float]) -> None:
    with pytest.raises(RecipeError, match="hqq: expected"):
        PassSpec("hqq", option).build_options()


# ---- a trained model ----


@pytest.fixture(scope="module")
def pico() -> Iterator[Checkpoint]:
    with open_checkpoint(str(PICO)) as model:
        yield model


def kl_of(model: Checkpoint, target: Path, pass_name: str, scheme: str, format_: str) -> float:
    how = replace(recipe.load("rtn-int4"), format=format_, scheme=Scheme.parse(scheme), passes=(PassSpec(pass_name),))
    list(pipeline.quantize(model, target, how))
    windows = texts.eval_windows(texts.default_eval_text(), tokenizer(model), n_samples=8, seq_len=256)
    with open_checkpoint(str(target)) as quantized:
        return evaluate.compare(quantized, model, windows).to_dict()["kld_mean"]


def test_it_is_closer_to_the_model_than_minmax_and_than_ggmls_search(pico: Checkpoint, tmp_path: Path) -> None:
    solved, minmax, search = (
        kl_of(pico, tmp_path / name, pass_name, f"int2-g64-asym{more}", "gptq")
        for name, pass_name, more in (("hqq", "hqq", ""), ("minmax", "rtn", "-minmax"), ("search", "rtn", ""))
    )
    assert solved < 0.8 * minmax
    assert search < solved  # honest: for integer zero points our own search is the better one
    assert kl_of(pico, tmp_path / "a.gguf", "hqq", "q4_1", "gguf") < kl_of(pico, tmp_path / "b.gguf", "rtn", "q4_1", "gguf")


def test_the_recipe_writes_what_it_planned(pico: Checkpoint, tmp_path: Path) -> None:
    how = recipe.default_for("hqq")
    planned, *_, finished = pipeline.quantize(pico, tmp_path / "out", how)
    assert isinstance(planned, pipeline.Planned)
    assert isinstance(finished, pipeline.Finished)
    with open_checkpoint(str(tmp_path / "out")) as back:
        assert back.kind == "awq"
        assert back.notes == ()
        assert {str(scheme) for scheme in back.schemes.values()} == {"int4-g64-asym"}
        assert len(back.schemes) == planned.plan.census()["quantized"]
        assert sum(spec.nbytes for spec in back.specs.values()) == planned.plan.n_bytes
