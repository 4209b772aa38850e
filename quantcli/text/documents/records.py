"""Records of a dataset: plain text, or a conversation, which the model's own chat template renders."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from quantcli.errors import CheckpointError

PAIRS = (("prompt", "response"), ("prompt", "completion"), ("instruction", "output"), ("instruction", "response"), ("question", "answer"))
"""Names of the fields of a question and of its answer in one record."""

CONTEXTS = ("input", "context")
"""Fields that Alpaca's and Dolly's records add to their ``instruction``."""

FIELDS = tuple(dict.fromkeys(("messages", "conversations", "text", "content", *(f for pair in PAIRS for f in pair), *CONTEXTS)))
"""Every field that is used, so that other columns of a Parquet file need not be read."""

EXPECTED = "text, content, messages [{role, content}], conversations [{from, value}], " + ", ".join(f"{a} and {b}" for a, b in PAIRS)

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in the form of chat templates, ``{"role": …, "content": …}`` each, and where they come from."""

    messages: tuple[Mapping[str, Any], ...]
    where: str

    @property
    def plain(self) -> str:
        """The contents only, a line each."""
        return "\n".join(_content(message.get("content")) for message in self.messages)


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A record without a text, and why: file and line, the fields found and those expected."""

    reason: str


Document = str | Conversation | Unreadable


def document_of(row: Any, where: str) -> Document:
    """The text or conversation of one record. A conversation is preferred to a ``text`` field, rendered in another model's template.

    ``where``: file and line, for the reason of a record that is neither, and for the :class:`CheckpointError` of one whose text is no
    text. An empty one is an empty text.
    """
    if not isinstance(row, Mapping):
        return Unreadable(f"{where}: it is not a record but {type(row).__name__}; expected an object with {EXPECTED}")
    if row.get("messages"):
        return Conversation(tuple(_messages(row["messages"], f"{where}: messages")), where)
    if row.get("conversations"):
        return Conversation(tuple(_sharegpt(row["conversations"], f"{where}: conversations")), where)
    for name in ("text", "content"):
        if row.get(name):
            return _text(row[name], f"{where}: {name}")
    for asked, answered in PAIRS:
        if row.get(asked) and row.get(answered):
            question = [_text(row[asked], f"{where}: {asked}")]
            if asked == "instruction":
                question += [_text(row[name], f"{where}: {name}") for name in CONTEXTS if row.get(name)]
            answer = _text(row[answered], f"{where}: {answered}")
            pair = ({"role": "user", "content": "\n\n".join(question)}, {"role": "assistant", "content": answer})
            return Conversation(pair, where)
    known = [row[name] for name in FIELDS if row.get(name) is not None]
    if known and not any(known):
        return ""  # as the empty lines of wikitext
    fields = ", ".join(f"{name} (null)" if row[name] is None else str(name) for name in row)
    return Unreadable(f"{where}: no text; its fields are {fields or 'none'}, expected {EXPECTED}")


@dataclass(slots=True)
class Rows:
    """How many rows of a dataset were read, how many of them had no text that can be read, and why the first of these had none."""

    dataset: str = ""
    n_read: int = 0
    n_skipped: int = 0
    first_skipped: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The JSON keys of a dataset's rows."""
        first = self.first_skipped or None
        return {"dataset": self.dataset, "read": self.n_read, "skipped": self.n_skipped, "first_skipped": first}


MAX_UNREADABLE = 10_000
"""Rows without a text with which a dataset may begin: one that has no other would be read to its end, however large it is."""


@dataclass(slots=True)
class Renderer:
    """Documents as the model reads them: a conversation through the tokenizer's chat template, a text as it is, nothing of one that is
    unreadable. ``rows`` counts those of each dataset that was begun.

    ``note`` receives a message once when there is no template, and for the first conversation that the template refuses (roles that do
    not alternate, a system message that it does not support); such conversations are joined as plain text.
    """

    tokenizer: Any
    note: Callable[[str], None] = lambda _: None
    rows: list[Rows] = field(default_factory=list)
    _noted: set[str] = field(default_factory=set)
    _is_counted: bool = False

    def begin(self, dataset: str, held: Sequence[Document] | None = None) -> None:
        """Count from here on for ``dataset``: all documents at once where they are ``held`` in memory, else as they are read."""
        self.rows.append(Rows(dataset))
        self._is_counted = held is not None
        for document in held or ():
            self._count(document)

    def check_read(self) -> None:
        """Raise :class:`CheckpointError`, with the first reason, when no row of the dataset could be read."""
        if self.rows and 0 < self.rows[-1].n_skipped == self.rows[-1].n_read:
            raise CheckpointError(f"{self.rows[-1].first_skipped} (and none of the {self.rows[-1].n_read} rows read has a text)")

    def __call__(self, document: Document) -> str:
        if self.rows and not self._is_counted:
            self._count(document)
        if isinstance(document, Unreadable):
            return ""
        if isinstance(document, str):
            return document
        if not getattr(self.tokenizer, "chat_template", None):
            self._once("none", "the tokenizer has no chat template: conversations are read as plain text, message after message")
            return document.plain
        try:
            # Copies, because some templates edit what they are given.
            text: str = self.tokenizer.apply_chat_template([dict(m) for m in document.messages], tokenize=False)
            return text
        except Exception as error:  # a foreign template may raise anything, and jinja2 is not a dependency of quantcli
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            self._once(
                "refused", f"{document.where}: the chat template refuses this conversation ({reason}); it and others like it are plain text"
            )
            return document.plain

    def _count(self, document: Document) -> None:
        rows = self.rows[-1]
        rows.n_read += 1
        if not isinstance(document, Unreadable):
            return
        rows.n_skipped += 1
        rows.first_skipped = rows.first_skipped or document.reason
        if rows.n_skipped == MAX_UNREADABLE:
            self.check_read()

    def _once(self, key: str, text: str) -> None:
        if key not in self._noted:
            self._noted.add(key)
            self.note(text)


def _messages(value: Any, where: str) -> list[Mapping[str, Any]]:
    messages: list[Mapping[str, Any]] = []
    for i, message in enumerate(_list(value, where, "{role, content}")):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
            raise CheckpointError(f"{where}[{i}] is {_shown(message)}, expected an object with role and content")
        _content(message["content"], f"{where}[{i}]")
        # Parquet fills the fields that only other rows have with nulls, and templates ask for a field's presence.
        messages.append({key: item for key, item in message.items() if item is not None or key == "content"})
    return messages


def _sharegpt(value: Any, where: str) -> list[Mapping[str, Any]]:
    messages: list[Mapping[str, Any]] = []
    for i, turn in enumerate(_list(value, where, "{from, value}")):
        if isinstance(turn, Mapping) and "role" in turn:
            messages += _messages([turn], where)
            continue
        if not isinstance(turn, Mapping) or "value" not in turn:
            raise CheckpointError(f"{where}[{i}] is {_shown(turn)}, expected an object with from and value")
        if turn["value"] is not None and not isinstance(turn["value"], str):
            raise CheckpointError(f"{where}[{i}]: value is {_shown(turn['value'])}, expected text")
        if turn.get("from") not in SHAREGPT_ROLES:
            raise CheckpointError(f"{where}[{i}] is from '{turn.get('from')}', expected one of {', '.join(SHAREGPT_ROLES)}")
        messages.append({"role": SHAREGPT_ROLES[turn["from"]], "content": turn["value"]})
    return messages


def _list(value: Any, where: str, of: str) -> Sequence[Any]:
    if not isinstance(value, list | tuple):
        raise CheckpointError(f"{where} is {_shown(value)}, expected a list of {of}")
    return value


def _content(content: Any, where: str = "") -> str:
    """The text of a message's content: a string, None, or a list of parts of which some are text."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list | tuple) and all(isinstance(part, Mapping) for part in content):
        return "\n".join(str(part["text"]) for part in content if part.get("text"))
    raise CheckpointError(f"{where}: content is {_shown(content)}, expected text or a list of parts")


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise CheckpointError(f"{where} is {_shown(value)}, expected text")
    return value


def _shown(value: Any) -> str:
    """``value``, shortened for a message."""
    if isinstance(value, Mapping):
        return f"an object with {', '.join(map(str, value)) or 'nothing'}"
    shown = repr(value)
    return shown if len(shown) <= 40 else f"{shown[:40]}…"
