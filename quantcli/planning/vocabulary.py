"""How many tokens the tokenizer of a folder has, and which of them no row of the embedding answers to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typing_extensions import TypeIs

from quantcli.checkpoint.json_files import read_json
from quantcli.formats.gguf.tokens.spm import read_sentencepiece


@dataclass(frozen=True, slots=True)
class Tokens:
    """``texts``: id → token; ``ordinary``: ids of those that text is cut into, where the others are special, or may be: no text but a
    template's has these."""

    texts: Mapping[int, str]
    ordinary: frozenset[int]

    @property
    def size(self) -> int:
        """The embedding's rows that they need."""
        return max(self.texts, default=-1) + 1

    def beyond(self, n_rows: int) -> list[int]:
        """The ids that an embedding of ``n_rows`` has no row for."""
        return sorted(id for id in self.texts if id >= n_rows)


def tokens_of(folder: Path) -> Tokens:
    """The tokens of the tokenizer in ``folder``; none where there is no tokenizer. :class:`CheckpointError` for a file that is no JSON."""
    parsed = _object(folder / "tokenizer.json")
    pieces = dict(_pieces(parsed.get("model"))) or dict(_other_pieces(folder))
    added: dict[int, str] = {id: text for text, id in _object(folder / "added_tokens.json").items() if _is_id(id)}
    flags: dict[int, bool] = {}
    listed = parsed.get("added_tokens")
    entries = [(token.get("id"), token) for token in listed if isinstance(token, Mapping)] if isinstance(listed, list) else []
    configured = _object(folder / "tokenizer_config.json").get("added_tokens_decoder")
    entries += [(int(id), token) for id, token in configured.items() if id.isdecimal()] if isinstance(configured, Mapping) else []
    for id, token in entries:
        if _is_id(id) and isinstance(token, Mapping) and isinstance(token.get("content"), str):
            added[id] = token["content"]
            if isinstance(token.get("special"), bool):
                flags[id] = token["special"]
    ordinary = {id for id in pieces if not flags.get(id, False)} | {id for id in added if flags.get(id) is False}
    return Tokens({**pieces, **added}, frozenset(ordinary))


def _pieces(model: Any) -> Iterator[tuple[int, str]]:
    """Id and text of the pieces of tokenizer.json's model: a table, or (Unigram) a list of pieces and scores."""
    vocab = model.get("vocab") if isinstance(model, Mapping) else None
    if isinstance(vocab, Mapping):
        yield from ((id, text) for text, id in vocab.items() if _is_id(id))
    elif isinstance(vocab, list):
        yield from ((id, str(piece[0])) for id, piece in enumerate(vocab) if isinstance(piece, list) and piece)


def _other_pieces(folder: Path) -> Iterator[tuple[int, str]]:
    """The same of a folder without tokenizer.json: tokenizer.model, or GPT-2's vocab.json."""
    if (model := read_sentencepiece(folder / "tokenizer.model", required=False)) is not None:
        yield from ((id, text) for id, (text, *_) in enumerate(model.pieces))
    else:
        yield from ((id, text) for text, id in _object(folder / "vocab.json").items() if _is_id(id))


def _object(path: Path) -> Mapping[str, Any]:
    found = read_json(path, unique=False) if path.is_file() else {}
    return found if isinstance(found, dict) else {}


def _is_id(id: object) -> TypeIs[int]:
    return isinstance(id, int) and not isinstance(id, bool) and id >= 0
