"""Plans: every byte known beforehand, every tensor accounted for, every conflict found before a weight is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantcli import formats
from quantcli import recipe as recipes
from quantcli.errors import RecipeError, UnsupportedError
from quantcli.formats import open_checkpoint
from quantcli.formats.gguf.types.filetypes import FILE_TYPES
from quantcli.importance import ImportanceSource
from quantcli.planning import plan as planning
from quantcli.planning.arrange import Arranged, arrange, declared_taps, open_forward
from quantcli.planning.plan import Plan
from quantcli.recipe import PassSpec, Recipe, Rule
from quantcli.walk import pipeline
from support.importance_files import weighed

TinyLlama = Callable[..., Path]


def make(folder: Path, recipe: Recipe, data: ImportanceSource | None = None) -> Plan:
    with open_checkpoint(str(folder)) as source:
        plan = planning.make(arrange(source, recipe, run=False), recipe, is_weighed=data is not None)
        importance = () if data is None else plan.layout.importance(data, plan.source, {t.name: t.scheme for t in plan.tensors if t.scheme})
        planning.check_importance(plan, importance)
        return plan


def with_rules(name: str, *rules: tuple[str, str]) -> Recipe:
    return replace(recipes.load(name), rules=tuple(Rule.parse(*rule) for rule in rules))


def schemes(plan: Plan) -> dict[str, str]:
    return {t.name: str(t.scheme) for t in plan.tensors if t.scheme}


def test_declared_taps_equal_traced_ones(tiny_llama: TinyLlama) -> None:
    with open_checkpoint(str(tiny_llama())) as source:
        assert declared_taps(source) == dict(open_forward(source).taps)


def test_every_source_tensor_is_in_the_plan_once(tiny_llama: TinyLlama) -> None:
    folder = tiny_llama(shards=3)
    with open_checkpoint(str(folder)) as source:
        plan = planning.make(arrange(source, recipes.load("gptq-int4"), run=False), recipes.load("gptq-int4"))
        assert sorted(t.name for t in plan.tensors) == sorted(source.specs)
        assert sum(plan.census().values()) == len(source.specs)


def test_layers_come_in_the_order_of_a_forward_pass(tiny_llama: TinyLlama) -> None:
    names = [layer.name for layer in make(tiny_llama(layers=11), recipes.load("gptq-int4")).layers]
    assert names[0] == "model.embed_tokens.weight"
    assert names[1:12] == [f"model.layers.{i}" for i in range(11)]
    assert set(names[12:]) == {"model.norm.weight", "lm_head.weight"}


def test_linears_of_layers_are_coded_and_the_rest_is_kept(tiny_llama: TinyLlama) -> None:
    chosen = schemes(make(tiny_llama(), recipes.load("gptq-int4")))
    assert len(chosen) == 14
    assert set(chosen.values()) == {"int4-g128-sym"}


def test_bpw_counts_scales_and_zero_points(tiny_llama: TinyLlama) -> None:
    plan = make(tiny_llama(), recipes.load("gptq-int4"))
    layer = plan.layers[1]
    coded = [t for t in layer.tensors if t.scheme]
    n_bits = 8 * sum(s.nbytes for t in coded for s in t.outputs)
    n_weights = sum(t.source.n_elements for t in coded)
    g_idx_bits = sum(32 * t.source.shape[1] for t in coded)
    assert (n_bits - g_idx_bits) / n_weights == pytest.approx(4 + 16 / 128 + 4 / 128)


def test_the_first_rule_that_matches_wins(tiny_llama: TinyLlama) -> None:
    recipe = with_rules("gptq-int4", (r"layers\.0\.mlp\.down", "keep"), (r"down_proj", "int8-g128-sym"))
    chosen = schemes(make(tiny_llama(), recipe))
    assert "model.layers.0.mlp.down_proj.weight" not in chosen
    assert chosen["model.layers.1.mlp.down_proj.weight"] == "int8-g128-sym"


def test_a_rule_that_matches_nothing_is_an_error(tiny_llama: TinyLlama) -> None:
    with pytest.raises(RecipeError, match="rule 'experts' matches no weight matrix"):
        make(tiny_llama(), with_rules("gptq-int4", ("experts", "int8-g128-sym")))


def test_a_group_that_does_not_divide_is_found_before_any_weight_is_read(tiny_llama: TinyLlama) -> None:
    with pytest.raises(RecipeError, match=r"model.layers.0.mlp.down_proj.weight: in_features 544 is not a multiple"):
        make(tiny_llama(intermediate=544), recipes.load("gptq-int4"))


def test_a_scheme_the_format_cannot_hold_is_unsupported(tiny_llama: TinyLlama) -> None:
    with pytest.raises(UnsupportedError, match="gptq format cannot hold q4_k"):
        make(tiny_llama(), with_rules("gptq-int4", ("down_proj", "q4_k")))


def test_a_code_book_has_no_grid_for_passes_that_need_one(tiny_llama: TinyLlama) -> None:
    recipe = replace(with_rules("q8_0", ("down_proj", "iq3_s")), passes=(PassSpec("hqq"),))
    with pytest.raises(
        RecipeError, match=r"mlp.down_proj.weight: the pass hqq needs a grid, and iq3_s takes 4 weights at once.*use rtn, gptq"
    ):
        make(tiny_llama(), recipe)


def test_a_type_that_needs_importance_is_refused_before_any_weight_is_read(tiny_llama: TinyLlama) -> None:
    folder, rules = tiny_llama(), (("down_proj", "iq2_xs"),)
    with pytest.raises(
        RecipeError, match=r"mlp.down_proj.weight: iq2_xs needs importance, and recipe 'q8_0' measures none; give --imatrix"
    ):
        make(folder, with_rules("q8_0", *rules))
    measured = replace(with_rules("q8_0", *rules), passes=(PassSpec("awq"),))
    assert schemes(make(folder, measured))["model.layers.0.mlp.down_proj.weight"] == "iq2_xs"
    with pytest.raises(RecipeError, match=r"embed_tokens.weight: iq2_xs needs importance, and what this tensor reads is not measured"):
        make(folder, replace(measured, rules=(Rule.parse("embed_tokens", "iq2_xs"),)))


@pytest.mark.parametrize(("name", "blind", "measured"), [("q4_0", "q4_0", "q4_1"), ("iq4_xs", "q5_k", "iq4_xs")])
def test_passes_that_know_the_inputs_choose_types_as_llama_quantize_with_an_importance_matrix(
    tiny_llama: TinyLlama, name: str, blind: str, measured: str
) -> None:
    folder, recipe, down = tiny_llama(layers=8), recipes.load(name), "model.layers.0.mlp.down_proj.weight"
    assert schemes(make(folder, recipe))[down] == blind
    plan = make(folder, replace(recipe, passes=(PassSpec("gptq"),)))
    assert schemes(plan)[down] == measured
    assert plan.layout.quantization["general.file_type"].value == FILE_TYPES[name.upper()].number


def test_a_mix_needs_a_format_that_has_mixes(tiny_llama: TinyLlama) -> None:
    with pytest.raises(RecipeError, match="Q4_K_M is a mix of types for GGUF"):
        make(tiny_llama(), replace(recipes.load("q4_k_m"), format="gptq"))


def with_tensors(folder: Path, **more: torch.Tensor) -> Path:
    """``folder`` with further tensors in layer 0, as a model with other matrices than linears has them."""
    tensors = load_file(folder / "model.safetensors") | {f"model.layers.0.{name.replace('__', '.')}": t for name, t in more.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_matrices_that_no_statistics_reach_are_told(tiny_llama: TinyLlama) -> None:
    folder = with_tensors(tiny_llama(), experts__0__w1__weight=torch.zeros(128, 128), experts__1__w1__weight=torch.zeros(128, 128))
    (note,) = make(folder, recipes.load("rtn-int4")).notes
    assert "model.layers.0.experts.0.w1.weight, model.layers.0.experts.1.w1.weight stay as they are" in note
    assert make(folder, with_rules("rtn-int4", (r"experts", "keep"))).census()["quantized"] == 14


def test_what_a_calibrated_recipe_rounds_to_nearest_is_told(tiny_llama: TinyLlama) -> None:
    recipe = with_rules("gptq-int4", ("lm_head", "int8-g128-sym"))
    with open_checkpoint(str(tiny_llama())) as source:
        unseen = replace(arrange(source, recipe, run=False), head=None)
        notes = planning.make(unseen, recipe).notes
    assert notes[0] == "lm_head.weight rounded to nearest: gptq has no statistics of what they read"
    assert make(tiny_llama(), recipes.load("gptq-int4")).notes == ()
    (note,) = make(tiny_llama(), with_rules("rtn-int4", ("lm_head", "int4-g128-sym"))).notes
    assert note.startswith("lm_head is quantized")


def test_what_loses_the_codes_of_its_source_is_told(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    recipe = with_rules("rtn-int4", ("lm_head", "int4-g128-sym"))
    with open_checkpoint(str(tiny_llama())) as source:
        list(pipeline.quantize(source, tmp_path / "once", recipe))
    (note,) = make(tmp_path / "once", recipes.load("rtn-int4")).notes
    assert note.startswith("lm_head.weight decoded to a dense type")
    assert not any("decoded" in note for note in make(tmp_path / "once", recipe).notes)


def test_what_the_format_has_to_say_is_told(tiny_llama: TinyLlama) -> None:
    (note,) = make(tiny_llama(), with_rules("rtn-int4", ("down_proj", "int8-g128-sym"))).notes
    assert "transformers" in note


def test_a_model_without_linears_in_its_layers_is_unsupported(tiny_llama: TinyLlama) -> None:
    with open_checkpoint(str(tiny_llama())) as source, pytest.raises(UnsupportedError, match=r"have no linears, only .* model.layers.0"):
        planning.make(Arranged(source, formats.of("gptq"), {}), recipes.load("gptq-int4"))


@pytest.mark.parametrize("name", recipes.shipped())
@pytest.mark.parametrize("tied", [True, False])
def test_every_shipped_recipe_can_plan_a_llama(tiny_llama: TinyLlama, tmp_path: Path, name: str, tied: bool) -> None:
    folder = tiny_llama(tied=tied)
    plan = make(folder, *weighed(name, folder, tmp_path))
    assert 2 < plan.bpw < 33
    assert plan.census()["dropped"] == 0
