"""Recipes: what ships loads, what is wrong says so, what is written down reads back."""

from __future__ import annotations

import pytest
import yaml

from quantcli import formats
from quantcli import recipe as recipes
from quantcli.errors import RecipeError
from quantcli.tensors import Scheme

GOOD = {"format": "gptq", "passes": ["gptq"], "scheme": "int4-g128-sym"}


@pytest.mark.parametrize("name", recipes.shipped())
def test_every_shipped_recipe_loads_and_says_when_to_choose_it(name: str) -> None:
    recipe = recipes.load(name)
    assert recipe.description.endswith(".")
    assert formats.of(recipe.format)
    assert recipe.scheme is None or formats.of(recipe.format).supports(recipe.scheme)


@pytest.mark.parametrize("name", recipes.shipped())
def test_a_recipe_written_down_reads_back_the_same(name: str) -> None:
    recipe = recipes.load(name)
    again = recipes.parse(yaml.safe_load(yaml.safe_dump(recipe.to_dict())), "again")
    assert again.to_dict() == recipe.to_dict()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "zip"}, "no format 'zip'; there are: "),
        ({"passes": ["magic"]}, "no pass 'magic'; there are: "),
        ({"passes": [{"gptq": {"damp": 1}}]}, "has no option 'damp'; it has: act_order"),
        ({"passes": []}, "lacks 'passes'"),
        ({"scheme": "int4-g128-wide"}, "'wide' in scheme"),
        ({"scheme": "foo4"}, "'foo4' names no number format"),
        ({"scheme": None}, "either a scheme or a mix"),
        ({"mix": "Q4_K_M"}, "either a scheme or a mix"),
        ({"codes": "all"}, "codes is one of requantize, reuse, keep, not 'all'"),
        ({"colour": "red"}, "unknown key 'colour'"),
        ({"rules": [{"match": "("}]}, "keys match and scheme"),
        ({"rules": [{"match": "(", "scheme": "keep"}]}, "not a regular expression"),
        ({"calibration": {"sampels": 3}}, "calibration takes samples"),
        ({"calibration": {"samples": "many"}}, "samples is an integer, not 'many'"),
        ({"calibration": {"samples": 0}}, "above zero"),
        ({"calibration": 5}, "calibration is a mapping, not 5"),
        ({"passes": "gptq"}, "passes is a list, not 'gptq'"),
        ({"passes": [5]}, "a pass is a name"),
        ({"passes": [{"gptq": {}, "rtn": {}}]}, "a pass is a name"),
        ({"passes": [{"gptq": 5}]}, "the options of gptq are a mapping, not 5"),
        ({"passes": [{"gptq": {"damp_ratio": "0.1"}}]}, "value of the wrong kind"),
        ({"rules": 5}, "rules is a list, not 5"),
        ({"seed": True}, "seed is an integer, not True"),
        ({"format_options": []}, "format_options is a mapping"),
        ({"scheme": 4}, "scheme is a string, not 4"),
    ],
)
def test_a_wrong_recipe_says_what_is_wrong(change: dict, words: str) -> None:
    with pytest.raises(RecipeError) as error:
        recipes.parse({**GOOD, **change}, "mine")
    assert words in str(error.value)


@pytest.mark.parametrize(("old", "new"), [("anew", "requantize"), ("fitting", "reuse"), ("kept", "keep")])
def test_earlier_spellings_of_codes_are_read_and_written_as_todays(old: str, new: str) -> None:
    recipe = recipes.parse({**recipes.load("gptq-int4").to_dict(), "codes": old}, "old")
    assert recipe.codes == new
    assert recipe.to_dict()["codes"] == new
    assert recipes.parse(recipe.to_dict(), "new") == recipe


def test_a_name_that_does_not_exist_lists_the_ones_that_do() -> None:
    with pytest.raises(RecipeError, match="gptq-int4"):
        recipes.load("nope")


def test_a_recipe_file_of_ones_own_loads(tmp_path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({**GOOD, "rules": [{"match": "down_proj", "scheme": "int8-g128-sym"}]}))
    recipe = recipes.load(str(path))
    assert recipe.name == "mine"
    assert recipe.rules[0].matches("model.layers.0.mlp.down_proj.weight")


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("int4", "int4-g128-sym"),
        ("INT8-channel-asym", "int8-channel-asym"),
        ("int3-g64", "int3-g64-sym"),
        ("int4-desc", "int4-g128-sym-desc"),
        ("int4-minmax-asym", "int4-g128-asym-minmax"),
        ("bf16", "bf16"),
        ("q4_k", "q4_k"),
        ("int4-sbf16", "int4-g128-sym-sbf16"),
        ("int8-channel-sym+int8-token", "int8-channel-sym+int8-token"),
    ],
)
def test_schemes_print_as_they_are_written(text: str, printed: str) -> None:
    assert str(Scheme.parse(text)) == printed
    assert Scheme.parse(str(Scheme.parse(text))) == Scheme.parse(text)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("q4_k-g128", "'q4_k-g128': this number format has no options"),
        ("int4-dq", "'dq' in scheme 'int4-dq' is none of g<N>, channel, sym, asym, desc, minmax, sf16, sbf16, sf32"),
        ("q8_0+int8-token", "leave '\\+int8-token' out"),
        ("int8+int9-token", "none of \\+int8-token"),
    ],
)
def test_a_scheme_takes_only_the_words_of_its_number_format(text: str, complaint: str) -> None:
    with pytest.raises(RecipeError, match=complaint):
        Scheme.parse(text)


def test_overriding_bits_renames_the_recipe() -> None:
    recipe = recipes.load("gptq-int4")
    assert recipe.with_scheme(bits=4).name == "gptq-int4"
    assert recipe.with_scheme(bits=3, sym=False).name == "gptq-int3-g128-asym"


def test_a_mix_has_no_bits_to_set() -> None:
    with pytest.raises(RecipeError, match="Q4_K_M"):
        recipes.load("q4_k_m").with_scheme(bits=3)


def test_every_method_has_one_default_recipe() -> None:
    methods = [method for name in recipes.shipped() if (method := recipes.load(name).default_for)]
    assert recipes.default_for("gptq").name == "gptq-int4"
    assert sorted(methods) == recipes.methods()
    with pytest.raises(RecipeError, match=r"no recipe for method 'magic'; there are: .*gptq, hqq"):
        recipes.default_for("magic")
