"""llama.cpp reads our tokenizers as transformers reads the source: small ones of every kind, and the vocabularies of real models.

Needs a built llama.cpp source tree at QUANTCLI_LLAMA_CPP. Its ``models/ggml-vocab-*.gguf`` are vocabularies of published models, and the
``.inp`` and ``.out`` beside them texts and the ids that transformers gives them.
"""

from __future__ import annotations

import ast
import base64
import io
import json
import os
import re
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from pydoc_data import topics

import pytest
import sentencepiece
from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers.pre_tokenizers import PreTokenizer

from quantcli.formats import open_checkpoint
from quantcli.formats.gguf.file.container import Container
from quantcli.formats.gguf.file.headers import read_header
from quantcli.formats.gguf.tokens.merges import byte_alphabet
from quantcli.formats.gguf.tokens.pretokenizers import FAMILIES, KNOWN_NAMES, Family
from quantcli.formats.gguf.tokens.spm import read_sentencepiece
from support.converted_tokenizers import GOLDEN, converted, family_named, pre_tokenizer_of, save, write
from support.gguf_export import export

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


def trained_pieces(folder: Path, kind: str, **options: object) -> sentencepiece.SentencePieceProcessor:
    """tokenizer.model of 700 pieces in ``folder``, SentencePiece's ``bpe`` or ``unigram``."""
    folder.mkdir(exist_ok=True)
    model = io.BytesIO()
    usual = {
        "byte_fallback": kind == "bpe",
        "normalization_rule_name": "identity" if kind == "bpe" else "nmt_nfkc",
        "remove_extra_whitespaces": kind == "unigram",
        "allow_whitespace_only_pieces": kind == "bpe",
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines()),
        model_writer=model,
        vocab_size=700,
        model_type=kind,
        split_digits=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        minloglevel=2,
        num_threads=1,
        **(usual | options),
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    (folder / "config.json").write_text("{}")
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def byte_level(folder: Path, pre: str, *tokens: str, **settings: object) -> Path:
    """A byte-level BPE as the family ``pre`` cuts, with special ``tokens`` besides."""
    family = family_named(pre)
    bpe = trained(pre_tokenizer_of(family), family.ignores_merges)
    bpe.add_special_tokens(list(tokens))
    words = {"eos_token": "<|end_of_text|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    return save(bpe, folder, **(words | settings))


def bert(folder: Path, **normalizer: bool) -> Path:
    pieces = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    pieces.normalizer, pieces.pre_tokenizer = normalizers.BertNormalizer(**normalizer), pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces.train_from_iterator(corpus(), trainers.WordPieceTrainer(vocab_size=1500, special_tokens=special, show_progress=False))
    pieces.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    words = {f"{role}_token": f"[{role.upper()}]" for role in ("unk", "sep", "pad", "cls", "mask")}
    return save(pieces, folder, tokenizer_class="BertTokenizer", **words)


def saved(folder: Path, parsed: Mapping) -> Tokenizer:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(parsed))
    (folder / "config.json").write_text("{}")
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def test_the_golden_keys_are_what_convert_writes_today(tmp_path: Path) -> None:
    assert converted(LLAMA_CPP, tmp_path) == json.loads(GOLDEN.read_text())


def check_ids(path: Path, folder: Path, encode: Callable[[str], list[int]], *, but: frozenset[str] = frozenset()) -> None:
    """llama.cpp's ids on ``path`` are those of ``encode`` for every text, except in the texts of ``but``."""
    different = {what for what, text in NASTY.items() if ids_of_llama_cpp(path, text, folder) != encode(text)}
    assert different == but


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_sentencepiece_model_gives_the_ids_of_its_library(kind: str, tmp_path: Path) -> None:
    library = trained_pieces(tmp_path / "m", kind)
    words = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True, "add_eos_token": False}
    (tmp_path / "m/tokenizer_config.json").write_text(json.dumps(words))
    # the library takes <s>, </s> and <unk> in a text for text
    check_ids(
        write(tmp_path / "m", tmp_path / "m.gguf", 700), tmp_path, lambda text: [1, *library.encode(text)], but=frozenset({"special"})
    )


def test_a_sentencepiece_bpe_without_bytes_gives_the_ids_of_its_library_for_what_it_knows(tmp_path: Path) -> None:
    library = trained_pieces(tmp_path / "m", "bpe", byte_fallback=False)
    path = write(tmp_path / "m", tmp_path / "m.gguf", 700)
    known = [text for text in NASTY.values() if library.unk_id() not in library.encode(text) and "<" not in text]
    assert known
    for text in known:
        assert ids_of_llama_cpp(path, text, tmp_path) == [1, *library.encode(text)]


def merges_of(pieces: list[tuple[str, float]]) -> list[tuple[str, str]]:
    """A SentencePiece model's merges as transformers makes them: every way to make a piece, best piece first."""
    known = {text for text, _ in pieces}
    return [(t[:k], t[k:]) for t, _ in sorted(pieces, key=lambda p: -p[1]) for k in range(1, len(t)) if t[:k] in known and t[k:] in known]


def character_bpe(tokens: list[str], merges: list, added: list[Mapping], normalizer: Mapping, **model: object) -> dict:
    """A BPE over characters as a tokenizer.json."""
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": normalizer,
        "decoder": {"type": "ByteFallback"},
        "model": {
            "type": "BPE",
            "vocab": {token: id for id, token in enumerate(tokens)},
            "merges": merges,
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            **model,
        },
    }


SPACES_MARKED = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
SPACES_MARKED_AND_PREFIXED = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, SPACES_MARKED]}


def special(id: int, content: str, **more: bool) -> dict:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": id, "content": content, "special": True, **flags, **more}


def test_merges_made_of_scores_become_scores_again(tmp_path: Path) -> None:
    library = trained_pieces(tmp_path / "m", "bpe")
    (tmp_path / "m/tokenizer.model").unlink()
    pieces = [(library.id_to_piece(i), library.get_score(i)) for i in range(700)]
    added = [special(i, token) for i, token in enumerate(("<unk>", "<s>", "</s>"))]
    made = merges_of([p for p in pieces if not re.fullmatch("<.*>", p[0])])
    bpe = saved(tmp_path / "m", character_bpe([text for text, _ in pieces], made, added, SPACES_MARKED_AND_PREFIXED))
    path = write(tmp_path / "m", tmp_path / "m.gguf", 700)
    assert read_header(path).get("tokenizer.ggml.model") == "llama"
    check_ids(path, tmp_path, lambda text: [1, *bpe.encode(text).ids])


def test_merges_over_characters_trained_as_such_give_the_ids_of_the_tokenizers_library(tmp_path: Path) -> None:
    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    bpe.normalizer = normalizers.Replace(" ", "▁")
    bpe.pre_tokenizer = pre_tokenizers.Split(Regex("\n+"), "isolated")
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=1500, special_tokens=tokens, show_progress=False, limit_alphabet=300, max_token_length=12)
    bpe.train_from_iterator(lines(), trainer)
    parsed = json.loads(bpe.to_str())
    parsed["added_tokens"], parsed["pre_tokenizer"] = parsed["added_tokens"][:3], None
    bpe = saved(tmp_path / "m", parsed)
    path = write(tmp_path / "m", tmp_path / "m.gguf", 1500)
    assert read_header(path).get("tokenizer.ggml.pre") == "sarvam-moe"
    check_ids(path, tmp_path, lambda text: bpe.encode(text).ids)


@pytest.mark.parametrize("lowercase", [True, False])
def test_a_wordpiece_gives_the_ids_of_the_tokenizers_library(lowercase: bool, tmp_path: Path) -> None:
    folder = bert(tmp_path / "m", lowercase=lowercase)
    library = Tokenizer.from_file(str(folder / "tokenizer.json"))
    # with the accents llama.cpp also drops vowel signs that stand beside their letter, and Hangul's vowels
    but = frozenset({"scripts"} if lowercase else ())
    check_ids(
        write(folder, tmp_path / "m.gguf", 1500, "bert"),
        tmp_path,
        lambda text: library.encode(text).ids,
        but=but,
    )


def test_a_unigram_in_tokenizer_json_gives_the_ids_of_the_tokenizers_library(tmp_path: Path) -> None:
    """As transformers turns T5's and XLM-R's models into one."""
    trained_pieces(tmp_path / "m", "unigram")
    model = read_sentencepiece(tmp_path / "m/tokenizer.model", required=True)
    assert model is not None
    (tmp_path / "m/tokenizer.model").unlink()
    unigram = Tokenizer(models.Unigram([(text, score) for text, score, _ in model.pieces], unk_id=0))
    unigram.normalizer = normalizers.Sequence([normalizers.Precompiled(model.charsmap), normalizers.Replace(Regex(" {2,}"), " ")])
    unigram.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    unigram.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    unigram.add_special_tokens(["<unk>", "<s>", "</s>"])
    folder = save(unigram, tmp_path / "m", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    check_ids(write(folder, tmp_path / "m.gguf", 700, "t5"), tmp_path, lambda text: unigram.encode(text).ids)


PUBLISHED = ["gpt-2", "mpt", "starcoder", "refact", "command-r", "falcon", "deepseek-coder", "deepseek-llm", "llama-bpe", "qwen2", "qwen35"]


def real(name: str) -> tuple[Container, list[tuple[str, list[int]]]]:
    """A published model's vocabulary, and texts with the ids that transformers gives them."""
    path = LLAMA_CPP / f"models/ggml-vocab-{name}.gguf"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    texts, ids = path.with_name(path.name + ".inp"), path.with_name(path.name + ".out")
    if not texts.is_file():
        return read_header(path), []
    pairs = zip(texts.read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n"), ids.read_text().split("\n"), strict=False)
    return read_header(path), [(text, [int(id) for id in line.split()]) for text, line in pairs]


def added_of(tokens: list[str], types: list[int]) -> list[dict]:
    kinds = {TokenType.CONTROL: True, TokenType.USER_DEFINED: False}
    return [special(id, token, special=kinds[kind]) for id, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind in kinds]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_byte_level_vocabulary_is_recognised_and_read_alike(name: str, tmp_path: Path) -> None:
    theirs, texts = real(name)
    family = family_named(theirs.get("tokenizer.ggml.pre"))
    tokens, types = list(theirs.get("tokenizer.ggml.tokens")), [int(kind) for kind in theirs.get("tokenizer.ggml.token_type")]
    merges = list(theirs.get("tokenizer.ggml.merges"))
    bpe = Tokenizer(models.BPE(ignore_merges=family.ignores_merges))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizer_of(family), decoders.ByteLevel()
    parsed = json.loads(bpe.to_str())
    n_own = max(id for id, kind in enumerate(types) if kind == TokenType.NORMAL) + 1
    vocab = {token: id for id, token in enumerate(tokens[:n_own])}
    parsed["model"] |= {"vocab": vocab, "merges": [merge.split(" ", 1) for merge in merges]}
    parsed["added_tokens"] = added_of(tokens, types)
    library = saved(tmp_path / "m", parsed)
    path = write(tmp_path / "m", tmp_path / "m.gguf", len(tokens))
    ours = read_header(path)
    assert ours.get("tokenizer.ggml.pre") in family.names
    assert list(ours.get("tokenizer.ggml.tokens")) == list(tokens)
    assert list(ours.get("tokenizer.ggml.merges")) == list(merges)
    for text, ids in texts:
        assert library.encode(text).ids == ids, text
    # llama.cpp takes </s> for special even where it is an ordinary token, as in Qwen's
    text = "\n".join([*(text for text, _ in texts), *(text for what, text in NASTY.items() if what != "special")])
    assert ids_of_llama_cpp(path, text, tmp_path, "--no-bos") == library.encode(text).ids


@pytest.mark.parametrize("name", ["llama-spm", "phi-3"])
def test_a_published_sentencepiece_vocabulary_is_read_alike_from_merges(name: str, tmp_path: Path) -> None:
    theirs, texts = real(name)
    tokens, types = list(theirs.get("tokenizer.ggml.tokens")), [int(kind) for kind in theirs.get("tokenizer.ggml.token_type")]
    scores = theirs.get("tokenizer.ggml.scores")
    normal = [(token, float(scores[id])) for id, token in enumerate(tokens) if types[id] == TokenType.NORMAL]
    added = [special(0, "<unk>"), *added_of(tokens, types)]
    library = saved(tmp_path / "m", character_bpe(tokens, merges_of(normal), added, SPACES_MARKED_AND_PREFIXED))
    path = write(tmp_path / "m", tmp_path / "m.gguf", len(tokens))
    assert read_header(path).get("tokenizer.ggml.model") == "llama"
    for text, ids in texts:
        assert library.encode(text).ids == ids, text
    text = "\n".join([*(text for text, _ in texts if "<" not in text), *list(NASTY.values())[:-1]])
    assert ids_of_llama_cpp(path, text, tmp_path, "--no-bos") == library.encode(text).ids


def test_a_published_vocabulary_of_merges_over_characters_is_read_alike(tmp_path: Path) -> None:
    theirs, texts = real("gemma-4")
    tokens, types = list(theirs.get("tokenizer.ggml.tokens")), [int(kind) for kind in theirs.get("tokenizer.ggml.token_type")]
    merges = [merge.split(" ", 1) for merge in theirs.get("tokenizer.ggml.merges")]
    library = saved(tmp_path / "m", character_bpe(tokens, merges, added_of(tokens, types), SPACES_MARKED))
    path = write(tmp_path / "m", tmp_path / "m.gguf", len(tokens))
    for text, ids in texts:
        assert library.encode(text).ids == ids, text
    text = "\n".join([*(text for text, _ in texts), *NASTY.values()])
    assert ids_of_llama_cpp(path, text, tmp_path, "--no-bos") == library.encode(text).ids


def by_rank(piece: bytes, ranks: Mapping[bytes, int]) -> list[int]:
    """The ids of a piece of text as tiktoken finds them: whole, or by joining the pair of the lowest rank until there is none."""
    if piece in ranks:
        return [ranks[piece]]
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while True:
        pairs = [(ranks[parts[i] + parts[i + 1]], i) for i in range(len(parts) - 1) if parts[i] + parts[i + 1] in ranks]
        if not pairs:
            return [ranks[part] for part in parts]
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def test_mistrals_own_file_gives_the_ids_of_its_ranks(tmp_path: Path) -> None:
    cutter = pre_tokenizer_of(family_named("tekken"))
    alphabet = {char: byte for byte, char in enumerate(byte_alphabet())}
    pieces = sorted(trained(cutter, True).get_vocab(with_added_tokens=False).items(), key=lambda item: item[1])
    tokens = [bytes(alphabet[char] for char in text) for text, _ in pieces if not text.startswith("<|")]
    parsed = {
        "config": {"pattern": family_named("tekken").cuts[0], "default_num_special_tokens": 10},
        "special_tokens": [{"rank": i, "token_str": text, "is_control": True} for i, text in enumerate(("<unk>", "<s>", "</s>"))],
        "vocab": [{"rank": rank, "token_bytes": base64.b64encode(token).decode()} for rank, token in enumerate(tokens)],
    }
    (tmp_path / "tekken.json").write_text(json.dumps(parsed))
    path = write(tmp_path, tmp_path / "m.gguf", 10 + len(tokens))
    ranks = {token: 10 + rank for rank, token in enumerate(tokens)}

    def encode(text: str) -> list[int]:
        words = (bytes(alphabet[char] for char in word) for word, _ in cutter.pre_tokenize_str(text))
        return [1, *(id for word in words for id in by_rank(word, ranks))]

    check_ids(path, tmp_path, encode, but=frozenset({"special"}))  # which by_rank takes for text


def test_a_published_wordpiece_vocabulary_is_read_alike(tmp_path: Path) -> None:
    theirs, texts = real("bert-bge")
    tokens, types = list(theirs.get("tokenizer.ggml.tokens")), [int(kind) for kind in theirs.get("tokenizer.ggml.token_type")]
    plain_tokens = [
        token if kind == TokenType.CONTROL else token[1:] if token.startswith("▁") else f"##{token}"
        for token, kind in zip(tokens, types, strict=True)
    ]
    bert = Tokenizer(models.WordPiece({token: id for id, token in enumerate(plain_tokens)}, unk_token="[UNK]"))
    bert.normalizer, bert.pre_tokenizer = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    bert.add_special_tokens([token for token, kind in zip(tokens, types, strict=True) if kind == TokenType.CONTROL])
    words = {"cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]", "pad_token": "[PAD]", "mask_token": "[MASK]"}
    path = write(save(bert, tmp_path / "m", **words), tmp_path / "m.gguf", len(tokens), "bert")
    assert list(read_header(path).get("tokenizer.ggml.tokens")) == list(tokens)
    for text, ids in texts:
        assert bert.encode(text).ids == ids, text
    text = "\n".join(text for text, _ in texts)
    assert ids_of_llama_cpp(path, text, tmp_path)[1:-1] == bert.encode(text).ids


def test_llama_cpp_knows_where_generation_ends_and_what_fills_in(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_llama(hidden=64, intermediate=64, layers=1, vocab=1520)
    byte_level(folder / "tokenizer", "qwen2", "<|im_end|>", "<stop>", "[PREFIX]", "[SUFFIX]", "[MIDDLE]")
    for path in (folder / "tokenizer").glob("tokenizer*.json"):
        path.replace(folder / path.name)
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 1502, 1503]}')
    with open_checkpoint(str(folder)) as source:
        path = export(source, tmp_path / "m.gguf", "F16")
    said = "".join(run("llama-completion", "-m", path, "-p", "x", "-n", "1", "-t", "1", "-no-cnv", "--no-warmup", "-lv", "5"))
    assert set(re.findall(r"EOG token += (\d+)", said)) == {"1", "1502", "1503"}
    assert set(re.findall(r"FIM (\w+) token += (\d+)", said)) == {("PRE", "1504"), ("SUF", "1505"), ("MID", "1506")}
