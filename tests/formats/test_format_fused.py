"""What engines join must be quantized alike: a mixed choice is refused in the plan, by every format whose engines would refuse it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quantcli import recipe
from quantcli.errors import RecipeError
from quantcli.formats import open_checkpoint
from quantcli.formats.shared.fused import check_fused
from quantcli.recipe import Rule
from quantcli.tensors import Scheme
from quantcli.walk import pipeline
from support.tiny_models import TinyLlama
from support.whole_models import save_mixtral

FORMATS = {
    "gptq": ("int4-g32-sym", "int8-g32-sym"),
    "awq": ("int4-g32-asym", "keep"),
    "compressed-tensors": ("int4-g32-sym", "fp8-channel"),
    "fp8": ("fp8-tensor+fp8-tensor", "keep"),
    "bitsandbytes": ("nf4-b64", "keep"),
}
"""Format → a scheme and another choice that its folder can hold beside it."""


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mixtral(tmp_path_factory.mktemp("mixtral"), fused=False, dtype=torch.bfloat16)


def plan(model: Path, format_: str, pattern: str, other: str) -> None:
    """Plan ``model`` in the format's scheme, what ``pattern`` finds in ``other``."""
    base = recipe.load("gptq-int4")
    how = replace(base, format=format_, scheme=Scheme.parse(FORMATS[format_][0]), rules=(Rule.parse(pattern, other),))
    with open_checkpoint(str(model)) as source:
        list(pipeline.quantize(source, Path("nowhere"), how, dry_run=True))


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("pattern", [r"layers\.1\.self_attn\.v_proj", r"layers\.1\.mlp\.up_proj"])
@pytest.mark.parametrize("dense", [True, False])
def test_one_of_joined_linears_cannot_differ(tiny_llama: TinyLlama, format_: str, pattern: str, dense: bool) -> None:
    other = "keep" if dense else FORMATS[format_][1]
    with pytest.raises(RecipeError, match="vLLM and SGLang run these as one matrix") as error:
        plan(tiny_llama(hidden=64, intermediate=64), format_, pattern, other)
    assert pattern.replace("\\", "") in str(error.value)


@pytest.mark.parametrize("format_", [name for name in FORMATS if name != "bitsandbytes"])  # which has all experts dense
@pytest.mark.parametrize("pattern", [r"experts\.2\.", r"layers\.0\..*experts\.3\.w2", r"experts\.\d+\.w2"])
def test_the_experts_of_a_layer_are_one(mixtral: Path, format_: str, pattern: str) -> None:
    with pytest.raises(RecipeError, match=r"experts\.\d\.w.\.weight is .* vLLM and SGLang run these as one matrix"):
        plan(mixtral, format_, pattern, FORMATS[format_][1])


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("pattern", ["[qkv]_proj", r"layers\.1\.self_attn", "down_proj", "gate_proj|up_proj", "o_proj"])
def test_all_of_joined_linears_may_differ_from_the_rest(tiny_llama: TinyLlama, format_: str, pattern: str) -> None:
    plan(tiny_llama(hidden=64, intermediate=64), format_, pattern, FORMATS[format_][1])


@pytest.mark.parametrize("format_", FORMATS)
def test_the_experts_of_one_layer_may_differ_from_those_of_another(mixtral: Path, format_: str) -> None:
    plan(mixtral, format_, r"layers\.0\..*experts", FORMATS[format_][1])


@pytest.mark.parametrize("other", ["fp4-b64", "nf4-b128-dq"])
def test_bitsandbytes_may_code_each_of_joined_linears_its_own_way(tiny_llama: TinyLlama, other: str) -> None:
    """vLLM keeps a QuantState for each and runs them one by one."""
    plan(tiny_llama(hidden=64, intermediate=64), "bitsandbytes", "v_proj", other)


def test_an_experts_bias_is_not_joined_with_its_weights() -> None:
    names = [f"model.layers.0.mlp.experts.{e}.gate_proj.{part}" for e in range(2) for part in ("weight", "bias")]
    check_fused(names, dict.fromkeys((name for name in names if name.endswith("weight")), Scheme.parse("int4-g32-sym")))


@pytest.mark.parametrize("format_", ["gptq", "compressed-tensors"])
def test_what_the_engine_is_not_told_may_differ(tiny_llama: TinyLlama, format_: str) -> None:
    """How a grid was searched is nothing that a folder says."""
    plan(tiny_llama(hidden=64, intermediate=64), format_, "v_proj", "int4-g32-sym-minmax")
