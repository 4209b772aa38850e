"""Tokenizers as GGUF metadata: pieces, types, scores, special ids, and the pre-tokenizer's name."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from pydoc_data import topics

import pytest
import sentencepiece
from gguf import GGUFWriter, TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from quantcli.errors import CheckpointError, UnsupportedError
from quantcli.formats.gguf import pretokenizers
from quantcli.formats.gguf.metadata import fields_of
from quantcli.formats.gguf.spm import read_sentencepiece
from quantcli.formats.gguf.tokenizer import add_tokenizer, merge_text

LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace("{1,3}", "")


def byte_level(folder: Path, *, pre: object = None, ignore_merges: bool = False, **settings: object) -> Path:
    """A byte-level BPE with one merge, a special and a plain added token, and tokenizer_config.json of ``settings``."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, "he"])}
    bpe = Tokenizer(models.BPE(vocab, [("h", "e")], ignore_merges=ignore_merges))
    bpe.pre_tokenizer = pre or pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.add_special_tokens([AddedToken("<|end|>", special=True)])
    bpe.add_tokens([AddedToken("<tool>"), AddedToken("<|im_start|>")])
    bpe.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>", **settings}))
    (folder / "config.json").write_text("{}")
    return folder


def tokenizer_keys(folder: Path, vocab_size: int, pre: str | None = None) -> dict:
    keys = GGUFWriter(None, "llama")
    add_tokenizer(keys, folder, vocab_size, pre)
    return {key.removeprefix("tokenizer.").removeprefix("ggml."): field.value for key, field in fields_of(keys).items()}


def test_byte_level_bpe_has_tokens_types_merges_and_ids(tmp_path: Path) -> None:
    keys = tokenizer_keys(byte_level(tmp_path, chat_template="{{ x }}"), 262)
    assert keys["model"] == "gpt2"
    assert keys["pre"] == "gpt-2"
    assert keys["tokens"][256:] == ["he", "<|end|>", "<tool>", "<|im_start|>", "[PAD260]", "[PAD261]"]
    assert keys["token_type"][255:] == [
        *(TokenType.NORMAL, TokenType.NORMAL, TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.CONTROL),
        *(TokenType.UNUSED, TokenType.UNUSED),
    ]
    assert keys["merges"] == ["h e"]
    assert keys["eos_token_id"] == 257
    assert keys["chat_template"] == "{{ x }}"


def test_both_ways_to_write_merges_mean_the_same(tmp_path: Path) -> None:
    byte_level(tmp_path)
    pairs = tokenizer_keys(tmp_path, 260)["merges"]
    parsed = json.loads((tmp_path / "tokenizer.json").read_text())
    parsed["model"]["merges"] = [" ".join(m) if isinstance(m, list) else m for m in parsed["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(parsed))
    assert tokenizer_keys(tmp_path, 260)["merges"] == pairs == ["h e"]


def test_a_space_inside_a_merge_is_written_as_the_byte_alphabet_has_it() -> None:
    assert merge_text(["a b", "c"]) == "a\u0120b c"


def test_a_role_token_is_control_and_gets_its_id_though_nobody_added_it(tmp_path: Path) -> None:
    keys = tokenizer_keys(byte_level(tmp_path, bos_token={"content": "he", "special": True}), 260)
    assert keys["bos_token_id"] == 256
    assert keys["token_type"][256] == TokenType.CONTROL


def test_the_template_file_stands_in_for_the_setting(tmp_path: Path) -> None:
    byte_level(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ y }}")
    assert tokenizer_keys(tmp_path, 260)["chat_template"] == "{{ y }}"


def test_whether_bos_is_added_comes_from_the_post_processor(tmp_path: Path) -> None:
    byte_level(tmp_path, bos_token="<|end|>")
    bpe = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    bpe.post_processor = processors.TemplateProcessing(single="<|end|> $A", special_tokens=[("<|end|>", 257)])
    bpe.save(str(tmp_path / "tokenizer.json"))
    assert tokenizer_keys(tmp_path, 260)["add_bos_token"] is True


def split(*expressions: str) -> pre_tokenizers.PreTokenizer:
    cuts = [pre_tokenizers.Split(Regex(e), "isolated") for e in expressions]
    return pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


PRE_TOKENIZERS: dict[str, tuple[Callable[[], object], bool]] = {
    "gpt-2": (lambda: pre_tokenizers.ByteLevel(add_prefix_space=False), False),
    "llama-bpe": (lambda: split(LLAMA3), True),
    "smaug-bpe": (lambda: split(LLAMA3), False),
    "qwen2": (lambda: split(QWEN2), False),
    "smollm": (lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]), False),
    "falcon": (
        lambda: pre_tokenizers.Sequence(
            [
                pre_tokenizers.Punctuation("contiguous"),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
                pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
            ]
        ),
        False,
    ),
}


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_the_pre_tokenizer_is_named_from_its_expressions(name: str, tmp_path: Path) -> None:
    make, ignore_merges = PRE_TOKENIZERS[name]
    assert tokenizer_keys(byte_level(tmp_path, pre=make(), ignore_merges=ignore_merges), 260)["pre"] == name


@pytest.mark.parametrize(("expressions", "ignore_merges"), pretokenizers.NAMES)
def test_every_expression_of_the_table_is_one_the_tokenizers_library_takes(expressions: tuple[str, ...], ignore_merges: bool) -> None:
    for expression in expressions:
        pre_tokenizers.Split(Regex(expression), "isolated").pre_tokenize_str("Hello, wörld 12345\n")


def test_a_line_break_in_an_expression_may_be_written_either_way(tmp_path: Path) -> None:
    literal = QWEN2.replace(r"\r", "\r").replace(r"\n", "\n")
    assert tokenizer_keys(byte_level(tmp_path, pre=split(literal)), 260)["pre"] == "qwen2"


def test_an_unknown_pre_tokenizer_names_its_nearest_and_the_option(tmp_path: Path) -> None:
    byte_level(tmp_path, pre=split(LLAMA3.replace("{1,3}", "{1,7}")), ignore_merges=True)
    with pytest.raises(UnsupportedError, match=r"nearest: .*llama-bpe.*--pre-tokenizer"):
        tokenizer_keys(tmp_path, 260)
    assert tokenizer_keys(tmp_path, 260, "deepseek-llm")["pre"] == "deepseek-llm"


def sentences() -> list[str]:
    return [line for text in topics.topics.values() for line in text.splitlines() if line.strip()][:3000]


@pytest.fixture(scope="module")
def spm(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with a tokenizer.model of 400 pieces, ``bpe`` (bytes for unknown characters) or ``unigram`` (normalizing)."""
    cache: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in cache:
            model = io.BytesIO()
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(sentences()),
                model_writer=model,
                vocab_size=400,
                model_type=kind,
                byte_fallback=kind == "bpe",
                normalization_rule_name="identity" if kind == "bpe" else "nmt_nfkc",
                unk_id=0,
                bos_id=1,
                eos_id=2,
                user_defined_symbols=["<tool>"],
                character_coverage=0.99,
                hard_vocab_limit=False,
                minloglevel=2,
                num_threads=1,
            )
            cache[kind] = tmp_path_factory.mktemp(kind)
            (cache[kind] / "tokenizer.model").write_bytes(model.getvalue())
            (cache[kind] / "config.json").write_text("{}")
        return cache[kind]

    return make


def test_a_sentencepiece_bpe_has_its_pieces_scores_types_and_ids(spm: Callable[[str], Path]) -> None:
    folder = spm("bpe")
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    keys = tokenizer_keys(folder, 410)
    n = model.get_piece_size()
    assert keys["model"] == "llama"
    assert keys["tokens"][:n] == [model.id_to_piece(i) for i in range(n)]
    assert keys["scores"][:n] == [model.get_score(i) for i in range(n)]
    kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.BYTE]
    assert keys["token_type"][:5] == kinds
    assert keys["token_type"][n:] == [TokenType.UNUSED] * (410 - n)
    assert (keys["bos_token_id"], keys["eos_token_id"], keys["unknown_token_id"]) == (1, 2, 0)


def test_a_unigram_model_is_t5_with_its_normalization(spm: Callable[[str], Path]) -> None:
    keys = tokenizer_keys(spm("unigram"), 400)
    assert keys["model"] == "t5"
    assert len(keys["precompiled_charsmap"]) > 1000
    assert keys["remove_extra_whitespaces"] is True
    assert keys["add_space_prefix"] is True
    assert (keys["add_bos_token"], keys["add_eos_token"]) == (True, False)


def test_added_tokens_join_a_sentencepiece_model(spm: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes((spm("bpe") / "tokenizer.model").read_bytes())
    decoder = {"400": {"content": "<extra>", "special": True}, "401": {"content": "▁two"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder, "add_bos_token": True}))
    keys = tokenizer_keys(tmp_path, 402)
    assert keys["tokens"][400:] == ["<extra>", " two"]
    assert keys["token_type"][400:] == [TokenType.CONTROL, TokenType.USER_DEFINED]
    assert keys["add_bos_token"] is True


def test_a_bpe_of_merges_with_byte_fallback_scores_pieces_by_rank(spm: Callable[[str], Path], tmp_path: Path) -> None:
    """As transformers turns a SentencePiece BPE into merges: then the scores order pieces as the model's own do."""
    model = read_sentencepiece(spm("bpe") / "tokenizer.model", required=True)
    vocab = {text: id for id, (text, _, _) in enumerate(model.pieces)}
    made = sorted((text for text, _, kind in model.pieces if kind == TokenType.NORMAL), key=lambda text: -model.pieces[vocab[text]][1])
    merges = [(t[:k], t[k:]) for t in made for k in range(1, len(t)) if t[:k] in vocab and t[k:] in vocab]
    bpe = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bpe.save(str(tmp_path / "tokenizer.json"))
    keys = tokenizer_keys(tmp_path, 400)
    outcomes = {left + right for left, right in merges}
    assert keys["model"] == "llama"
    by_score = sorted(outcomes, key=lambda text: -keys["scores"][vocab[text]])
    assert by_score == [text for text in made if text in outcomes]
    assert keys["token_type"][vocab["<0x0A>"]] == TokenType.BYTE
    assert "add_space_prefix" not in keys


def test_no_space_is_put_before_a_text_when_the_tokenizer_puts_none(tmp_path: Path) -> None:
    bpe = Tokenizer(models.BPE({"<unk>": 0, "a": 1}, [], unk_token="<unk>", byte_fallback=True))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    bpe.save(str(tmp_path / "tokenizer.json"))
    assert tokenizer_keys(tmp_path, 2)["add_space_prefix"] is False


def test_a_unigram_in_tokenizer_json_is_t5_without_t5s_end(tmp_path: Path) -> None:
    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁a", -1.0), ("b", -2.5)], unk_id=0))
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.save(str(tmp_path / "tokenizer.json"))
    parsed = json.loads((tmp_path / "tokenizer.json").read_text())
    charsmap = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(b"table").decode()}
    parsed["normalizer"] = {
        "type": "Sequence",
        "normalizers": [charsmap, {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"}],
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(parsed))
    keys = tokenizer_keys(tmp_path, 3)
    assert keys["model"] == "t5"
    assert keys["scores"] == [0.0, -1.0, -2.5]
    assert keys["token_type"] == [TokenType.UNKNOWN, TokenType.NORMAL, TokenType.NORMAL]
    assert bytes(keys["precompiled_charsmap"]) == b"table"
    assert keys["remove_extra_whitespaces"] is True
    assert keys["add_space_prefix"] is True
    assert (keys["add_bos_token"], keys["add_eos_token"], keys["unknown_token_id"]) == (False, False, 0)


def test_a_tiktoken_file_called_tokenizer_model_gives_way_to_tokenizer_json(tmp_path: Path) -> None:
    (byte_level(tmp_path) / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    assert tokenizer_keys(tmp_path, 260)["model"] == "gpt2"


def damage_no_files(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def damage_model(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"no model")


def damage_json(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")


def damage_layout(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": ["a"]}}')


@pytest.mark.parametrize(
    ("damage", "word"),
    [(damage_no_files, "no tokenizer.json"), (damage_model, "SentencePiece"), (damage_json, "JSON"), (damage_layout, "laid out")],
)
def test_a_damaged_tokenizer_is_a_checkpoint_error(damage: Callable[[Path], None], word: str, tmp_path: Path) -> None:
    damage(byte_level(tmp_path))
    with pytest.raises(CheckpointError, match=word):
        tokenizer_keys(tmp_path, 260)


def test_a_vocabulary_larger_than_the_embedding_is_a_checkpoint_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="vocab_size is 258"):
        tokenizer_keys(byte_level(tmp_path), 258)


def test_other_kinds_of_tokenizer_are_refused(tmp_path: Path) -> None:
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UnsupportedError, match="WordLevel"):
        tokenizer_keys(tmp_path, 1)
