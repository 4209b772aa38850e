"""llama.cpp reads our tokenizers as transformers reads the source: small ones of every kind, and the vocabularies of real models.

Needs a built llama.cpp source tree at QUANTCLI_LLAMA_CPP. Its ``models/ggml-vocab-*.gguf`` are vocabularies of published models, and the
``.inp`` and ``.out`` beside them texts and the ids that transformers gives them.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from pydoc_data import topics

import pytest
from gguf import GGUFWriter
from test_gguf_tokenizer import pre_tokenizer_of
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tokenizers.pre_tokenizers import PreTokenizer

from quantcli.formats.gguf.container import read_header
from quantcli.formats.gguf.pretokenizers import FAMILIES, KNOWN_NAMES, Family
from quantcli.formats.gguf.tokenizer import add_tokenizer

pytestmark = pytest.mark.peer

LLAMA_CPP = Path(os.environ.get("QUANTCLI_LLAMA_CPP", "/nowhere"))
if not (LLAMA_CPP / "build/bin/llama-tokenize").is_file():
    pytest.skip("QUANTCLI_LLAMA_CPP names no built llama.cpp", allow_module_level=True)

NASTY = {
    "cases": "Hello, world! It's 12345 o'clock; we'LL see THEM'd I'm.  Two  spaces\t\ttabs\n\n\nlines \r\n crlf   \n end ",
    "letters": "naïve café Ünïcödé ÀÉÎ İstanbul ß ﬁ ½ ²³ ٣٤٥ १२३ Ⅷ",
    "scripts": "日本語のテスト、中文测试。한국어 테스트! ไทย ភាសាខ្មែរ हिन्दी العربية עברית",
    "signs": "🚀🦙👩‍👩‍👧 🏳️‍🌈 e\u0301 a\u0308 \u200d\u200b\ufeff zero\u00a0nbsp\u3000wide",
    "code": "def f(x):\n    return x**2 # 3.14 + 1e-5 != 0x7f\n\tif a&&b||c: {}[]()<>;:'\"\\/`~@#$%^",
    "words": "HTTPServer camelCase snake_case ALLCAPS123abc 1,234,567.89 2024-01-02",
    "spaces": "   leading and trailing   ",
    "quotes": "don’t ‘quote’ “double” — em–en … ！？、。「」ﾊﾝｶｸ ９９９ Ωmega ſ K",
    "control": "\x01\x7f control ᾳ ǅ ﷺ 𝔘𝔫𝔦 𐍈 Ёжик",
    "special": "<|begin_of_text|>special<|eot|> and <tool> <s> </s> <unk>",
}


def run(program: str, *arguments: str | Path) -> tuple[str, str]:
    done = subprocess.run(
        [LLAMA_CPP / "build/bin" / program, *arguments], capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, done.stderr


def write(folder: Path, path: Path, vocab_size: int, arch: str = "llama", pre: str | None = None) -> Path:
    """A GGUF file of nothing but the tokenizer of ``folder``."""
    keys = GGUFWriter(path, arch)
    add_tokenizer(keys, folder, vocab_size, pre)
    keys.write_header_to_file()
    keys.write_kv_data_to_file()
    keys.close()
    return path


def ids_of_llama_cpp(path: Path, text: str, folder: Path, *options: str) -> list[int]:
    prompt = folder / "prompt.txt"
    prompt.write_bytes(text.encode())
    out, _ = run("llama-tokenize", "-m", path, "-f", prompt, "--ids", "--log-disable", "--no-escape", *options)
    return ast.literal_eval(out.strip().splitlines()[-1])


def corpus() -> list[str]:
    return [*(text[:2000] for text in topics.topics.values()), *list(NASTY.values()) * 3]


def lines() -> list[str]:
    return [line for text in corpus() for line in text.splitlines() if line.strip()][:4000]


def trained(pre_tokenizer: PreTokenizer, ignore_merges: bool) -> Tokenizer:
    """A byte-level BPE of 1500 tokens that begins each text with its first token. Its merges know no cuts: two that differ show."""
    bpe = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|end_of_text|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=special, initial_alphabet=alphabet, show_progress=False, max_token_length=12
    )
    bpe.train_from_iterator([text[i : i + 60] for text in corpus() for i in range(0, len(text), 60)], trainer)
    bpe.pre_tokenizer = pre_tokenizer
    bpe.add_special_tokens([AddedToken("<|eot|>", special=True)])
    bpe.add_tokens([AddedToken("<tool>", special=False)])
    bpe.post_processor = processors.TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)])
    return bpe


def save(bpe: Tokenizer, folder: Path, **settings: object) -> Path:
    folder.mkdir(exist_ok=True)
    bpe.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text("{}")
    return folder


def test_every_pre_tokenizer_name_of_llama_cpp_is_known() -> None:
    source = (LLAMA_CPP / "src/llama-vocab.cpp").read_text()
    assert set(re.findall(r'tokenizer_pre == "([^"]+)"', source)) == KNOWN_NAMES


DIFFERENT: Mapping[str, frozenset[str]] = {
    "afmoe": frozenset({"words"}),  # llama.cpp counts digits in threes from the right also where a letter follows: 123abc
    "deepseek-llm": frozenset({"cases", "code", "words"}),  # it keeps digits together; the model's vocabulary has none of two
    "falcon": frozenset({"quotes"}),  # the tokenizer's last steps see bytes; full-width digits are none there
}
"""Texts of which llama.cpp's near expressions make other ids."""


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: next(iter(family.names)))
def test_a_pre_tokenizer_gives_the_ids_of_the_tokenizers_library(family: Family, tmp_path: Path) -> None:
    bpe = trained(pre_tokenizer_of(family), family.ignores_merges)
    path = write(save(bpe, tmp_path / "m"), tmp_path / "m.gguf", 1502)
    name = next(iter(family.names))
    assert read_header(path).get("tokenizer.ggml.pre") == name
    different = {what for what, text in NASTY.items() if ids_of_llama_cpp(path, text, tmp_path) != bpe.encode(text).ids}
    assert different == DIFFERENT.get(name, frozenset())
