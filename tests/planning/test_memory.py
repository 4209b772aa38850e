"""inspect --memory: the bytes of each recipe are those of its dry run, for every family and every shipped recipe."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from quantcli import recipe as recipes
from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.errors import RecipeError, UnsupportedError
from quantcli.formats import open_checkpoint
from quantcli.planning import plan as planning
from quantcli.planning.arrange import arrange
from quantcli.planning.memory import kv_cache_bytes, needs
from quantcli.walk import pipeline
from quantcli.walk.events import Planned
from support import families

TinyLlama = Callable[..., Path]
PICO = Path(__file__).parents[1] / "data/pico"


def dry_run(checkpoint: Checkpoint) -> dict[str, int]:
    """Recipe → the bytes that a dry run plans, of the recipes that fit the model; the model is opened once for all of them."""
    found: dict[str, int] = {}
    forward = None
    for name in recipes.shipped():
        recipe = recipes.load(name)
        try:
            arranged = arrange(checkpoint, recipe, forward=forward)
            forward = arranged.forward or forward
            plan = planning.make(arranged, recipe)
            try:
                planning.check_importance(plan, ())
            except RecipeError:  # a dry run of it is given an importance matrix
                plan = planning.make(arranged, recipe, is_weighed=True)
        except (RecipeError, UnsupportedError):
            continue
        found[name] = plan.n_bytes
    return found


@pytest.mark.parametrize("case", families.CASES)
def test_the_table_has_the_bytes_of_the_dry_run(case: str, tmp_path: Path) -> None:
    with open_checkpoint(str(families.make(case, tmp_path / "m"))) as checkpoint:
        table = {need.recipe: need.n_bytes for need in needs(checkpoint, 128)}
        assert table == dry_run(checkpoint)
    assert {"q8_0", "q4_0", "bf16", "f16"} <= table.keys()


def test_a_llama_fits_every_recipe(tiny_llama: TinyLlama) -> None:
    with open_checkpoint(str(tiny_llama())) as checkpoint:
        assert {need.recipe for need in needs(checkpoint, 128)} == set(recipes.shipped())


def test_the_pipelines_own_dry_run_agrees(tmp_path: Path) -> None:
    with open_checkpoint(str(PICO)) as checkpoint:
        table = {need.recipe: need.n_bytes for need in needs(checkpoint, 128)}
        for name in ("gptq-int4", "awq-int4", "smoothquant-w8a8", "fp8-dynamic-kv", "nf4", "q4_k_m", "bf16", "mxfp4"):
            (planned,) = pipeline.quantize(checkpoint, tmp_path / "out", recipes.load(name), dry_run=True)
            assert isinstance(planned, Planned)
            assert table[name] == planned.plan.n_bytes, name


def test_a_cache_of_eight_bits_takes_half_the_bytes(tmp_path: Path, tiny_llama: TinyLlama) -> None:
    """By the recipe's scales, or by those that a folder has already."""
    with open_checkpoint(str(tiny_llama(layers=2, kv_heads=2, heads=4))) as checkpoint:
        found = {need.recipe: need.kv_cache_bytes for need in needs(checkpoint, 100)}
        assert found["gptq-int4"] == kv_cache_bytes(checkpoint.config, 100) == 2 * 2 * 2 * 64 * 100 * 2
        assert found["fp8-dynamic-kv"] == found["gptq-int4"] // 2
    assert json.dumps(found)  # plain numbers


def test_a_folder_with_scales_for_its_cache_says_so_in_its_bytes(tiny_llama: TinyLlama) -> None:
    with open_checkpoint(str(tiny_llama(layers=1))) as checkpoint:
        before = needs(checkpoint, 64)[0].kv_cache_bytes
        checkpoint.kv_cache = {"model.layers.0.self_attn": "fp8"}
        after = needs(checkpoint, 64)[0]
        assert before is not None
        assert after == replace(after, kv_cache_bytes=before // 2)
