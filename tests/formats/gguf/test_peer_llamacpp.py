"""llama.cpp as the second hand: our files equal those of convert_hf_to_gguf + llama-quantize, and its programs run and tokenize with them.

Needs a built llama.cpp source tree at QUANTCLI_LLAMA_CPP.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from pydoc_data import topics
from typing import Any

import pytest

from quantcli import recipe as recipes
from quantcli.formats import open_checkpoint
from quantcli.formats.gguf.file.headers import read_header
from quantcli.formats.gguf.types.filetypes import FILE_TYPES
from quantcli.planning.selection import that_keeps
from quantcli.recipe import PassSpec, Recipe, Rule
from quantcli.tensors import Scheme
from quantcli.walk import pipeline
from support.gguf_export import LLAMA3, edit_config, export
from support.importance_files import needs_matrix, weighed
from support.llamacpp_peer import assert_same, convert, run
from support.places import PICO

pytestmark = pytest.mark.peer


@pytest.fixture(scope="module", params=["untied", "tied, llama3 rotary scaling"])
def model(request: pytest.FixtureRequest, tiny_llama: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(a model folder, what convert_hf_to_gguf makes of it)."""
    tied = request.param != "untied"
    folder = tiny_llama(layers=8, tied=tied, shards=2)
    if tied:
        edit_config(folder, rope_parameters=LLAMA3)
    return folder, convert(folder, tmp_path_factory.mktemp("converted") / "bf16.gguf", "gpt-2")


@pytest.mark.parametrize(
    "file_type", [name for name, kind in FILE_TYPES.items() if not needs_matrix(kind)]
)  # test_peer_imatrix.py has them all
def test_a_file_equals_that_of_convert_and_llama_quantize(model: tuple[Path, Path], file_type: str, tmp_path: Path) -> None:
    folder, converted = model
    run("llama-quantize", converted, tmp_path / "theirs.gguf", file_type, "1")
    with open_checkpoint(str(folder)) as source:
        ours = export(source, tmp_path / f"{folder.name}.gguf", file_type)
    assert_same(ours, tmp_path / "theirs.gguf")


@pytest.fixture(scope="module", params=[(160, 352), (256, 352), (160, 512), (160, 336)], ids=lambda sizes: "{}x{}".format(*sizes))
def odd_model(request: pytest.FixtureRequest, tiny_llama: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Likewise with rows of which some are no multiple of 256, and in the last case some none of 32."""
    folder = tiny_llama(hidden=request.param[0], intermediate=request.param[1], layers=8)
    return folder, convert(folder, tmp_path_factory.mktemp("converted") / "bf16.gguf", "gpt-2")


@pytest.mark.parametrize("file_type", ["Q4_0", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K"])
def test_rows_that_do_not_fill_blocks_fall_back_as_llama_quantizes_do(odd_model: tuple[Path, Path], file_type: str, tmp_path: Path) -> None:
    folder, converted = odd_model
    run("llama-quantize", converted, tmp_path / "theirs.gguf", file_type, "1")
    with open_checkpoint(str(folder)) as source:
        ours = export(source, tmp_path / f"{folder.name}.gguf", file_type)
    assert_same(ours, tmp_path / "theirs.gguf")


@pytest.mark.parametrize(
    "options",
    [
        {"pure": True},
        {"tensor_type": [r"blk\.0\.attn_v=q8_0", "ffn_up=q6_k"]},
        {"output_tensor_type": "q8_0"},
        {"token_embedding_type": "q5_k"},
    ],
)
def test_options_choose_what_llama_quantizes_own_choose(model: tuple[Path, Path], options: dict, tmp_path: Path) -> None:
    folder, converted = model
    words: list[str] = []
    for key, value in options.items():
        flag = f"--{key.replace('_', '-')}"
        words += [flag] if value is True else [word for item in ([value] if isinstance(value, str) else value) for word in (flag, item)]
    run("llama-quantize", *words, converted, tmp_path / "theirs.gguf", "Q4_K_M", "1")
    with open_checkpoint(str(folder)) as source:
        ours = export(source, tmp_path / "ours.gguf", "Q4_K_M", **options)
    a, b = read_header(ours), read_header(tmp_path / "theirs.gguf")
    assert a.specs == b.specs


@pytest.mark.parametrize("file_type", ["Q4_K_M", "Q8_0"])
def test_llama_cpp_generates_from_our_file(model: tuple[Path, Path], file_type: str, tmp_path: Path) -> None:
    with open_checkpoint(str(model[0])) as source:
        path = export(source, tmp_path / "m.gguf", file_type)
    text = run("llama-completion", "-m", path, "-p", "The", "-n", "8", "-t", "1", "--temp", "0", "-no-cnv", "--no-warmup")
    assert len(text.strip()) > len("The")


def perplexity_in_llama_cpp(path: Path, text: Path) -> float:
    out = run("llama-perplexity", "-m", path, "-f", text, "-c", "128", "-t", "1", "--no-warmup")
    return float(re.findall(r"\[\d+\]([\d.]+)", out)[-1])  # the running estimate after the last window


@pytest.mark.parametrize(
    ("format_", "scheme"),
    [
        ("gptq", "int4-g128-sym"),
        ("gptq", "int4-g128-asym"),
        ("gptq", "int8-g128-sym"),
        ("awq", "int4-g128-asym"),
        ("compressed-tensors", "int4-g128-sym"),
        ("compressed-tensors", "fp8-channel+fp8-token"),
        ("fp8", "fp8-block"),
        ("bitsandbytes", "nf4-b64-dq"),
        ("bitsandbytes", "llm_int8"),
    ],
)
def test_llama_cpp_runs_what_we_export_from_every_dialect_as_well_as_the_decoded_weights(format_: str, scheme: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(topics.topics["assignment"] + topics.topics["typesseq"])
    recipe = Recipe("coded", format_, (PassSpec("rtn"),), scheme=Scheme.parse(scheme))
    with open_checkpoint(str(PICO)) as source:
        list(pipeline.quantize(source, tmp_path / "coded", recipe))
    with open_checkpoint(str(tmp_path / "coded")) as source:
        decoded = export(source, tmp_path / "decoded.gguf", "F32")
        list(pipeline.quantize(source, tmp_path / "kept.gguf", that_keeps(source, "gguf")))
    theirs = perplexity_in_llama_cpp(decoded, text)
    assert perplexity_in_llama_cpp(tmp_path / "kept.gguf", text) == pytest.approx(theirs, rel=0.01)  # ggml rounds activations to 8 bits


def test_llama_cpp_runs_the_head_that_a_rule_untied(tmp_path: Path) -> None:
    """Coded so roughly that it shows which matrix is run."""
    text = tmp_path / "text.txt"
    text.write_text(topics.topics["assignment"] + topics.topics["typesseq"])
    found = {}
    with open_checkpoint(str(PICO)) as source:
        for name, rules in (("tied", ()), ("untied", (Rule.parse("lm_head", "q2_k"),))):
            list(pipeline.quantize(source, tmp_path / f"{name}.gguf", replace(recipes.load("f32"), rules=rules)))
            found[name] = perplexity_in_llama_cpp(tmp_path / f"{name}.gguf", text)
    with open_checkpoint(str(tmp_path / "untied.gguf")) as source:
        decoded = export(source, tmp_path / "decoded.gguf", "F32")
    assert found["untied"] == pytest.approx(perplexity_in_llama_cpp(decoded, text), rel=0.01)
    assert abs(found["untied"] / found["tied"] - 1) > 0.03


@pytest.mark.parametrize("name", [name for name in recipes.shipped() if recipes.load(name).format == "gguf"])
def test_llama_cpp_loads_what_a_recipe_writes_and_finds_the_decoded_weights_perplexity(name: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(topics.topics["assignment"] + topics.topics["typesseq"])
    with open_checkpoint(str(PICO)) as source:
        recipe, data = weighed(name, PICO, tmp_path)
        list(pipeline.quantize(source, tmp_path / "ours.gguf", recipe, data=data))
    with open_checkpoint(str(tmp_path / "ours.gguf")) as source:
        decoded = export(source, tmp_path / "decoded.gguf", "F32")
    theirs = perplexity_in_llama_cpp(decoded, text)
    assert perplexity_in_llama_cpp(tmp_path / "ours.gguf", text) == pytest.approx(theirs, rel=0.01)


def test_an_nvfp4_folder_becomes_the_file_that_convert_makes(tmp_path: Path) -> None:
    """Tensors and the scales beside them; llama.cpp runs it as well as the decoded weights."""
    text = tmp_path / "text.txt"
    text.write_text(topics.topics["assignment"] + topics.topics["typesseq"])
    with open_checkpoint(str(PICO)) as source:
        list(pipeline.quantize(source, tmp_path / "coded", recipes.load("nvfp4")))
    with open_checkpoint(str(tmp_path / "coded")) as source:
        decoded = export(source, tmp_path / "decoded.gguf", "F32")
        recipe = replace(that_keeps(source, "gguf"), format_options={"pre_tokenizer": "gpt-2"})
        list(pipeline.quantize(source, tmp_path / "ours.gguf", recipe))
    a, b = (read_header(path) for path in (tmp_path / "ours.gguf", convert(tmp_path / "coded", tmp_path / "theirs.gguf", "gpt-2")))
    assert a.specs == {name: b.specs[name] for name in a.specs}
    assert b.specs.keys() == a.specs.keys()
    assert a.get("general.file_type") == b.get("general.file_type")
    ours, theirs = a.path.read_bytes(), b.path.read_bytes()
    for name, spec in a.specs.items():
        assert ours[a.offsets[name] :][: spec.nbytes] == theirs[b.offsets[name] :][: spec.nbytes], name
    assert perplexity_in_llama_cpp(a.path, text) == pytest.approx(perplexity_in_llama_cpp(decoded, text), rel=0.01)
