"""transformers and gptqmodel as the second hand: they load our GPTQ folders and find the perplexity that we find.

Needs a Python with both (and optimum) at QUANTCLI_GPTQMODEL_PYTHON; tests/PEERS.md says how to make one.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from quantcli import recipe
from quantcli.formats import open_checkpoint
from quantcli.recipe import Recipe, Rule
from quantcli.tensors import Scheme
from quantcli.walk import evaluate
from support import gptq_peer
from support.gptq_peer import Answer

pytestmark = pytest.mark.peer
gptq_peer.skip_without_peer()

SYM4 = Scheme.parse("int4-g128-sym")

CASES: dict[str, tuple[Scheme, tuple[Rule, ...]]] = {
    "int4-g128-sym": (SYM4, ()),
    "int4-g128-sym, desc_act": (SYM4.with_options(desc_act=True), ()),
    "int4-g128-asym": (Scheme.parse("int4-g128-asym"), ()),
    "int4-g32-asym, desc_act": (Scheme.parse("int4-g32-asym").with_options(desc_act=True), ()),
    "int4-channel-sym": (Scheme.parse("int4-channel-sym"), ()),
    "int2-g32-asym": (Scheme.parse("int2-g32-asym"), ()),
    "int3-g128-sym": (Scheme.parse("int3-g128-sym"), ()),
    "int3-g64-asym": (Scheme.parse("int3-g64-asym"), ()),
    "int8-g128-sym": (Scheme.parse("int8-g128-sym"), ()),
    "int8-g128-asym": (Scheme.parse("int8-g128-asym"), ()),
    "int4-g128-sym, o_proj left dense": (SYM4, (Rule.parse("o_proj", "keep"),)),
}

RULED: dict[str, tuple[Scheme, tuple[Rule, ...]]] = {
    "int4-g128-sym, down_proj in 8 bits": (SYM4, (Rule.parse("down_proj", "int8-g128-sym"),)),
    "int4-g128-sym, one layer in 8 bits by rows": (SYM4, (Rule.parse(r"layers\.1\.", "int8-channel-sym"),)),
    "int2-g32-asym, q, k, v in 4 bits, a linear dense": (
        Scheme.parse("int2-g32-asym"),
        (Rule.parse("[qkv]_proj", "int4-g64-asym"), Rule.parse(r"0\.mlp\.down_proj", "keep")),
    ),
}
"""transformers asks optimum, which does not know ``dynamic``; gptqmodel's own loader does, and computes in 16 bits."""


def recipe_of(scheme: Scheme, rules: tuple[Rule, ...]) -> Recipe:
    return replace(recipe.default_for("gptq"), scheme=scheme, rules=rules)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answer]:
    recipes = {case: recipe_of(*how) for case, how in {**CASES, **RULED}.items()}
    loaders = {case: "gptqmodel" if case in RULED else "transformers" for case in recipes}
    return gptq_peer.measured_by_both(tmp_path_factory.mktemp("peer-gptq"), recipes, loaders)


@pytest.mark.parametrize("case", [*CASES, *RULED])
def test_the_client_loads_every_coded_linear_and_finds_our_perplexity(case: str, answers: dict[str, Answer]) -> None:
    ours, theirs = answers[case], answers[case]["theirs"]
    assert "error" not in theirs, theirs["error"]
    assert sum(theirs["kernels"].values()) == ours["n_coded"]
    assert theirs["perplexity"] == pytest.approx(ours["ours"], rel=1e-3 if case in RULED else 1e-4)


def test_the_cases_differ_by_more_than_the_tolerance(answers: dict[str, Answer]) -> None:
    """Or the test above could not tell a folder from its neighbour."""
    measured = sorted(answer["ours"] for answer in answers.values())
    assert measured[-1] > 1.1 * measured[0]


def test_we_read_what_gptqmodel_makes(tmp_path: Path) -> None:
    """GPTQ with desc_act, whose groups stand in g_idx."""
    ours, theirs = gptq_peer.read_what_they_made("gptq", tmp_path)
    assert theirs["perplexity"] == pytest.approx(ours, rel=1e-4)


def test_transformers_does_refuse_rules_as_our_note_says(tmp_path: Path) -> None:
    how = recipe_of(*RULED["int4-g128-sym, down_proj in 8 bits"])
    with open_checkpoint(str(gptq_peer.PICO)) as model:
        learned, measured = gptq_peer.windows_of_pico(model)
        gptq_peer.quantized(model, tmp_path / "out", how, learned)
    answer = gptq_peer.ask(tmp_path, measured, "transformers", tmp_path / "out")
    with open_checkpoint(str(tmp_path / "out")) as back:
        ours = evaluate.perplexity(back, measured).perplexity
    assert "error" in answer or abs(answer["perplexity"] / ours - 1) > 0.01


@pytest.mark.parametrize("rules", [(), (Rule.parse("o_proj", "keep"),)], ids=["all", "o_proj dense"])
def test_gptqmodel_runs_a_tied_head_once_quantized_and_transformers_does_not_as_our_note_says(
    tmp_path: Path, rules: tuple[Rule, ...]
) -> None:
    how = recipe_of(SYM4, (Rule.parse("lm_head", "int4-g128-sym"), *rules))
    with open_checkpoint(str(gptq_peer.PICO)) as model:
        learned, measured = gptq_peer.windows_of_pico(model)
        n_coded = gptq_peer.quantized(model, tmp_path / "out", how, learned)
    with open_checkpoint(str(tmp_path / "out")) as back:
        ours = evaluate.perplexity(back, measured).perplexity
    theirs = gptq_peer.ask(tmp_path, measured, "gptqmodel", tmp_path / "out")
    assert sum(theirs["kernels"].values()) == n_coded
    assert theirs["perplexity"] == pytest.approx(ours, rel=1e-3)
    assert gptq_peer.ask(tmp_path, measured, "transformers", tmp_path / "out")["perplexity"] > 10 * ours
