"""What stays dense is listed under the names by which each reader asks: its own rule, run over the model it builds, finds what has codes.

The rules are transformers' own where it has them (AWQ, bitsandbytes, FP8), and written down here from optimum, compressed-tensors and vLLM.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from quantcli import archs, formats
from quantcli.checkpoint.modules import DERIVED, Module, Modules
from quantcli.errors import UnsupportedError
from quantcli.formats import open_checkpoint
from quantcli.forward import modules_of
from quantcli.planning.readers import dense_reasons
from quantcli.recipe import PassSpec, Recipe
from quantcli.tensors import Scheme
from support.partly_dense import KINDS, save
from support.runs import run

SCHEMES = {
    "gptq": "int4-g32-sym",
    "awq": "int4-g32-asym",
    "bitsandbytes": "nf4-b64",
    "compressed-tensors": "int4-g32-sym",
    "fp8": "fp8-block",
}
BLOCKS = ("transformer.h", "model.decoder.layers", "gpt_neox.layers", "model.layers", "model.language_model.layers")
"""Where optimum looks for a model's blocks, in its order."""

Words = dict[str, Any]


def recipe(format_: str) -> Recipe:
    return Recipe(name="rtn", passes=(PassSpec("rtn"),), scheme=Scheme.parse(SCHEMES[format_]), format=format_)


def quantized(source: Path, target: Path, format_: str) -> Words:
    run(source, target, recipe(format_))
    words: Words = json.loads((target / "config.json").read_text())["quantization_config"]
    return words


def built(folder: Path, name: str) -> Any:
    """The model that transformers builds, without weights."""
    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        return getattr(transformers, KINDS[name].cls)(config)


def skips(key: str, *, defaults: bool = False) -> Callable[[Any, Words], Callable[[str], bool]]:
    """transformers' rule: what no entry of the list ``key`` means is replaced; ``defaults``: nor what it keeps dense anyway."""

    def rule(model: Any, words: Words) -> Callable[[str], bool]:
        listed = HfQuantizer.get_modules_to_not_convert(model, words[key], model._keep_in_fp32_modules, defaults)
        return lambda module: should_convert_module(module, listed)

    return rule


def ignores(model: Any, words: Words) -> Callable[[str], bool]:
    """compressed-tensors' rule: a name in ``ignore`` is that very name."""
    assert words["config_groups"]["group_0"]["targets"] == ["Linear"]
    return lambda module: module not in words["ignore"]


def blocks(model: Any, words: Words) -> Callable[[str], bool]:
    """optimum's rule: plain linears of the first list of blocks there is, which end as one in the list does."""
    names = [name for name, _ in model.named_modules()]
    start = words.get("block_name_to_quantize") or next(block for block in BLOCKS if any(name.startswith(block) for name in names))
    listed = list(chain.from_iterable(words.get("modules_in_block_to_quantize", [])))
    return lambda module: module.startswith(start) and (not listed or any(module.endswith(entry) for entry in listed))


RULES = {
    "gptq": blocks,
    "awq": skips("modules_to_not_convert", defaults=True),
    "bitsandbytes": skips("llm_int8_skip_modules"),
    "compressed-tensors": ignores,
    "fp8": skips("modules_to_not_convert"),
}


def linears(model: Any, format_: str) -> list[str]:
    """The modules that the format's loader may replace: of torch's own class, or of one derived from it too."""
    derived = format_ in ("awq", "compressed-tensors")
    return [n for n, m in model.named_modules() if (isinstance(m, nn.Linear) if derived else type(m) is nn.Linear)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in made:
            made[name] = save(name, tmp_path_factory.mktemp("source") / "model")
        return made[name]

    return of


@pytest.mark.parametrize(("name", "format_"), [(n, f) for n in KINDS for f in SCHEMES])
def test_a_reader_replaces_the_linears_with_codes_and_no_others(
    name: str, format_: str, source: Callable[[str], Path], tmp_path: Path
) -> None:
    words = quantized(source(name), tmp_path / "out", format_)
    model = built(source(name), name)
    replaces = RULES[format_](model, words)
    found = [module for module in linears(model, format_) if replaces(module)]
    assert found == [module for module in linears(model, format_) if KINDS[name].is_coded(module)]
    assert found


@pytest.mark.parametrize("name", ["glm4", "glm4, mtp", "gemma3"])
def test_gptqs_rules_leave_other_layers_of_the_same_names_dense(name: str, source: Callable[[str], Path], tmp_path: Path) -> None:
    """vLLM's and GPTQModel's rules, by names of older folders: a name in the list is looked for inside, ``-:`` matched from the start."""
    words = quantized(source(name), tmp_path / "out", "gptq")
    listed = list(chain.from_iterable(words.get("modules_in_block_to_quantize", [])))
    rules = [re.compile(key.removeprefix("-:")) for key in words.get("dynamic", {}) if key.startswith("-:")]
    with open_checkpoint(str(source(name))) as dense, open_checkpoint(str(tmp_path / "out")) as out:
        modules = {
            n.removesuffix(".weight"): n in out.schemes for n, s in dense.specs.items() if n.endswith("proj.weight") and len(s.shape) == 2
        }
    assert set(modules.values()) == {True, False}
    for module, has_codes in modules.items():
        assert (not any(rule.match(module) for rule in rules)) == has_codes, module
        if listed:
            assert any(entry in module for entry in listed) == has_codes, module


def test_a_folder_that_lists_names_of_other_readers_reads_back_without_a_note(source: Callable[[str], Path], tmp_path: Path) -> None:
    for format_ in SCHEMES:
        quantized(source("gemma3"), tmp_path / format_, format_)
        with open_checkpoint(str(tmp_path / format_)) as out:
            assert out.notes == (), format_


@pytest.mark.parametrize("format_", ["bitsandbytes", "fp8"])
def test_linears_of_a_class_of_their_own_are_refused_where_readers_do_not_replace_them(format_: str, tmp_path: Path) -> None:
    folder = falcon(tmp_path / "falcon")
    with pytest.raises(UnsupportedError, match=r"nothing is left to quantize: .* of a class derived from torch's"):
        run(folder, tmp_path / "out", recipe(format_))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format_", SCHEMES)
def test_experts_that_transformers_looks_for_elsewhere_are_said(format_: str, source: Callable[[str], Path], tmp_path: Path) -> None:
    """transformers has another module for Llama 4's experts as soon as a folder is of two formats, and no conversion to its tensors."""
    planned, *_ = run(source("llama4"), tmp_path / "out", recipe(format_))
    said = [note for note in planned.notes if "looks for these experts one by one" in note]
    assert len(said) == (format_ in ("bitsandbytes", "compressed-tensors"))
    assert any("router.weight" in note and note.endswith("engines load routers dense") for note in planned.notes)


def test_what_a_model_keeps_in_float32_stays_dense(tiny_llama: Callable[..., Path]) -> None:
    name = "model.layers.0.self_attn.o_proj.weight"
    modules = Modules({name: Module((name.removesuffix(".weight"),), kept="LlamaForCausalLM keeps it in float32")})
    schemes = {name: Scheme.parse("int4-g32-sym")}
    with open_checkpoint(str(tiny_llama(hidden=64, intermediate=96, layers=1, heads=2))) as source:
        for format_ in SCHEMES:
            assert list(dense_reasons(source, formats.of(format_), schemes, modules)) == [name]
            assert dense_reasons(source, formats.of(format_), schemes, Modules()) == {}
        assert dense_reasons(source, formats.of("gguf"), schemes, modules) == {}


def test_a_model_says_what_it_keeps_in_float32(source: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.Glm4MoeForCausalLM, "_keep_in_fp32_modules", ["self_attn.o_proj"])
    with open_checkpoint(str(source("glm4"))) as found:
        modules = modules_of(found)
    assert modules is not None
    assert {name for name, module in modules.of.items() if module.kept} == {f"model.layers.{i}.self_attn.o_proj.weight" for i in (0, 1)}


def falcon(folder: Path) -> Path:
    config = transformers.FalconConfig(vocab_size=512, hidden_size=128, num_hidden_layers=1, num_attention_heads=4, bias=False)
    transformers.FalconForCausalLM(config).save_pretrained(folder)
    return folder


def test_falcons_literal_knows_its_class(tmp_path: Path) -> None:
    """Every family's literal says whether transformers derives its linears, since no model is built for those."""
    with open_checkpoint(str(falcon(tmp_path / "falcon"))) as source:
        arch, modules = archs.of(source.config), modules_of(source)
        assert arch is not None
        assert modules is not None
        assert arch.derived
        assert {modules.of[name].kind for name in source.specs if arch.tap(name)} == {DERIVED}


def test_the_renamed_names_are_transformers_own(source: Callable[[str], Path], tmp_path: Path) -> None:
    """The test would prove nothing if names on disk were the modules' names."""
    mapping = get_model_conversion_mapping(built(source("gemma3"), "gemma3"))
    assert any(step.rename_source_key("vision_tower.encoder.layers.0.mlp.fc1.weight")[0].startswith("model.") for step in mapping)
