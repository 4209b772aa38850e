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
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from quantcli.errors import CheckpointError, UnsupportedError
from quantcli.formats.gguf.tokens.merges import merge_text
from quantcli.formats.gguf.tokens.spm import read_sentencepiece
from quantcli.formats.gguf.tokens.tokenizer import add_tokenizer
from quantcli.formats.gguf.tokens.vocabulary import Vocabulary
from support.converted_tokenizers import CONVERTED, GOLDEN, OTHERWISE, VOCAB_SIZE, family_named, folder_of, manifest, write
from support.gguf_tokenizers import byte_level, tokenizer_keys

TEKKEN = family_named("tekken").cuts[0]


@pytest.mark.parametrize("name", CONVERTED)
def test_a_familys_keys_are_those_of_llama_cpps_converter(name: str, tmp_path: Path) -> None:
    ours = manifest(write(folder_of(name, tmp_path), tmp_path / "ours.gguf", VOCAB_SIZE, CONVERTED[name][1]))
    theirs = json.loads(GOLDEN.read_text())[name]
    assert {key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)} == {key for family, key in OTHERWISE if family == name}


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


def test_added_tokens_beyond_the_embedding_are_left_out_with_a_note(spm: Callable[[str], Path], tmp_path: Path) -> None:
    """As llama.cpp's converter does: many fine-tunes add a padding token that has no row."""
    (tmp_path / "tokenizer.model").write_bytes((spm("bpe") / "tokenizer.model").read_bytes())
    (tmp_path / "added_tokens.json").write_text('{"[PAD]": 400}')
    (tmp_path / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"401": {"content": "<more>"}}}')
    keys = GGUFWriter(None, "llama")
    notes = add_tokenizer(keys, tmp_path, 400)
    assert len(keys.kv_data[0]["tokenizer.ggml.tokens"].value) == 400
    assert len(notes) == 1
    assert "[PAD], <more>" in notes[0]


def test_an_added_token_whose_text_the_vocabulary_has_leaves_its_own_id_unused(tmp_path: Path) -> None:
    """As in transformers, whose tokenizer gives that text the vocabulary's id and the other to nothing."""
    byte_level(tmp_path, added_tokens_decoder={"261": {"content": "he"}, "259": {"content": "<tool>"}, "260": {"content": "<tool>"}})
    keys = GGUFWriter(None, "llama")
    notes = add_tokenizer(keys, tmp_path, 262)
    fields = {key.removeprefix("tokenizer.ggml."): entry.value for key, entry in keys.kv_data[0].items()}
    assert fields["tokens"][256:] == ["he", "<|end|>", "<tool>", "<|im_start|>", "[PAD260]", "[PAD261]"]
    assert fields["token_type"][256] == fields["token_type"][258] == TokenType.USER_DEFINED
    assert fields["token_type"][260] == fields["token_type"][261] == TokenType.UNUSED
    assert [note for note in notes if "'he' twice, as 256 and 261: it is 256" in note]


def test_two_marks_of_spaces_beside_two_spaces_keep_their_own_text(tmp_path: Path) -> None:
    byte_level(tmp_path, added_tokens_decoder={"260": {"content": "\u2581\u2581"}, "261": {"content": "  "}})
    assert tokenizer_keys(tmp_path, 262)["tokens"][260:] == ["\u2581\u2581", "  "]


def test_a_piece_that_stands_twice_in_the_model_itself_is_a_checkpoint_error() -> None:
    vocabulary = Vocabulary.empty(3)
    for id in (0, 2):
        vocabulary.set(id, "ab", TokenType.NORMAL, 0.0)
    with pytest.raises(CheckpointError, match="'ab' twice, as 0 and 2"):
        vocabulary.ids()


def wordpiece(folder: Path, **normalizer: object) -> Path:
    vocab = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "un", "##able", "##a", "b", "!"])}
    bert = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    bert.normalizer = normalizers.BertNormalizer(**normalizer)
    bert.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    bert.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    bert.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    bert.save(str(folder / "tokenizer.json"))
    words = {f"{role}_token": f"[{role.upper()}]" for role in ("pad", "unk", "cls", "sep", "mask")}
    (folder / "tokenizer_config.json").write_text(json.dumps(words))
    return folder


def test_a_wordpiece_marks_the_pieces_that_begin_a_word(tmp_path: Path) -> None:
    keys = tokenizer_keys(wordpiece(tmp_path, lowercase=True), 11, arch="bert")
    assert keys["model"] == "bert"
    assert keys["tokens"] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "▁un", "able", "a", "▁b", "▁!", "▁[PAD10]"]
    assert keys["token_type"] == [TokenType.CONTROL] * 5 + [TokenType.NORMAL] * 5 + [TokenType.UNUSED]
    ids = {role: keys[f"{role}_token_id"] for role in ("padding", "unknown", "bos", "eos", "seperator", "mask")}
    assert ids == {"padding": 0, "unknown": 1, "bos": 2, "eos": 3, "seperator": 3, "mask": 4}
    assert (keys["add_bos_token"], keys["add_eos_token"], keys["add_sep_token"]) == (True, True, True)


@pytest.mark.parametrize(("lowercase", "strip_accents"), [(True, None), (False, None), (True, False)])
def test_a_wordpiece_says_what_becomes_of_capitals_and_accents(lowercase: bool, strip_accents: bool | None, tmp_path: Path) -> None:
    keys = tokenizer_keys(wordpiece(tmp_path, lowercase=lowercase, strip_accents=strip_accents), 10, arch="bert")
    assert keys["normalizer.lowercase"] is lowercase
    assert keys.get("normalizer.strip_accents") is strip_accents


def test_merges_over_characters_that_no_scores_can_say_stay_merges(tmp_path: Path) -> None:
    """``abc`` is made of ``a`` and ``bc`` alone: SentencePiece would also make it of ``ab`` and ``c``."""
    vocab = {token: i for i, token in enumerate(["<unk>", "<0x0A>", "▁", "a", "b", "c", "ab", "bc", "abc"])}
    bpe = Tokenizer(models.BPE(vocab, [("b", "c"), ("a", "b"), ("a", "bc")], unk_token="<unk>", byte_fallback=True))
    bpe.normalizer = normalizers.Replace(" ", "▁")
    bpe.save(str(tmp_path / "tokenizer.json"))
    keys = tokenizer_keys(tmp_path, 9)
    assert (keys["model"], keys["pre"], keys["merges"]) == ("gpt2", "sarvam-moe", ["b c", "a b", "a bc"])
    assert keys["token_type"][:3] == [TokenType.UNKNOWN, TokenType.BYTE, TokenType.NORMAL]
    assert "scores" not in keys


def test_words_that_whitespace_ends_have_a_tokenizer_of_their_own(tmp_path: Path) -> None:
    bpe = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    bpe.normalizer, bpe.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    bpe.save(str(tmp_path / "tokenizer.json"))
    keys = tokenizer_keys(tmp_path, 3)
    assert (keys["model"], keys["pre"], keys["merges"], keys["normalizer.lowercase"]) == ("whitespace", "whitespace", ["a b"], True)


def with_tokens(folder: Path, *tokens: str, **settings: object) -> Path:
    """:func:`byte_level` with more special tokens, from id 260 on."""
    byte_level(folder, **settings)
    bpe = Tokenizer.from_file(str(folder / "tokenizer.json"))
    bpe.add_special_tokens(list(tokens))
    bpe.save(str(folder / "tokenizer.json"))
    return folder


def test_generation_ends_where_the_models_own_does(tmp_path: Path) -> None:
    """llama.cpp stops at <|im_end|> by its text; <stop> and <halt> it must be told."""
    with_tokens(tmp_path, "<|im_end|>", "<stop>", "<halt>", "<third>")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [257, 260, 261, 262, 263, 9999]}')
    keys = tokenizer_keys(tmp_path, 270)
    assert (keys["eos_token_id"], keys["eom_token_id"], keys["eot_token_id"]) == (257, 261, 262)


def test_a_single_end_needs_no_further_roles(tmp_path: Path) -> None:
    byte_level(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 257}')
    assert not {"eot_token_id", "eom_token_id"} & set(tokenizer_keys(tmp_path, 260))


def test_roles_that_the_tokenizer_leaves_open_come_from_the_config(tmp_path: Path) -> None:
    byte_level(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "config.json").write_text('{"text_config": {"bos_token_id": 256, "eos_token_id": [257, 258], "pad_token_id": 9999}}')
    keys = tokenizer_keys(tmp_path, 260)
    assert (keys["bos_token_id"], keys["eos_token_id"]) == (256, 257)
    assert "padding_token_id" not in keys


def test_glm_gets_the_roles_that_only_its_texts_tell(tmp_path: Path) -> None:
    with_tokens(tmp_path, "<|endoftext|>", "[gMASK]", "<|user|>", "<|observation|>", eos_token="<|endoftext|>")
    keys = tokenizer_keys(tmp_path, 270, arch="glm4moe")
    roles = {role: keys[f"{role}_token_id"] for role in ("eos", "bos", "eot", "unknown", "eom")}
    assert roles == {"eos": 260, "bos": 261, "eot": 262, "unknown": 260, "eom": 263}
    assert tokenizer_keys(tmp_path, 270, arch="glm4")["bos_token_id"] == 260


def test_fill_in_the_middle_tokens_unknown_to_llama_cpp_are_named(tmp_path: Path) -> None:
    keys = tokenizer_keys(with_tokens(tmp_path, "[PREFIX]", "[SUFFIX]", "[MIDDLE]"), 270)
    assert [keys[f"fim_{part}_token_id"] for part in ("pre", "suf", "mid")] == [260, 261, 262]


def test_fill_in_the_middle_tokens_that_llama_cpp_finds_need_no_names(tmp_path: Path) -> None:
    keys = tokenizer_keys(with_tokens(tmp_path, "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"), 270)
    assert not [key for key in keys if key.startswith("fim")]


def template(single: str, pair: str | None = None) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(single=single, pair=pair, special_tokens=[("<|end|>", 257), ("<|im_start|>", 259)])


@pytest.mark.parametrize(
    ("post_processor", "adds"),
    [
        (None, {}),
        (processors.ByteLevel(), {"bos": False, "eos": False}),
        (template("$A"), {}),
        (template("<|im_start|> $A"), {"bos": True}),
        (template("$A <|end|>"), {"eos": True}),
        (template("<|im_start|> $A <|end|>"), {"bos": True, "eos": True}),
        (template("<|im_start|> $A", "<|im_start|> $A <|end|> $B:1"), {"bos": True, "sep": True}),
        (processors.RobertaProcessing(("<|end|>", 257), ("<|im_start|>", 259)), {"bos": True, "eos": True, "sep": True}),
        (processors.Sequence([processors.ByteLevel(), template("<|im_start|> $A")]), {"bos": True, "eos": False}),
    ],
    ids=["none", "bytes", "nothing", "begin", "end", "both", "pair", "roberta", "sequence"],
)
def test_what_is_put_around_a_text_comes_from_the_post_processor(post_processor: object, adds: dict, tmp_path: Path) -> None:
    byte_level(tmp_path, bos_token="<|im_start|>")
    bpe = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    if post_processor is not None:
        bpe.post_processor = post_processor
    bpe.save(str(tmp_path / "tokenizer.json"))
    keys = tokenizer_keys(tmp_path, 260)
    assert {role: keys[f"add_{role}_token"] for role in ("bos", "eos", "sep") if f"add_{role}_token" in keys} == adds


def test_an_end_that_is_not_eos_becomes_it_and_eos_the_end_of_turn(tmp_path: Path) -> None:
    byte_level(tmp_path, eos_token="he")
    bpe = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    bpe.post_processor = template("$A <|end|>")
    bpe.save(str(tmp_path / "tokenizer.json"))
    keys = tokenizer_keys(tmp_path, 260)
    assert (keys["eos_token_id"], keys["eot_token_id"]) == (257, 256)


def test_the_configs_word_counts_where_the_tokenizer_has_none(tmp_path: Path) -> None:
    keys = tokenizer_keys(byte_level(tmp_path, add_bos_token=True, add_eos_token=False), 260)
    assert (keys["add_bos_token"], keys["add_eos_token"]) == (True, False)


def test_special_tokens_of_the_older_files_are_control_tokens(tmp_path: Path) -> None:
    byte_level(tmp_path, additional_special_tokens=["<tool>"])
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": {"content": "he"}}')
    keys = tokenizer_keys(tmp_path, 260)
    assert keys["padding_token_id"] == 256
    assert keys["token_type"][256] == keys["token_type"][258] == TokenType.CONTROL


def test_several_chat_templates_have_a_name_each(tmp_path: Path) -> None:
    templates = [{"name": name, "template": f"{{{{ {name} }}}}"} for name in ("tool_use", "default", "rag-x")]
    keys = tokenizer_keys(byte_level(tmp_path, chat_template=templates), 260)
    assert keys["chat_template"] == "{{ default }}"
    assert keys["chat_templates"] == ["rag_x", "tool_use"]
    assert (keys["chat_template.tool_use"], keys["chat_template.rag_x"]) == ("{{ tool_use }}", "{{ rag-x }}")


def test_template_files_come_before_the_setting_as_in_transformers(tmp_path: Path) -> None:
    byte_level(tmp_path, chat_template="{{ stale }}")
    (tmp_path / "chat_template.jinja").write_text("{{ fresh }}")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates/tool_use.jinja").write_text("{{ tools }}")
    keys = tokenizer_keys(tmp_path, 260)
    assert (keys["chat_template"], keys["chat_templates"], keys["chat_template.tool_use"]) == ("{{ fresh }}", ["tool_use"], "{{ tools }}")


def test_a_template_in_the_processors_file_is_found(tmp_path: Path) -> None:
    (byte_level(tmp_path) / "chat_template.json").write_text('{"chat_template": "{{ z }}"}')
    assert tokenizer_keys(tmp_path, 260)["chat_template"] == "{{ z }}"


def test_a_template_that_is_no_text_is_a_checkpoint_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="chat_template is neither"):
        tokenizer_keys(byte_level(tmp_path, chat_template=7), 260)


def test_t5s_own_file_name_is_read_where_there_is_no_other(spm: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "spiece.model").write_bytes((spm("unigram") / "tokenizer.model").read_bytes())
    assert tokenizer_keys(tmp_path, 400)["model"] == "t5"


def test_a_bpe_without_bytes_is_noted(tmp_path: Path) -> None:
    bpe = Tokenizer(models.BPE({"<unk>": 0, "▁": 1, "a": 2, "▁a": 3}, [("▁", "a")], unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace()
    bpe.save(str(tmp_path / "tokenizer.json"))
    notes = add_tokenizer(GGUFWriter(None, "llama"), tmp_path, 4)
    assert ["no byte tokens" in note for note in notes] == [True]


def tekken(folder: Path, *pieces: bytes, pattern: str = TEKKEN) -> Path:
    """tekken.json: two special tokens of four, the bytes, then ``pieces``."""
    tokens = [bytes([byte]) for byte in range(256)] + list(pieces)
    parsed = {
        "config": {"pattern": pattern, "default_num_special_tokens": 4, "default_vocab_size": 4 + len(tokens)},
        "special_tokens": [{"rank": 0, "token_str": "<unk>", "is_control": True}, {"rank": 1, "token_str": "<s>", "is_control": True}],
        "vocab": [{"rank": rank, "token_bytes": base64.b64encode(token).decode()} for rank, token in enumerate(tokens)],
    }
    (folder / "tekken.json").write_text(json.dumps(parsed))
    return folder


def test_mistrals_own_file_gives_ids_behind_the_special_tokens_and_merges_by_rank(tmp_path: Path) -> None:
    keys = tokenizer_keys(tekken(tmp_path, b"ab", b"cd", b"abcd", "é".encode(), b"abce"), 265)
    assert (keys["model"], keys["pre"], keys["add_bos_token"], keys["bos_token_id"], keys["unknown_token_id"]) == (
        "gpt2",
        "tekken",
        True,
        1,
        0,
    )
    assert keys["tokens"][:4] == ["<unk>", "<s>", "<SPECIAL_2>", "<SPECIAL_3>"]
    assert keys["token_type"][:5] == [*[TokenType.CONTROL] * 4, TokenType.NORMAL]
    assert keys["tokens"][4 + 97] == "a"
    assert keys["tokens"][4 + 32] == "Ġ"
    assert keys["tokens"][260:] == ["ab", "cd", "abcd", "Ã©", "abce"]
    assert keys["merges"] == ["a b", "c d", "ab cd", "Ã ©"], "nothing makes abce: ab, c and e never become two"


def test_mistrals_own_file_is_cut_at_the_models_size(tmp_path: Path) -> None:
    assert tokenizer_keys(tekken(tmp_path, b"ab", b"cd"), 261)["tokens"][259:] == ["ÿ", "ab"]


def test_mistrals_own_file_with_another_expression_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="nearest: tekken"):
        tokenizer_keys(tekken(tmp_path, pattern=TEKKEN.replace(r"|\p{N}|", r"|\p{N}{1,2}|")), 260)


def damage_no_files(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def damage_model(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"no model")


def damage_json(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")


def damage_layout(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": ["a"]}}')


def damage_text(folder: Path) -> None:
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace('"<tool>"', '"\\ud800"'))


def damage_expression(folder: Path) -> None:
    parsed = json.loads((folder / "tokenizer.json").read_text())
    parsed["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": "(" * 5000}, "behavior": "Isolated"}
    (folder / "tokenizer.json").write_text(json.dumps(parsed))


def test_an_expression_that_no_one_can_read_is_unknown(tmp_path: Path) -> None:
    damage_expression(byte_level(tmp_path))
    with pytest.raises(UnsupportedError, match="nearest"):
        tokenizer_keys(tmp_path, 260)


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (damage_text, "half of a surrogate pair"),
        (damage_no_files, "no tokenizer.json"),
        (damage_model, "SentencePiece"),
        (damage_json, "JSON"),
        (damage_layout, "laid out"),
    ],
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


def test_special_tokens_beyond_the_embedding_are_left_out_where_there_is_tokenizer_json_alone(tmp_path: Path) -> None:
    byte_level(tmp_path, added_tokens_decoder={"260": {"content": "<pad>", "special": True}})
    keys = GGUFWriter(None, "llama")
    (note,) = add_tokenizer(keys, tmp_path, 260)
    assert note == "added tokens beyond the embedding's 260 rows are left out: <pad>"
    byte_level(tmp_path, added_tokens_decoder={"260": {"content": "hello", "special": False}})
    with pytest.raises(CheckpointError, match="'hello' has id 260"):
        tokenizer_keys(tmp_path, 260)
