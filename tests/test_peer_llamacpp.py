"""llama.cpp as the second hand: our files equal those of convert_hf_to_gguf + llama-quantize, and its programs run and tokenize with them.

Needs a built llama.cpp source tree at QUANTCLI_LLAMA_CPP.
"""

from __future__ import annotations

import ast
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from pydoc_data import topics
from typing import Any

import numpy as np
import pytest
import sentencepiece
from gguf_export import LLAMA3, edit_config, export
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from quantcli import pipeline
from quantcli import recipe as recipes
from quantcli.checkpoint import Checkpoint
from quantcli.cli.export import recipe_that_keeps
from quantcli.formats.gguf import pretokenizers
from quantcli.formats.gguf.container import Container, Field, read_header
from quantcli.formats.gguf.filetypes import FILE_TYPES
from quantcli.recipe import PassSpec, Recipe
from quantcli.tensors import Scheme

pytestmark = pytest.mark.peer

LLAMA_CPP = Path(os.environ.get("QUANTCLI_LLAMA_CPP", "/nowhere"))
if not (LLAMA_CPP / "build/bin/llama-quantize").is_file():
    pytest.skip("QUANTCLI_LLAMA_CPP names no built llama.cpp", allow_module_level=True)

PICO = Path(__file__).parent / "data/pico"

CONVERT = """
import runpy, sys
root, model, out, pre = sys.argv[1:]
sys.path[:0] = [root, root + "/gguf-py"]
from conversion import base
if pre:
    base.TextModel.get_vocab_base_pre = lambda self, tokenizer: pre
sys.argv = ["convert", model, "--outfile", out, "--outtype", "bf16"]
runpy.run_path(root + "/convert_hf_to_gguf.py", run_name="__main__")
"""
NASTY = (
    "Hello, world! It's 12345 o'clock; we'LL see THEM'd I'm.  Two  spaces\t\ttabs\n\n\nlines \r\n crlf   \n end ",
    "naïve café Ünïcödé ÀÉÎ İstanbul ß ﬁ ½ ²³ ٣٤٥ १२३ Ⅷ",
    "日本語のテスト、中文测试。한국어 테스트! ไทย ភាសាខ្មែរ हिन्दी العربية עברית",
    "🚀🦙👩‍👩‍👧 🏳️‍🌈 e\u0301 a\u0308 \u200d\u200b\ufeff zero\u00a0nbsp\u3000wide",
    "def f(x):\n    return x**2 # 3.14 + 1e-5 != 0x7f\n\tif a&&b||c: {}[]()<>;:'\"\\/`~@#$%^",
    "HTTPServer camelCase snake_case ALLCAPS123abc 1,234,567.89 2024-01-02",
    "   leading and trailing   ",
    "don’t ‘quote’ “double” — em–en … ！？、。「」ﾊﾝｶｸ ９９９ Ωmega ſ K",
    "\x01\x7f control ᾳ ǅ ﷺ 𝔘𝔫𝔦 𐍈 Ёжик",
)
SPECIAL = "<|begin_of_text|>special<|eot|> and <tool> <s> </s> <unk>"


def run(program: str, *arguments: str | Path) -> str:
    done = subprocess.run(
        [LLAMA_CPP / "build/bin" / program, *arguments],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def convert(folder: Path, out: Path, pre: str = "") -> Path:
    done = subprocess.run(
        [sys.executable, "-c", CONVERT, str(LLAMA_CPP), str(folder), str(out), pre], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return out


def plain(field: Field) -> tuple:
    value = field.value.tolist() if isinstance(field.value, np.ndarray) else field.value
    return field.type, field.element, np.float32(value) if isinstance(value, float) else value


def data(container: Container, name: str) -> bytes:
    start = container.offsets[name]
    return container.path.read_bytes()[start : start + container.specs[name].nbytes]


def assert_same(ours: Path, theirs: Path, but: tuple[str, ...] = ()) -> None:
    """Every key, type and value (``but`` for the values of some); every tensor's name, place in the order, type, shape and bytes. Ours has
    quantcli.* keys besides."""
    a, b = read_header(ours), read_header(theirs)
    assert [key for key in a.fields if not key.startswith("quantcli.")] == list(b.fields)
    for key, field in b.fields.items():
        assert key in but or plain(a.fields[key]) == plain(field), key
    assert list(a.specs.values()) == list(b.specs.values())
    for name in a.specs:
        assert data(a, name) == data(b, name), name


@pytest.fixture(scope="module", params=["untied", "tied, llama3 rotary scaling"])
def model(request: pytest.FixtureRequest, tiny_llama: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(a model folder, what convert_hf_to_gguf makes of it)."""
    tied = request.param != "untied"
    folder = tiny_llama(layers=8, tied=tied, shards=2)
    if tied:
        edit_config(folder, rope_parameters=LLAMA3)
    return folder, convert(folder, tmp_path_factory.mktemp("converted") / "bf16.gguf", "gpt-2")


@pytest.mark.parametrize("file_type", FILE_TYPES)
def test_a_file_equals_that_of_convert_and_llama_quantize(model: tuple[Path, Path], file_type: str, tmp_path: Path) -> None:
    folder, converted = model
    run("llama-quantize", converted, tmp_path / "theirs.gguf", file_type, "1")
    with Checkpoint.open(str(folder)) as source:
        ours = export(source, tmp_path / f"{folder.name}.gguf", file_type, {"seed": 0})
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
    with Checkpoint.open(str(folder)) as source:
        ours = export(source, tmp_path / f"{folder.name}.gguf", file_type, {"recipe": {"mix": file_type}})
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
    with Checkpoint.open(str(folder)) as source:
        ours = export(source, tmp_path / "ours.gguf", "Q4_K_M", **options)
    a, b = read_header(ours), read_header(tmp_path / "theirs.gguf")
    assert a.specs == b.specs


@pytest.mark.parametrize("file_type", ["Q4_K_M", "Q8_0"])
def test_llama_cpp_generates_from_our_file(model: tuple[Path, Path], file_type: str, tmp_path: Path) -> None:
    with Checkpoint.open(str(model[0])) as source:
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
    with Checkpoint.open(str(PICO)) as source:
        list(pipeline.quantize(source, tmp_path / "coded", recipe))
    with Checkpoint.open(str(tmp_path / "coded")) as source:
        decoded = export(source, tmp_path / "decoded.gguf", "F32")
        list(pipeline.quantize(source, tmp_path / "kept.gguf", recipe_that_keeps(source, "gguf")))
    theirs = perplexity_in_llama_cpp(decoded, text)
    assert perplexity_in_llama_cpp(tmp_path / "kept.gguf", text) == pytest.approx(theirs, rel=0.01)  # ggml rounds activations to 8 bits


@pytest.mark.parametrize("name", [name for name in recipes.shipped() if recipes.load(name).format == "gguf"])
def test_llama_cpp_loads_what_a_recipe_writes_and_finds_the_decoded_weights_perplexity(name: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(topics.topics["assignment"] + topics.topics["typesseq"])
    with Checkpoint.open(str(PICO)) as source:
        list(pipeline.quantize(source, tmp_path / "ours.gguf", recipes.load(name)))
    with Checkpoint.open(str(tmp_path / "ours.gguf")) as source:
        decoded = export(source, tmp_path / "decoded.gguf", "F32")
    theirs = perplexity_in_llama_cpp(decoded, text)
    assert perplexity_in_llama_cpp(tmp_path / "ours.gguf", text) == pytest.approx(theirs, rel=0.01)


def ids_of_llama_cpp(path: Path, text: str, folder: Path) -> list[int]:
    prompt = folder / "prompt.txt"
    prompt.write_bytes(text.encode())
    out = run("llama-tokenize", "-m", path, "-f", prompt, "--ids", "--log-disable", "--no-escape")
    return ast.literal_eval(out.strip().splitlines()[-1])


def trained(expressions: tuple[str, ...], ignore_merges: bool) -> Tokenizer:
    """A byte-level BPE of 480 tokens that cuts text by ``expressions`` and begins each text with its first token."""
    bpe = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    cuts: list[Any] = [pre_tokenizers.Split(Regex(e), "isolated") for e in expressions]
    bpe.pre_tokenizer = pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|begin_of_text|>", "<|end_of_text|>"]
    trainer = trainers.BpeTrainer(vocab_size=480, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([*(text[:2000] for text in topics.topics.values()), *NASTY * 3], trainer)
    bpe.add_special_tokens([AddedToken("<|eot|>", special=True)])
    bpe.add_tokens([AddedToken("<tool>", special=False)])
    bpe.post_processor = processors.TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)])
    return bpe


NAMED = {name: key for key, name in pretokenizers.NAMES.items() if name != "falcon"}
"""All but Falcon's, whose Punctuation step is no expression; it has a test of its name."""


@pytest.mark.parametrize("name", NAMED)
def test_a_named_pre_tokenizer_gives_the_ids_of_the_tokenizers_library(name: str, tiny_llama: Any, tmp_path: Path) -> None:
    folder = tiny_llama(hidden=64, intermediate=64, layers=1)
    bpe = trained(*NAMED[name])
    bpe.save(str(folder / "tokenizer.json"))
    with Checkpoint.open(str(folder)) as source:
        path = export(source, tmp_path / "m.gguf", "F16")
    assert read_header(path).get("tokenizer.ggml.pre") == name
    for text in (*NASTY, SPECIAL):
        assert ids_of_llama_cpp(path, text, tmp_path) == bpe.encode(text).ids, text


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_sentencepiece_model_gives_the_ids_of_its_library(kind: str, tiny_llama: Any, tmp_path: Path) -> None:
    folder = edit_config(tiny_llama(hidden=64, intermediate=64, layers=1, vocab=700), bos_token_id=1, eos_token_id=2)
    trained_model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in topics.topics.values() for line in text.splitlines() if line.strip()][:4000]),
        model_writer=trained_model,
        vocab_size=700,
        model_type=kind,
        byte_fallback=kind == "bpe",
        normalization_rule_name="identity" if kind == "bpe" else "nmt_nfkc",
        remove_extra_whitespaces=kind == "unigram",
        allow_whitespace_only_pieces=kind == "bpe",
        split_digits=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        minloglevel=2,
        num_threads=1,
    )
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(trained_model.getvalue())
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True, "add_eos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with Checkpoint.open(str(folder)) as source:
        path = export(source, tmp_path / "m.gguf", "F16")
    library = sentencepiece.SentencePieceProcessor(model_proto=trained_model.getvalue())
    for text in NASTY:
        assert ids_of_llama_cpp(path, text, tmp_path) == [1, *library.encode(text)], text


@pytest.fixture
def converted_pieces(tiny_llama: Any, tmp_path: Path) -> Callable[[Path], None]:
    """Checks a folder's tokenizer keys against convert_hf_to_gguf's."""

    def check(folder: Path) -> None:
        theirs = read_header(convert(folder, tmp_path / "theirs.gguf", "llama-bpe"))
        with Checkpoint.open(str(folder)) as source:
            ours = read_header(export(source, tmp_path / "ours.gguf", "BF16"))
        for key, field in theirs.fields.items():
            assert plain(ours.fields[key]) == plain(field), key
        assert {key for key in ours.fields if not key.startswith("quantcli.")} == set(theirs.fields)

    return check


def test_tokenizer_metadata_equals_converts_with_special_tokens_and_a_template(tiny_llama: Any, converted_pieces: Callable) -> None:
    folder = tiny_llama(hidden=64, intermediate=64, layers=1)
    trained(*NAMED["llama-bpe"]).save(str(folder / "tokenizer.json"))
    converted_pieces(folder)
