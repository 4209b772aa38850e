"""A vocabulary as GGUF has it: pieces, types and scores by id, made from a tokenizer's own pieces and the tokens added to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gguf import TokenType

from quantcli.errors import CheckpointError
from quantcli.formats.gguf.tokens.roles import ROLE_NAMES, content_of

SPACE = "\u2581"
ADDED_SCORE, PAD_SCORE = -1000.0, -10000.0
SPECIAL_LOOKS = {"<pad>", "<mask>", "<2mass>", "[@BOS@]"}


@dataclass
class Vocabulary:
    """Pieces by id, as llama.cpp wants them. Ids that the tokenizer leaves out are unused ``[PAD<id>]`` pieces.

    ``left_out``: added tokens whose id is beyond the model's embedding; ``doubled``: id of an added token whose text another id has → that.
    """

    tokens: list[str]
    types: list[int]
    scores: list[float]
    left_out: list[str] = field(default_factory=list)
    doubled: dict[int, int] = field(default_factory=dict)
    _first: dict[str, int] = field(default_factory=dict, repr=False)  # text → the first id that was given it

    @classmethod
    def empty(cls, size: int) -> Vocabulary:
        return cls([f"[PAD{i}]" for i in range(size)], [TokenType.UNUSED] * size, [PAD_SCORE] * size)

    def set(self, id: int, token: str, kind: TokenType, score: float) -> None:
        if not 0 <= id < len(self.tokens):
            raise CheckpointError(
                f"the tokenizer's {token!r} has id {id}, but config.json's vocab_size is {len(self.tokens)}; they do not match"
            )
        self.tokens[id], self.types[id], self.scores[id] = token, kind, score
        self._first.setdefault(token, id)

    def add(self, id: int, token: str, *, special: bool) -> None:
        """An added token: matched as it is before anything else, and never printed when ``special``.

        One whose text another id has is that id's, as in the tokenizers library, and its own id stays unused.
        """
        is_control = special or looks_special(token)
        text = token if is_control else token.replace(SPACE, " ")
        if self.other(text, id) is not None:
            text = token  # beside two spaces, two ▁ are matched as such
        if (other := self.other(text, id)) is not None:
            self.doubled[id] = other
        self.set(id if other is None else other, text, TokenType.CONTROL if is_control else TokenType.USER_DEFINED, ADDED_SCORE)

    def other(self, text: str, id: int) -> int | None:
        """The id other than ``id`` that has ``text``; None where there is none."""
        first = self._first.get(text)
        return first if first not in (None, id) and self.tokens[first] == text else None

    def add_all(self, tokens: Mapping[int, Mapping[str, Any]]) -> None:
        """Added tokens by id, as tokenizer_config.json's added_tokens_decoder has them; last those that are written with ▁ for a space."""
        for id, token in sorted(tokens.items(), key=lambda item: SPACE in item[1]["content"]):
            self.add(id, token["content"], special=bool(token.get("special")))

    def add_within(self, tokens: Mapping[int, Mapping[str, Any]]) -> None:
        """The same, but what is beyond the embedding no model can use, and is left out. :class:`CheckpointError` for a token that is said
        not to be special, so that any text may have it."""
        beyond = {id: token for id, token in tokens.items() if id >= len(self.tokens) and token.get("special") is not False}
        self.left_out += [token["content"] for token in beyond.values() if token["content"] not in self.left_out]
        self.add_all({id: token for id, token in tokens.items() if id not in beyond})

    def name_specials(self, settings: Mapping[str, Any]) -> None:
        """Tokens that tokenizer_config.json gives a role are control tokens, added or not."""
        contents = {content_of(settings.get(f"{role}_token")) for role in ROLE_NAMES}
        for key in ("extra_special_tokens", "additional_special_tokens"):
            extra = settings.get(key) or []
            contents |= {content_of(token) for token in (extra.values() if isinstance(extra, dict) else extra)}
        contents -= {""}
        for id, token in enumerate(self.tokens):
            if token in contents and self.types[id] in (TokenType.NORMAL, TokenType.USER_DEFINED):
                self.types[id] = TokenType.CONTROL

    def ids(self) -> dict[str, int]:
        """Token → id; :class:`CheckpointError` for a token that is there twice, which llama.cpp does not survive."""
        if (found := twice(self.tokens)) is not None:
            token, other, id = found
            raise CheckpointError(f"the tokenizer has {token!r} twice, as {other} and {id}; llama.cpp loads no such vocabulary")
        return {token: id for id, token in enumerate(self.tokens)}


def twice(tokens: Sequence[str]) -> tuple[str, int, int] | None:
    """The first token that is there twice, and both ids; None where there is none."""
    ids: dict[str, int] = {}
    for id, token in enumerate(tokens):
        if (other := ids.setdefault(token, id)) != id:
            return token, other, id
    return None


def looks_special(token: str) -> bool:
    """Control tokens that some models publish as ordinary ones."""
    bracketed = any(token.startswith(a) and token.endswith(b) for a, b in (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">")))
    return bracketed or token in SPECIAL_LOOKS
