"""A model folder's tokenizer as GGUF metadata: byte-level BPE, SentencePiece, and tokenizer.json's forms of SentencePiece."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import gguf
from gguf import GGUFWriter, TokenType

from quantcli.errors import CheckpointError, UnsupportedError
from quantcli.formats.gguf import pretokenizers
from quantcli.formats.gguf.metadata import read_object
from quantcli.formats.gguf.spm import SentencePiece, read_sentencepiece

SPACE = "\u2581"
SPACE_BYTE = "\u0120"
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


@dataclass(frozen=True)
class Files:
    """A tokenizer's files: tokenizer_config.json and tokenizer.json, parsed ({} where there is none)."""

    folder: Path
    settings: Mapping
    parsed: Mapping

    @classmethod
    def of(cls, folder: Path) -> Files:
        return cls(folder, read_object(folder / "tokenizer_config.json"), read_object(folder / "tokenizer.json"))


def add_tokenizer(keys: GGUFWriter, folder: Path, vocab_size: int, pre_tokenizer: str | None = None) -> None:
    """tokenizer.*: everything llama.cpp needs to turn text into the ids of the tokenizer in ``folder``.

    ``pre_tokenizer`` overrides the name found from tokenizer.json. Raises :class:`CheckpointError` when there is no tokenizer or it
    does not fit ``vocab_size``, :class:`UnsupportedError` when llama.cpp has no such tokenizer.
    """
    files = Files.of(folder)
    try:
        _add(keys, files, vocab_size, pre_tokenizer)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(
            f"{folder}: the tokenizer's files are not laid out as the tokenizers library writes them ({reason})"
        ) from error


def _add(keys: GGUFWriter, files: Files, vocab_size: int, pre_tokenizer: str | None) -> None:
    if (prefix := files.settings.get("add_prefix_space")) is not None:
        keys.add_add_space_prefix(bool(prefix))
    if model := read_sentencepiece(files.folder / "tokenizer.model", required=not files.parsed):
        add_sentencepiece(keys, model, files, vocab_size)
    elif not files.parsed:
        raise CheckpointError(
            f"{files.folder}: no tokenizer.json or tokenizer.model; save the tokenizer there with save_pretrained and try again"
        )
    else:
        add_json(keys, files, vocab_size, pre_tokenizer)


def add_json(keys: GGUFWriter, files: Files, vocab_size: int, pre_tokenizer: str | None) -> None:
    model = files.parsed.get("model", {})
    kind = model.get("type")
    if kind == "Unigram":
        add_unigram_json(keys, files, vocab_size)
    elif kind == "BPE" and model.get("byte_fallback"):
        add_byte_fallback_bpe(keys, files, vocab_size)
    elif kind == "BPE":
        add_byte_level_bpe(keys, files, vocab_size, pre_tokenizer)
    else:
        where = files.folder / "tokenizer.json"
        raise UnsupportedError(f"{where}: a {kind} tokenizer; quantcli writes BPE, SentencePiece and Unigram ones as GGUF")


def add_byte_level_bpe(keys: GGUFWriter, files: Files, vocab_size: int, pre_tokenizer: str | None) -> None:
    """GPT-2's kind, Llama 3's too: tokens over an alphabet of bytes, and merges by rank."""
    vocabulary = Vocabulary.empty(vocab_size)
    for token, id in files.parsed["model"]["vocab"].items():
        vocabulary.set(id, token, TokenType.NORMAL, 0.0)
    add_added_tokens(vocabulary, files)
    keys.add_tokenizer_model("gpt2")
    keys.add_tokenizer_pre(pre_tokenizer or pretokenizers.name_of(files.parsed))
    keys.add_token_list(vocabulary.tokens)
    keys.add_token_types(vocabulary.types)
    keys.add_token_merges([merge_text(merge) for merge in files.parsed["model"]["merges"]])
    add_special(keys, vocabulary, files)


def merge_text(merge: str | Sequence[str]) -> str:
    """A merge as GGUF has it, "left right", from either form of tokenizer.json; a space inside a half is written as the byte alphabet's."""
    if isinstance(merge, str):
        return merge
    left, right = merge
    return f"{left.replace(' ', SPACE_BYTE)} {right.replace(' ', SPACE_BYTE)}"


def add_byte_fallback_bpe(keys: GGUFWriter, files: Files, vocab_size: int) -> None:
    """A SentencePiece BPE that came as tokenizer.json alone. SentencePiece merges by the score of the outcome, so a piece's score is
    minus the rank of the merge that makes it: exactly what transformers made the merges from.
    """
    model = files.parsed["model"]
    vocabulary = Vocabulary.empty(vocab_size)
    rank: dict[str, int] = {}
    for i, merge in enumerate(model["merges"]):
        rank.setdefault("".join(merge.split(" ", 1) if isinstance(merge, str) else merge), i)
    for token, id in model["vocab"].items():
        vocabulary.set(id, token, piece_type(token, model.get("unk_token")), -float(rank.get(token, len(rank))))
    add_added_tokens(vocabulary, files)
    if files.settings.get("add_prefix_space") is None and not prepends_space(files.parsed):
        keys.add_add_space_prefix(False)
    add_pieces(keys, "llama", vocabulary)
    add_special(keys, vocabulary, files)


def add_unigram_json(keys: GGUFWriter, files: Files, vocab_size: int) -> None:
    """A Unigram model in tokenizer.json: pieces by log probability; llama.cpp calls it t5."""
    vocabulary = Vocabulary.empty(vocab_size)
    pieces, unknown = files.parsed["model"]["vocab"], files.parsed["model"].get("unk_id")
    for id, (token, score) in enumerate(pieces):
        vocabulary.set(id, token, TokenType.UNKNOWN if id == unknown else piece_type(token, None), score)
    add_added_tokens(vocabulary, files)
    steps = list(flat(files.parsed.get("normalizer"), "normalizers"))
    if files.settings.get("add_prefix_space") is None:
        keys.add_add_space_prefix(prepends_space(files.parsed))
    keys.add_remove_extra_whitespaces(any(step.get("pattern") == {"Regex": " {2,}"} for step in steps))
    if charsmap := next((step.get("precompiled_charsmap") for step in steps if step["type"] == "Precompiled"), None):
        keys.add_precompiled_charsmap(base64.b64decode(charsmap))
    add_pieces(keys, "t5", vocabulary)
    # llama.cpp would end every text with T5's end token unless told otherwise
    add_special(keys, vocabulary, files, roles={} if unknown is None else {"unk": unknown}, adds={"bos": False, "eos": False})


def add_pieces(keys: GGUFWriter, model: str, vocabulary: Vocabulary) -> None:
    keys.add_tokenizer_model(model)
    keys.add_tokenizer_pre("default")
    keys.add_token_list(vocabulary.tokens)
    keys.add_token_scores(vocabulary.scores)
    keys.add_token_types(vocabulary.types)


def add_special(
    keys: GGUFWriter,
    vocabulary: Vocabulary,
    files: Files,
    *,
    roles: Mapping[str, int] | None = None,
    adds: Mapping[str, bool] | None = None,
) -> None:
    """Ids of the special roles, whether bos and eos are added, and the chat template.

    The ids are those of the tokens tokenizer_config.json names; else config.json's; else ``roles``, what the tokenizer's model says.
    ``adds``: role → is it added to a text, where no file says so.
    """
    special = gguf.SpecialVocab(files.folder, n_vocab=len(vocabulary.tokens))
    ids = {token: id for id, token in enumerate(vocabulary.tokens)}
    named = {word.removesuffix("_token"): ids.get(content_of(files.settings.get(word))) for word in SPECIAL_WORDS}
    known = {role: id for role, id in named.items() if id is not None}
    special.special_token_ids = {**(roles or {}), **special.special_token_ids, **known}
    special.add_special_token = {**(adds or {}), **special.add_special_token}
    special.add_to_gguf(keys, quiet=True)


def content_of(token: object) -> str:
    """The text of a special token, whether tokenizer_config.json has it as text or as an object; empty when it has none."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""


def piece_type(token: str, unknown: str | None) -> TokenType:
    if token == unknown:
        return TokenType.UNKNOWN
    return TokenType.BYTE if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token) else TokenType.NORMAL


def add_added_tokens(vocabulary: Vocabulary, files: Files) -> None:
    """Tokens beside the model: tokenizer.json's, tokenizer_config.json's, and those a special role names."""
    for token in files.parsed.get("added_tokens", []):
        vocabulary.add(token["id"], token["content"], special=bool(token.get("special")))
    add_configured_tokens(vocabulary, files.settings)
    extra = files.settings.get("extra_special_tokens") or []
    roles = [files.settings.get(word) for word in SPECIAL_WORDS] + list(extra.values() if isinstance(extra, dict) else extra)
    contents = {content_of(role) for role in roles} - {""}
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


def add_sentencepiece(keys: GGUFWriter, model: SentencePiece, files: Files, vocab_size: int) -> None:
    """Pieces, scores and types from tokenizer.model; added tokens from added_tokens.json and tokenizer_config.json."""
    vocabulary = Vocabulary.empty(vocab_size)
    for id, (piece, score, kind) in enumerate(model.pieces):
        vocabulary.set(id, piece, kind, score)
    for token, id in read_object(files.folder / "added_tokens.json").items():
        vocabulary.set(id, token, TokenType.USER_DEFINED, ADDED_SCORE)
    add_configured_tokens(vocabulary, files.settings)
    if files.settings.get("add_prefix_space") is None and (model.is_unigram or not model.adds_prefix):
        keys.add_add_space_prefix(model.adds_prefix)
    if model.is_unigram:
        keys.add_remove_extra_whitespaces(model.merges_spaces)
    if model.is_unigram and model.charsmap:
        keys.add_precompiled_charsmap(model.charsmap)
    add_pieces(keys, "t5" if model.is_unigram else "llama", vocabulary)
    add_special(keys, vocabulary, files, roles=model.roles, adds={"bos": True, "eos": False} if model.is_unigram else {})
