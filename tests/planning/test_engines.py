"""The table of engines: what a plan warns of, and that it names ways out that are ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import quantcli as qc
from quantcli import formats
from quantcli import recipe as recipes
from quantcli.planning import engines
from quantcli.recipe import PassSpec, Recipe
from quantcli.tensors import Scheme
from support.runs import run
from support.whole_models import save_mixtral

VLLM = "vLLM 0.33"


def of(format_: str, *schemes: str) -> tuple[str, ...]:
    return engines.warnings(format_, [Scheme.parse(scheme) for scheme in schemes])


@pytest.mark.parametrize(
    ("format_", "scheme", "expected"),
    [
        ("gptq", "int3-g128-sym", ("vLLM 0.33 does not load gptq with 3 bits; --format compressed-tensors does",)),
        ("gptq", "int4-g128-asym", ("vLLM 0.33 does not load gptq with zero points; --format compressed-tensors does",)),
        ("gptq", "int4-g128-sym-desc", ("vLLM 0.33 does not load gptq with desc_act; --format compressed-tensors does",)),
        ("gptq", "int4-g128-sym", ()),
        ("gptq", "int8-channel-sym", ()),
        ("awq", "int4-g128-asym", ()),
        ("bitsandbytes", "nf4-b64", ("vLLM 0.33 loads bitsandbytes only with vllm-bnb-plugin",)),
        ("compressed-tensors", "int5-g64-sym", ()),
        ("compressed-tensors", "int5-g64-asym", ("transformers 5.23 loads compressed-tensors with zero points only with dequantize=True",)),
        ("fp8", "fp8-tensor", ("transformers 5.23 does not load fp8 with one scale for a weight; --format compressed-tensors does",)),
        ("gguf", "q4_k", ()),
    ],
)
def test_a_plan_says_which_engine_does_not_load_it(format_: str, scheme: str, expected: tuple[str, ...]) -> None:
    assert of(format_, scheme) == expected


def test_one_linear_of_many_is_enough_for_a_warning() -> None:
    assert of("gptq", "int4-g128-sym", "int2-g32-sym") == of("gptq", "int2-g32-sym") != ()
    assert of("gptq") == of("bitsandbytes") == ()


def test_every_row_is_of_a_format_that_is_written_and_every_release_has_one_row_for_it() -> None:
    rows = [(row.release, row.format) for row in engines.SUPPORT]
    assert len(set(rows)) == len(rows)
    assert all(formats.of(row.format).is_written for row in engines.SUPPORT)


def test_the_way_out_is_one() -> None:
    """Whatever vLLM does not load of GPTQ, the format that the warning names holds, and vLLM has no limit there."""
    row = engines.of(VLLM, "gptq")
    assert row is not None
    for text in ("int2-g32-sym", "int3-g128-asym", "int4-g64-asym", "int8-channel-asym"):
        scheme = Scheme.parse(text)
        other = engines.instead(row, scheme)
        assert other == "compressed-tensors"
        assert formats.of(other).supports(scheme)
        assert of(other, text) == () or VLLM not in of(other, text)[0]


def test_quantize_notes_it_and_writes_what_was_asked_for(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    made = Recipe(name="x", passes=(PassSpec("rtn"),), scheme=Scheme.parse("int3-g32-sym"), format="gptq")
    source = tiny_llama(hidden=64, intermediate=96, layers=1, heads=2)
    planned, *_ = run(source, tmp_path / "out", made)
    assert "vLLM 0.33 does not load gptq with 3 bits; --format compressed-tensors does" in planned.notes
    with formats.open_checkpoint(str(tmp_path / "out")) as out:
        assert out.kind == "gptq"


def test_shipped_recipes_for_vllm_warn_of_nothing() -> None:
    for name in ("gptq-int4", "gptq-w4a16", "awq-int4", "fp8-dynamic", "int8-w8a8", "nvfp4"):
        found = recipes.load(name)
        assert found.scheme is not None
        assert engines.warnings(found.format, [found.scheme]) == ()


@pytest.mark.parametrize("format_", ["gptq", "awq"])
def test_experts_that_an_engine_leaves_at_random_are_told_with_the_ones_that_load_them(format_: str) -> None:
    """transformers has experts as one tensor and replaces linears alone: it reports the joint tensors as missing."""
    scheme = Scheme.parse("int4-g128-asym" if format_ == "awq" else "int4-g128-sym")
    (told, *rest) = engines.warnings(format_, [scheme], experts=[scheme])
    assert told.startswith(f"transformers 5.23 loads no {format_} codes of experts and leaves these experts at random (GPTQModel 7.7")
    assert ("--format compressed-tensors does" in told) == (format_ == "gptq")
    assert not rest
    assert engines.warnings(format_, [scheme]) == ()


def test_a_plan_of_a_mixture_of_experts_says_so(tmp_path: Path) -> None:
    folder = save_mixtral(tmp_path, fused=False)
    recipe = replace(recipes.load("gptq-int4"), scheme=Scheme.parse("int4-g16-sym"))
    assert any("leaves these experts at random" in note for note in qc.plan(folder, recipe).notes)
