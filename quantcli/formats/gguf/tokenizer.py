"""A model folder's tokenizer as GGUF metadata: byte-level BPE, SentencePiece, and tokenizer.json's forms of SentencePiece."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import gguf
from gguf import GGUFWriter, TokenType

from quantcli.errors import CheckpointError, UnsupportedError
from quantcli.formats.gguf import pretokenizers
from quantcli.formats.gguf.metadata import read_object
from quantcli.formats.gguf.spm import SentencePiece, read_sentencepiece

SPACE = "\u2581"
ADDED_SCORE, PAD_SCORE = -1000.0, -10000.0
SPECIAL_LOOKS = {"<pad>", "<mask>", "<2mass>", "[@BOS@]"}
SPECIAL_WORDS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass
class Vocabulary:
    """Pieces by id, as llama.cpp wants them. Ids that the tokenizer leaves out are unused ``[PAD<id>]`` pieces."""

    tokens: list[str]
    types: list[int]
    scores: list[float] = field(default_factory=list)

    @classmethod
    def empty(cls, size: int) -> Vocabulary:
        return cls([f"[PAD{i}]" for i in range(size)], [TokenType.UNUSED] * size, [PAD_SCORE] * size)

    def set(self, id: int, token: str, kind: TokenType, score: float) -> None:
        if not 0 <= id < len(self.tokens):
            raise CheckpointError(
                f"the tokenizer's {token!r} has id {id}, but config.json's vocab_size is {len(self.tokens)}; they do not match"
            )
        self.tokens[id], self.types[id], self.scores[id] = token, kind, score

    def add(self, id: int, token: str, *, special: bool) -> None:
        """An added token: matched as it is before anything else, and never printed when ``special``."""
        if special or looks_special(token):
            self.set(id, token, TokenType.CONTROL, ADDED_SCORE)
        else:
            self.set(id, token.replace(SPACE, " "), TokenType.USER_DEFINED, ADDED_SCORE)


def looks_special(token: str) -> bool:
    """Control tokens that some models publish as ordinary ones."""
    bracketed = any(token.startswith(a) and token.endswith(b) for a, b in (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">")))
    return bracketed or token in SPECIAL_LOOKS


def add_tokenizer(keys: GGUFWriter, folder: Path, vocab_size: int, pre_tokenizer: str | None = None) -> None:
    """tokenizer.*: everything llama.cpp needs to turn text into the ids of the tokenizer in ``folder``.

    ``pre_tokenizer`` overrides the name found from tokenizer.json. Raises :class:`CheckpointError` when there is no tokenizer or it
    does not fit ``vocab_size``, :class:`UnsupportedError` when llama.cpp has no such tokenizer.
    """
    settings = read_object(folder / "tokenizer_config.json")
    parsed = read_object(folder / "tokenizer.json")
    if (prefix := settings.get("add_prefix_space")) is not None:
        keys.add_add_space_prefix(bool(prefix))
    if model := read_sentencepiece(folder / "tokenizer.model", required=not parsed):
        add_sentencepiece(keys, model, folder, settings, vocab_size)
    elif not parsed:
        raise CheckpointError(
            f"{folder}: no tokenizer.json or tokenizer.model; save the tokenizer there with save_pretrained and try again"
        )
    else:
        add_json(keys, parsed, folder, settings, vocab_size, pre_tokenizer)


def add_json(keys: GGUFWriter, parsed: Mapping, folder: Path, settings: Mapping, vocab_size: int, pre_tokenizer: str | None) -> None:
    kind = parsed.get("model", {}).get("type")
    if kind == "Unigram":
        add_unigram_json(keys, parsed, folder, settings, vocab_size)
    elif kind == "BPE" and parsed["model"].get("byte_fallback"):
        add_byte_fallback_bpe(keys, parsed, folder, settings, vocab_size)
    elif kind == "BPE":
        add_byte_level_bpe(keys, parsed, folder, settings, vocab_size, pre_tokenizer)
    else:
        raise UnsupportedError(
            f"{folder / 'tokenizer.json'}: a {kind} tokenizer; quantcli writes BPE, SentencePiece and Unigram ones as GGUF"
        )


def add_byte_level_bpe(
    keys: GGUFWriter, parsed: Mapping, folder: Path, settings: Mapping, vocab_size: int, pre_tokenizer: str | None
) -> None:
    """GPT-2's kind, Llama 3's too: tokens over an alphabet of bytes, and merges by rank."""
    vocabulary = Vocabulary.empty(vocab_size)
    for token, id in parsed["model"]["vocab"].items():
        vocabulary.set(id, token, TokenType.NORMAL, 0.0)
    add_added_tokens(vocabulary, parsed, settings)
    keys.add_tokenizer_model("gpt2")
    keys.add_tokenizer_pre(pre_tokenizer or pretokenizers.name_of(parsed))
    keys.add_token_list(vocabulary.tokens)
    keys.add_token_types(vocabulary.types)
    gguf.SpecialVocab(folder, load_merges=True).add_to_gguf(keys, quiet=True)


def add_byte_fallback_bpe(keys: GGUFWriter, parsed: Mapping, folder: Path, settings: Mapping, vocab_size: int) -> None:
    """A SentencePiece BPE that came as tokenizer.json alone. SentencePiece merges by the score of the outcome, so a piece's score is
    minus the rank of the merge that makes it: exactly what transformers made the merges from.
    """
    vocabulary = Vocabulary.empty(vocab_size)
    rank: dict[str, int] = {}
    for i, merge in enumerate(parsed["model"]["merges"]):
        rank.setdefault("".join(merge.split(" ", 1) if isinstance(merge, str) else merge), i)
    for token, id in parsed["model"]["vocab"].items():
        vocabulary.set(id, token, piece_type(token, parsed["model"].get("unk_token")), -float(rank.get(token, len(rank))))
    add_added_tokens(vocabulary, parsed, settings)
    if settings.get("add_prefix_space") is None and not prepends_space(parsed):
        keys.add_add_space_prefix(False)
    add_pieces(keys, "llama", vocabulary, folder)


def add_unigram_json(keys: GGUFWriter, parsed: Mapping, folder: Path, settings: Mapping, vocab_size: int) -> None:
    """A Unigram model in tokenizer.json: pieces by log probability; llama.cpp calls it t5."""
    vocabulary = Vocabulary.empty(vocab_size)
    pieces = parsed["model"]["vocab"]
    unknown = parsed["model"].get("unk_id")
    for id, (token, score) in enumerate(pieces):
        vocabulary.set(id, token, piece_type(token, None if unknown is None else pieces[unknown][0]), score)
    add_added_tokens(vocabulary, parsed, settings)
    steps = list(flat(parsed.get("normalizer"), "normalizers"))
    if settings.get("add_prefix_space") is None:
        keys.add_add_space_prefix(prepends_space(parsed))
    keys.add_remove_extra_whitespaces(any(step.get("pattern") == {"Regex": " {2,}"} for step in steps))
    if charsmap := next((step.get("precompiled_charsmap") for step in steps if step["type"] == "Precompiled"), None):
        keys.add_precompiled_charsmap(base64.b64decode(charsmap))
    add_pieces(keys, "t5", vocabulary, folder)


def add_pieces(keys: GGUFWriter, model: str, vocabulary: Vocabulary, folder: Path) -> None:
    keys.add_tokenizer_model(model)
    keys.add_tokenizer_pre("default")
    keys.add_token_list(vocabulary.tokens)
    keys.add_token_scores(vocabulary.scores)
    keys.add_token_types(vocabulary.types)
    gguf.SpecialVocab(folder, n_vocab=len(vocabulary.tokens)).add_to_gguf(keys, quiet=True)


def piece_type(token: str, unknown: str | None) -> TokenType:
    if token == unknown:
        return TokenType.UNKNOWN
    return TokenType.BYTE if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token) else TokenType.NORMAL


def add_added_tokens(vocabulary: Vocabulary, parsed: Mapping, settings: Mapping) -> None:
    """Tokens beside the model: tokenizer.json's, tokenizer_config.json's, and those a special role names."""
    for token in parsed.get("added_tokens", []):
        vocabulary.add(token["id"], token["content"], special=bool(token.get("special")))
    add_configured_tokens(vocabulary, settings)
    extra = settings.get("extra_special_tokens") or []
    roles = [settings.get(word) for word in SPECIAL_WORDS] + list(extra.values() if isinstance(extra, dict) else extra)
    contents = {role.get("content") if isinstance(role, dict) else role for role in roles}
    for id, token in enumerate(vocabulary.tokens):
        if token in contents and vocabulary.types[id] in (TokenType.NORMAL, TokenType.USER_DEFINED):
            vocabulary.types[id] = TokenType.CONTROL


def add_configured_tokens(vocabulary: Vocabulary, settings: Mapping) -> None:
    """tokenizer_config.json's added_tokens_decoder: id → content and whether it is special."""
    for id, token in (settings.get("added_tokens_decoder") or {}).items():
        vocabulary.add(int(id), token["content"], special=bool(token.get("special")))


def flat(step: Mapping | None, key: str) -> Iterator[Mapping]:
    """A normalizer or pre-tokenizer as its plain steps."""
    if step is None:
        return
    if step.get("type") != "Sequence":
        yield step
        return
    for part in step[key]:
        yield from flat(part, key)


def prepends_space(parsed: Mapping) -> bool:
    """Does a space stand before the first word of a text?"""
    steps = [*flat(parsed.get("normalizer"), "normalizers"), *flat(parsed.get("pre_tokenizer"), "pretokenizers")]
    prepends = any(step["type"] == "Prepend" for step in steps)
    return prepends or any(step["type"] == "Metaspace" and metaspace_prepends(step) for step in steps)


def metaspace_prepends(step: Mapping) -> bool:
    """Metaspace before and after tokenizers 0.15: a flag, then a scheme (always, first, never)."""
    return step["prepend_scheme"] != "never" if "prepend_scheme" in step else bool(step.get("add_prefix_space", True))


def add_sentencepiece(keys: GGUFWriter, model: SentencePiece, folder: Path, settings: Mapping, vocab_size: int) -> None:
    """Pieces, scores and types from tokenizer.model; added tokens from added_tokens.json and tokenizer_config.json."""
    vocabulary = Vocabulary.empty(vocab_size)
    for id, (piece, score, kind) in enumerate(model.pieces):
        vocabulary.set(id, piece, kind, score)
    for token, id in read_object(folder / "added_tokens.json").items():
        vocabulary.set(id, token, TokenType.USER_DEFINED, ADDED_SCORE)
    add_configured_tokens(vocabulary, settings)
    if settings.get("add_prefix_space") is None and (model.is_unigram or not model.adds_prefix):
        keys.add_add_space_prefix(model.adds_prefix)
    if model.is_unigram:
        keys.add_remove_extra_whitespaces(model.merges_spaces)
        if model.charsmap:
            keys.add_precompiled_charsmap(model.charsmap)
    add_pieces(keys, "t5" if model.is_unigram else "llama", vocabulary, folder)
