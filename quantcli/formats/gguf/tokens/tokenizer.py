"""A model folder's tokenizer as GGUF metadata, from any of its files: BPE over bytes or characters, SentencePiece, Unigram, WordPiece."""

from __future__ import annotations

import base64
import difflib
import re
from collections.abc import Mapping
from pathlib import Path

from gguf import GGUFWriter, TokenType

from quantcli.errors import CheckpointError, UnsupportedError
from quantcli.formats.gguf.model.metadata import read_object
from quantcli.formats.gguf.tokens.merges import is_scored, merge_text, ranks_of
from quantcli.formats.gguf.tokens.pretokenizers import KNOWN_NAMES, begins_text, name_for
from quantcli.formats.gguf.tokens.recognition import drops_spaces, marks_spaces, prepends_space, recognise, removes_spaces, steps
from quantcli.formats.gguf.tokens.roles import Roles, integers
from quantcli.formats.gguf.tokens.spm import SentencePiece, read_sentencepiece
from quantcli.formats.gguf.tokens.templates import chat_templates, write_templates
from quantcli.formats.gguf.tokens.tokenizer_files import Files
from quantcli.formats.gguf.tokens.vocabulary import ADDED_SCORE, SPACE, Vocabulary

CONVERTED_AS_LLAMA = frozenset({"llama", "granite", "granitemoe", "smollm3", "arcee", "apertus"})
"""GGUF architectures for which convert_hf_to_gguf writes ``add_space_prefix`` whatever the kind of tokenizer."""

OVER_CHARACTERS = "sarvam-moe"
"""llama.cpp's name for merges over characters, not bytes, with spaces as ▁ and nothing put before the text."""

WORDS_ALONE = "whitespace"
"""Its tokenizer, and pre-tokenizer, of words that whitespace ends."""


def add_tokenizer(keys: GGUFWriter, folder: Path, vocab_size: int, pre_tokenizer: str | None = None) -> tuple[str, ...]:
    """tokenizer.*: everything llama.cpp needs to turn text into the ids of the tokenizer in ``folder``; returns what a user should know.

    ``pre_tokenizer`` overrides the name found from tokenizer.json. Raises :class:`CheckpointError` when there is no tokenizer or it
    does not fit ``vocab_size``, :class:`UnsupportedError` when llama.cpp has no such tokenizer.
    """
    try:
        files = Files.of(folder, vocab_size)
        return tuple(_add(keys, files, vocab_size, pre_tokenizer))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(
            f"{folder}: the tokenizer's files are not laid out as the tokenizers library writes them ({reason})"
        ) from error


def _add(keys: GGUFWriter, files: Files, vocab_size: int, pre_tokenizer: str | None) -> list[str]:
    notes = []
    if pre_tokenizer is not None and pre_tokenizer not in KNOWN_NAMES:
        near = difflib.get_close_matches(pre_tokenizer, sorted(KNOWN_NAMES), 3, 0.5)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        notes.append(
            f"pre-tokenizer {pre_tokenizer} is no name that quantcli knows of llama.cpp, which loads no file with one unknown to it{hint}"
        )
    if model := _sentencepiece(files):
        vocabulary = add_sentencepiece(keys, model, files, vocab_size)
    elif files.parsed:
        vocabulary = add_json(keys, files, vocab_size, pre_tokenizer)
    else:
        raise CheckpointError(
            f"{files.folder}: no tokenizer.json, tokenizer.model or tekken.json; save the tokenizer there with save_pretrained"
        )
    if vocabulary.left_out:
        notes.append(f"added tokens beyond the embedding's {vocab_size} rows are left out: {', '.join(vocabulary.left_out[:5])}")
    for id, other in sorted(vocabulary.doubled.items())[:3]:
        notes.append(
            f"the tokenizer has {vocabulary.tokens[other]!r} twice, as {other} and {id}: it is {other}, as in transformers, and {id} unused"
        )
    write_templates(keys, chat_templates(files.folder, files.settings))
    for entry in keys.kv_data[0].values():
        check_text(entry.value)
    return notes + notes_on_unknown(keys, vocabulary)


def check_text(value: object) -> None:
    """Raise ValueError for text that UTF-8 cannot hold: JSON's escapes can spell half a surrogate pair."""
    for text in [value] if isinstance(value, str) else value if isinstance(value, list) else []:
        if isinstance(text, str):
            text.encode()


def _sentencepiece(files: Files) -> SentencePiece | None:
    """tokenizer.model; where there is no tokenizer.json, also under the name that T5 gives it."""
    if model := read_sentencepiece(files.folder / "tokenizer.model", required=not files.parsed):
        return model
    return None if files.parsed else read_sentencepiece(files.folder / "spiece.model", required=True)


def notes_on_unknown(keys: GGUFWriter, vocabulary: Vocabulary) -> list[str]:
    """A warning where llama.cpp has no token for a character that the vocabulary lacks, and ends with an exception."""
    is_spm = keys.kv_data[0]["tokenizer.ggml.model"].value == "llama"
    if is_spm and TokenType.BYTE not in vocabulary.types:
        return ["the vocabulary has no byte tokens: llama.cpp fails on text with characters that it lacks, where transformers gives <unk>"]
    return []


def add_json(keys: GGUFWriter, files: Files, vocab_size: int, pre_tokenizer: str | None) -> Vocabulary:
    model = files.parsed.get("model", {})
    kind = model.get("type")
    if kind == "Unigram":
        return add_unigram_json(keys, files, vocab_size)
    if kind == "WordPiece":
        return add_wordpiece(keys, files, vocab_size)
    if kind != "BPE":
        where = files.folder / "tokenizer.json"
        raise UnsupportedError(f"{where}: a {kind} tokenizer; quantcli writes BPE, SentencePiece, Unigram and WordPiece ones as GGUF")
    if model.get("byte_fallback") or marks_spaces(files.parsed):
        return add_character_bpe(keys, files, vocab_size)
    if drops_spaces(files.parsed):
        return add_word_bpe(keys, files, vocab_size)
    return add_byte_level_bpe(keys, files, vocab_size, pre_tokenizer)


def add_byte_level_bpe(keys: GGUFWriter, files: Files, vocab_size: int, pre_tokenizer: str | None) -> Vocabulary:
    """GPT-2's kind, Llama 3's too: tokens over an alphabet of bytes, and merges by rank."""
    vocabulary = pieces_of(files, vocab_size)
    if pre_tokenizer is None:
        found = recognise(files.parsed)
        name, begins = name_for(found, keys.arch), found.begins
    else:
        name, begins = pre_tokenizer, begins_text(pre_tokenizer)
    if keys.arch in CONVERTED_AS_LLAMA and (prefix := files.settings.get("add_prefix_space")) is not None:
        keys.add_add_space_prefix(bool(prefix))
    write_merges(keys, "gpt2", vocabulary, files, name)
    roles = write_roles(keys, vocabulary, files)
    if begins and "bos" not in roles.adds:
        keys.add_add_bos_token(False)  # no file declares that a text begins with a token, but llama.cpp takes the name to mean so
    return vocabulary


def pieces_of(files: Files, vocab_size: int, scores: Mapping[str, float] | None = None, *, over_bytes: bool = True) -> Vocabulary:
    """A BPE's or WordPiece's pieces and what was added to them; ``over_bytes``: none is a byte or unknown by its looks."""
    model = files.parsed["model"]
    vocabulary = Vocabulary.empty(vocab_size)
    for token, id in model["vocab"].items():
        kind = TokenType.NORMAL if over_bytes else piece_type(token, model.get("unk_token"))
        vocabulary.set(id, token, kind, (scores or {}).get(token, 0.0))
    add_added_tokens(vocabulary, files)
    return vocabulary


def write_merges(keys: GGUFWriter, model: str, vocabulary: Vocabulary, files: Files, pre_tokenizer: str) -> None:
    keys.add_tokenizer_model(model)
    keys.add_tokenizer_pre(pre_tokenizer)
    keys.add_token_list(vocabulary.tokens)
    keys.add_token_types(vocabulary.types)
    keys.add_token_merges([merge_text(merge) for merge in files.parsed["model"]["merges"]])


def add_word_bpe(keys: GGUFWriter, files: Files, vocab_size: int) -> Vocabulary:
    """A BPE over the characters of words, whitespace between them dropped."""
    vocabulary = pieces_of(files, vocab_size, over_bytes=False)
    write_merges(keys, WORDS_ALONE, vocabulary, files, WORDS_ALONE)
    write_normalizer(keys, files)
    write_roles(keys, vocabulary, files)
    return vocabulary


def add_character_bpe(keys: GGUFWriter, files: Files, vocab_size: int) -> Vocabulary:
    """A BPE over characters, with ▁ for spaces. From SentencePiece, it merges by the score of the outcome: minus the rank of the merge
    that makes it, as transformers made the merges from the scores. Merges that were trained as such keep their own order.
    """
    ranks = ranks_of(files.parsed["model"])
    prepends = prepends_space(files.parsed)
    if not prepends and not is_scored(files.parsed["model"], ranks, {token["content"] for token in files.added().values()}):
        vocabulary = pieces_of(files, vocab_size, over_bytes=False)
        write_merges(keys, "gpt2", vocabulary, files, OVER_CHARACTERS)
        write_roles(keys, vocabulary, files)
        return vocabulary
    lowest = float(len(files.parsed["model"]["merges"]))
    scores = {token: -float(ranks[token][0]) if token in ranks else -lowest for token in files.parsed["model"]["vocab"]}
    vocabulary = pieces_of(files, vocab_size, scores, over_bytes=False)
    write_space_prefix(keys, files, prepends, usual=True)
    write_scored(keys, "llama", vocabulary)
    write_roles(keys, vocabulary, files)
    return vocabulary


def add_unigram_json(keys: GGUFWriter, files: Files, vocab_size: int) -> Vocabulary:
    """A Unigram model in tokenizer.json: pieces by log probability; llama.cpp calls it t5."""
    vocabulary = Vocabulary.empty(vocab_size)
    pieces, unknown = files.parsed["model"]["vocab"], files.parsed["model"].get("unk_id")
    for id, (token, score) in enumerate(pieces):
        vocabulary.set(id, token, TokenType.UNKNOWN if id == unknown else piece_type(token, None), score)
    add_added_tokens(vocabulary, files)
    write_space_prefix(keys, files, prepends_space(files.parsed), usual=None)
    keys.add_remove_extra_whitespaces(removes_spaces(files.parsed))
    for step in steps(files.parsed.get("normalizer"), "normalizers"):
        if step["type"] == "Precompiled" and step.get("precompiled_charsmap"):
            keys.add_precompiled_charsmap(base64.b64decode(step["precompiled_charsmap"]))
    write_scored(keys, "t5", vocabulary)
    # llama.cpp would end every text with T5's end token unless it is set otherwise
    write_roles(keys, vocabulary, files, known={} if unknown is None else {"unk": unknown}, adds={"bos": False, "eos": False})
    return vocabulary


def add_wordpiece(keys: GGUFWriter, files: Files, vocab_size: int) -> Vocabulary:
    """BERT's kind. In GGUF a word's first piece begins with ▁ and the others have no ##, so that one search serves for both."""
    model = files.parsed["model"]
    if (mark := model.get("continuing_subword_prefix", "##")) != "##":
        raise UnsupportedError(f"{files.folder / 'tokenizer.json'}: WordPiece whose pieces go on with {mark!r}; llama.cpp knows ## alone")
    vocabulary = pieces_of(files, vocab_size)
    for id, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)):
        if kind != TokenType.CONTROL:
            vocabulary.tokens[id] = token[2:] if token.startswith("##") else SPACE + token
    keys.add_token_type_count(files.config.get("type_vocab_size", 1))
    keys.add_tokenizer_model("bert")
    keys.add_tokenizer_pre("default")
    keys.add_token_list(vocabulary.tokens)
    keys.add_token_types(vocabulary.types)
    write_normalizer(keys, files)
    write_roles(keys, vocabulary, files)
    return vocabulary


def write_normalizer(keys: GGUFWriter, files: Files) -> None:
    """Whether letters are made small and lose their accents, where tokenizer.json asks for it."""
    for step in steps(files.parsed.get("normalizer"), "normalizers"):
        flags = {"Lowercase": {"lowercase": True}, "StripAccents": {"strip_accents": True}, "BertNormalizer": step}.get(step["type"], {})
        for flag in ("lowercase", "strip_accents"):
            if flags.get(flag) is not None:
                keys.add_bool(f"tokenizer.ggml.normalizer.{flag}", flags[flag])


def add_sentencepiece(keys: GGUFWriter, model: SentencePiece, files: Files, vocab_size: int) -> Vocabulary:
    """Pieces, scores and types from tokenizer.model; added tokens from the files next to it."""
    vocabulary = Vocabulary.empty(vocab_size)
    for id, (piece, score, kind) in enumerate(model.pieces):
        vocabulary.set(id, piece, kind, score)
    for token, id in read_object(files.folder / "added_tokens.json").items():
        if id >= vocab_size:
            vocabulary.left_out.append(token)
            continue
        vocabulary.set(id, token, TokenType.USER_DEFINED, ADDED_SCORE)
    vocabulary.add_within({id: token for id, token in files.added().items() if id >= len(model.pieces)})
    vocabulary.add_within(files.configured())
    usual = None if model.is_unigram else True
    write_space_prefix(keys, files, model.adds_prefix, usual=usual)
    if model.is_unigram:
        keys.add_remove_extra_whitespaces(model.merges_spaces)
        if model.charsmap:
            keys.add_precompiled_charsmap(model.charsmap)
    write_scored(keys, "t5" if model.is_unigram else "llama", vocabulary)
    write_roles(keys, vocabulary, files, known=model.roles, adds={"bos": True, "eos": False} if model.is_unigram else {})
    return vocabulary


def write_scored(keys: GGUFWriter, model: str, vocabulary: Vocabulary) -> None:
    keys.add_tokenizer_model(model)
    keys.add_tokenizer_pre("default")
    keys.add_token_list(vocabulary.tokens)
    keys.add_token_scores(vocabulary.scores)
    keys.add_token_types(vocabulary.types)


def write_space_prefix(keys: GGUFWriter, files: Files, prepends: bool, *, usual: bool | None) -> None:
    """Is a space put before a text? as tokenizer_config.json sets it, else the tokenizer's, which need not be written where it is the
    ``usual`` thing for its kind.
    """
    if (configured := files.settings.get("add_prefix_space")) is not None:
        keys.add_add_space_prefix(bool(configured))
    elif prepends is not usual:
        keys.add_add_space_prefix(prepends)


def write_roles(
    keys: GGUFWriter,
    vocabulary: Vocabulary,
    files: Files,
    *,
    known: Mapping[str, int] | None = None,
    adds: Mapping[str, bool] | None = None,
) -> Roles:
    """Ids of the special roles, and which of them are added to a text.

    ``known``: role → id as the tokenizer's model has it, where no file does; ``adds``: role → is it added, likewise.
    """
    generation = read_object(files.folder / "generation_config.json")
    roles = Roles.of(files.settings, files.parsed)
    roles.adds = {**(adds or {}), **roles.adds}
    roles.find(vocabulary.ids(), files.config, keys.arch, known or {})
    roles.stop_at([*integers(generation.get("eos_token_id")), *integers(files.config.get("eos_token_id"))], vocabulary.tokens)
    roles.write(keys)
    return roles


def piece_type(token: str, unknown: str | None) -> TokenType:
    if token == unknown:
        return TokenType.UNKNOWN
    return TokenType.BYTE if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token) else TokenType.NORMAL


def add_added_tokens(vocabulary: Vocabulary, files: Files) -> None:
    """Tokens in addition to the model: tokenizer.json's, tokenizer_config.json's, and those a special role names."""
    vocabulary.add_within(files.added())
    vocabulary.add_within(files.configured())
    vocabulary.name_specials(files.settings)
