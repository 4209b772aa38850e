"""transformers and gptqmodel as the second hand for AWQ: they load our folders with our perplexity, and we theirs.

Needs a Python with both at QUANTCLI_GPTQMODEL_PYTHON; tests/PEERS.md says how to make one.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from quantcli import recipe
from quantcli.recipe import Recipe, Rule
from quantcli.tensors import Scheme
from support import gptq_peer
from support.gptq_peer import Answer

pytestmark = pytest.mark.peer
gptq_peer.skip_without_peer()


def onto_awq(name: str, scheme: str | None = None, *rules: Rule) -> Recipe:
    found = recipe.load(name)
    return replace(found, format="awq", scheme=Scheme.parse(scheme) if scheme else found.scheme, rules=rules)


CASES: dict[str, Recipe] = {
    "rtn int4-g128-sym": onto_awq("rtn-int4", "int4-g128-sym"),
    "rtn int4-g32-asym": onto_awq("rtn-int4", "int4-g32-asym"),
    "rtn int4-channel-asym": onto_awq("rtn-int4", "int4-channel-asym"),
    "gptq int4-g128-asym": recipe.load("gptq-awq"),
    "gptq int4-g128-sym": onto_awq("gptq-int4"),
    "hqq int4-g64-asym": recipe.load("hqq-int4"),
    "a linear dense": onto_awq("rtn-int4", "int4-g64-asym", Rule.parse(r"0\.mlp\.down_proj", "keep")),
    "symmetric and asymmetric": onto_awq("rtn-int4", "int4-g64-asym", Rule.parse("[qk]_proj", "int4-g64-sym")),
}
OWN_LOADER = ("gptq int4-g128-asym", "a linear dense")


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answer]:
    """By transformers; and, under the same name in brackets, by gptqmodel's own loader, which computes in 16 bits."""
    recipes = {**CASES, **{f"({case})": CASES[case] for case in OWN_LOADER}}
    loaders = {case: "gptqmodel" if case[0] == "(" else "transformers" for case in recipes}
    return gptq_peer.measured_by_both(tmp_path_factory.mktemp("peer-awq"), recipes, loaders)


@pytest.mark.parametrize("case", [*CASES, *(f"({case})" for case in OWN_LOADER)])
def test_the_client_loads_every_coded_linear_and_finds_our_perplexity(case: str, answers: dict[str, Answer]) -> None:
    ours, theirs = answers[case], answers[case]["theirs"]
    assert "error" not in theirs, theirs["error"]
    assert sum(theirs["kernels"].values()) == ours["n_coded"]
    assert theirs["perplexity"] == pytest.approx(ours["ours"], rel=1e-3 if case[0] == "(" else 1e-4)


def test_the_cases_differ_by_more_than_the_tolerance(answers: dict[str, Answer]) -> None:
    """Or the test above could not tell a folder from its neighbour."""
    measured = sorted(answer["ours"] for answer in answers.values())
    assert measured[-1] > 1.01 * measured[0]


def test_we_read_what_gptqmodel_makes(tmp_path: Path) -> None:
    ours, theirs = gptq_peer.read_what_they_made("awq", tmp_path)
    assert theirs["perplexity"] == pytest.approx(ours, rel=1e-4)
