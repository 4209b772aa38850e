"""Coordinate descent after a solver: held to a loop over single numbers, and never worse in the norm of H."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
import torch
from torch import Tensor

from quantcli import qtypes
from quantcli.errors import RecipeError
from quantcli.ops.runs import codec_of, nearest_runs
from quantcli.passes import gptq
from quantcli.passes.shared.descent import descend
from quantcli.tensors import Scheme
from support.oracles import coordinate_descent

WITH_FACTORS = [
    "int4-g32-sym",
    "int4-g32-asym",
    "int3-g64-asym",
    "int2-channel-asym",
    "q2_k",
    "q3_k",
    "q4_k",
    "q5_k",
    "q6_k",
    "q4_0",
    "q4_1",
    "q5_0",
    "q5_1",
    "iq4_nl",
    "iq4_xs",
    "nvfp4",
]
CODE_BOOKS = ["iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s"]
CODES_ALONE = ["nf4", "fp8-channel", "mxfp4"]


def problem(n_out: int = 16, n_in: int = 512, seed: int = 0) -> tuple[Tensor, Tensor]:
    """W [out, in] and a damped H [in, in] of correlated inputs with a few loud channels."""
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(n_out, n_in, generator=g) * 0.05
    X = torch.randn(4 * n_in, n_in, generator=g) @ (torch.randn(n_in, n_in, generator=g) / n_in**0.5 + torch.eye(n_in))
    X[:, :3] *= 5
    H = X.T @ X / len(X)
    return W, H + 0.01 * H.diagonal().mean() * torch.eye(n_in)


def loss(W: Tensor, D: Tensor, H: Tensor) -> Tensor:
    """(w − d)·H·(w − d)ᵀ of each row, in float64."""
    E = W.double() - D.double()
    return ((E @ H.double()) * E).sum(1)


@pytest.mark.parametrize("scheme", [*WITH_FACTORS, *CODES_ALONE])
def test_every_sweep_lowers_the_error_of_every_row(scheme: str) -> None:
    W, H = problem()
    qtype, chosen = qtypes.of(Scheme.parse(scheme).qtype), Scheme.parse(scheme)
    grid = qtype.fit(W, chosen, H.diagonal().contiguous())
    codes = grid.encode(W)
    losses = [loss(W, qtype.unpack(qtype.pack(codes, grid, chosen)), H)]
    for sweeps in (1, 2, 4):
        packed = qtype.pack(*descend(W, codes, grid, H, chosen, sweeps=sweeps), chosen)
        losses.append(loss(W, qtype.unpack(packed), H))
    for before, after in pairwise(losses):
        assert bool((after <= before * (1 + 1e-4)).all())
    assert float(losses[2].sum()) < 0.9 * float(losses[0].sum())


@pytest.mark.parametrize("scheme", ["int4-g32-sym", "int3-g64-asym", "q4_k", "iq4_xs", "nf4"])
@pytest.mark.parametrize("sweeps", [1, 3])
def test_codes_equal_those_of_a_loop_over_single_weights(scheme: str, sweeps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    W, H = problem(4)
    chosen = Scheme.parse(scheme)
    qtype = qtypes.of(chosen.qtype)
    monkeypatch.setattr(type(qtype), "factors", lambda self, grid, scheme: None)
    grid = qtype.fit(W, chosen, H.diagonal().contiguous())
    codes, same = descend(W, grid.encode(W), grid, H, chosen, sweeps=sweeps)
    assert same is grid
    expected = coordinate_descent(W, grid.encode(W), grid, H, sweeps)
    assert float((codes == expected).double().mean()) > 0.995  # a tie may fall apart in float32
    torch.testing.assert_close(loss(W, grid.decode(codes), H), loss(W, grid.decode(expected), H), rtol=1e-3, atol=0)


@pytest.mark.parametrize("scheme", WITH_FACTORS)
def test_a_factor_on_its_own_is_the_direction_in_which_the_weights_move(scheme: str) -> None:
    """w is linear in each stored number: twice a step moves the weights twice as far, and by the direction that the descent takes."""
    W, H = problem(4)
    chosen = Scheme.parse(scheme)
    qtype = qtypes.of(chosen.qtype)
    grid = qtype.fit(W, chosen, H.diagonal().contiguous())
    codes = grid.encode(W)
    factors = qtype.factors(grid, chosen)
    assert factors is not None
    for name in factors.moves:
        values = {key: value.clone() for key, value in factors.values.items()}
        values[name][:, 0] = qtype.stored(name, values[name][:, 0] * 2, chosen).nan_to_num(1.0)
        moved = qtype.unpack(qtype.pack(codes, qtype.of_factors(grid, values, chosen), chosen)) - grid.decode(codes)
        n_served = W.shape[1] // values[name].shape[1]
        assert not bool(moved[:, n_served:].any()), name
        step = (values[name] - factors.values[name])[:, :1]
        by_terms = torch.zeros_like(W[:, :n_served])
        q = codes[:, :n_served].float() if grid.book is None else grid.book[codes[:, :n_served].long()]
        for sign, names, has_code in factors.terms:
            if name in names:
                term = sign * (q if has_code else torch.ones_like(q))
                for other in set(names) - {name}:
                    term = term * factors.values[other].repeat_interleave(W.shape[1] // factors.values[other].shape[1], 1)[:, :n_served]
                by_terms += term
        torch.testing.assert_close(moved[:, :n_served], step * by_terms, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("scheme", WITH_FACTORS)
def test_what_a_factor_may_be_is_what_the_file_holds(scheme: str) -> None:
    W, H = problem(4)
    chosen = Scheme.parse(scheme)
    qtype = qtypes.of(chosen.qtype)
    codes, grid = descend(W, (first := qtype.fit(W, chosen)).encode(W), first, H, chosen, sweeps=2)
    torch.testing.assert_close(qtype.unpack(qtype.pack(codes, grid, chosen)), grid.decode(codes), rtol=0, atol=0)
    factors = qtype.factors(grid, chosen)
    assert factors is not None
    for name in factors.moves:
        assert torch.equal(qtype.stored(name, factors.values[name], chosen).nan_to_num(0), factors.values[name]), name


@pytest.mark.parametrize("scheme", ["int4-g32-sym", "q2_k"])
def test_gptq_gains_by_it(scheme: str) -> None:
    W, H = problem(24, 256)
    factor = gptq.factorize(H, damp_ratio=0.01)
    losses = []
    for sweeps in (0, 1, 2):
        coded = gptq.quantize(W, Scheme.parse(scheme), H, factor, gptq.Options(sweeps=sweeps))
        losses.append(float(loss(W, qtypes.of(coded.scheme.qtype).unpack(coded), gptq.damped(H, factor)).sum()))
    assert losses[2] < losses[1] < 0.97 * losses[0]


def test_other_inputs_of_the_original_model_are_part_of_what_is_lowered() -> None:
    """With GPTAQ's cross term C = α·mean (x₀ − x)·xᵀ the error is (w − d)·H·(w − d)ᵀ + 2·w·C·(w − d)ᵀ."""
    W, H = problem(8, 256)
    C = torch.randn(256, 256, generator=torch.Generator().manual_seed(4)) * 0.05
    scheme = Scheme.parse("int3-g64-asym")
    grid = qtypes.of("int").fit(W, scheme, H.diagonal().contiguous())

    def asymmetric_loss(D: Tensor) -> Tensor:
        E = (W - D).double()
        return loss(W, D, H) + 2 * ((W.double() @ C.double()) * E).sum(1)

    plain, aware = (descend(W, grid.encode(W), grid, H, scheme, sweeps=3, missing=m) for m in (None, W @ C))
    before = asymmetric_loss(grid.decode(grid.encode(W)))
    assert bool((asymmetric_loss(aware[1].decode(aware[0])) <= before).all())
    assert float(asymmetric_loss(aware[1].decode(aware[0])).sum()) < float(asymmetric_loss(plain[1].decode(plain[0])).sum())


def test_no_row_depends_on_another() -> None:
    W, H = problem(12, 256)
    for scheme, (start, stop) in product(map(Scheme.parse, ("q2_k", "int4-g32-asym")), [(0, 5), (5, 12)]):
        qtype = qtypes.of(scheme.qtype)
        grid = qtype.fit(W, scheme)
        part = qtype.fit(W[start:stop].contiguous(), scheme)
        codes, _ = descend(W, grid.encode(W), grid, H, scheme, sweeps=2)
        alone, _ = descend(W[start:stop], part.encode(W[start:stop].contiguous()), part, H, scheme, sweeps=2)
        assert float((codes[start:stop] == alone).double().mean()) > 0.99  # products of other sizes round otherwise


def test_a_number_of_sweeps_is_small_and_not_negative() -> None:
    with pytest.raises(RecipeError, match="sweeps is a number of descents from 0 to 100, not -1"):
        gptq.Options(sweeps=-1)


@pytest.mark.parametrize("name", CODE_BOOKS)
def test_every_sweep_over_runs_of_a_code_book_lowers_the_error_of_every_row(name: str) -> None:
    W, H = problem()
    qtype, scheme = qtypes.of(name), Scheme.parse(name)
    plain = qtype.encode(W, scheme, H.diagonal().contiguous())
    losses = [loss(W, qtype.unpack(plain), H)]
    for sweeps in (1, 2, 4):
        codes, grid = descend(W, *qtype.chosen(plain), H, scheme, sweeps=sweeps)
        packed = qtype.pack(codes, grid, scheme)
        torch.testing.assert_close(qtype.unpack(packed), grid.decode(codes), rtol=1e-6, atol=0)
        losses.append(loss(W, qtype.unpack(packed), H))
    for before, after in pairwise(losses):
        assert bool((after <= before * (1 + 1e-4)).all())
    assert float(losses[2].sum()) < 0.8 * float(losses[0].sum())


@pytest.mark.parametrize("name", CODE_BOOKS)
def test_gptq_codes_runs_of_a_code_book_with_feedback(name: str) -> None:
    """One super-block after the other gains over none, with or without the descent behind it."""
    W, H = problem(24, 1024)
    scheme, qtype = Scheme.parse(name), qtypes.of(name)
    factor = gptq.factorize(H, damp_ratio=0.01, act_order=False)
    errors = [loss(W, qtype.unpack(qtype.encode(W, scheme, H.diagonal().contiguous())), H)]
    errors += [loss(W, qtype.unpack(gptq.quantize(W, scheme, H, factor, gptq.Options(sweeps=n))), H) for n in (0, 2)]
    assert float(errors[1].sum()) < 0.95 * float(errors[0].sum())
    assert float(errors[2].sum()) < 0.8 * float(errors[1].sum())


@pytest.mark.parametrize("name", CODE_BOOKS)
def test_the_nearest_runs_are_the_best_points_for_their_signs(name: str) -> None:
    g = torch.Generator().manual_seed(1)
    codec = codec_of(name)
    points = torch.tensor(codec.magnitudes).double()[codec.book.levels.long()]
    width = points.shape[1]
    A = torch.randn(32, 8, generator=g)
    H, T, scale = A.T @ A / 32, torch.randn(40, 8, generator=g), torch.rand(40, generator=g) * 0.05 + 0.02
    codes = nearest_runs(T, H, scale, name)
    minus = codes < 0
    turned = (minus != (T < 0)).sum(1)
    assert bool((minus.sum(1) % 2 == 0).all()) or not codec.even_signs
    assert bool((turned <= codec.even_signs).all())
    for row in range(40):
        sign = torch.where(minus[row], -1.0, 1.0).double()
        t, s, done = T[row].double(), float(scale[row]), torch.zeros(0, dtype=torch.float64)
        for start in range(0, 8, width):
            run, until = slice(start, start + width), start + width
            errors = t[:until] - torch.cat((done.expand(len(points), -1), s * sign[run] * points), 1)
            chosen = s * codes[row, run].double()
            cost = ((errors @ H.double()[:until, :until]) * errors).sum(1)
            error = t[:until] - torch.cat((done, chosen))
            assert float((error @ H.double()[:until, :until]) @ error) <= float(cost.min()) * (1 + 1e-4) + 1e-9
            done = torch.cat((done, chosen))
