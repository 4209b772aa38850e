"""Text and records in files: a small file is read whole, a large one at positions drawn by a seed."""

from __future__ import annotations

import codecs
import math
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantcli import strict_json
from quantcli.errors import CheckpointError, RecipeError
from quantcli.strict_json import NotJson
from quantcli.text.documents.records import Document, document_of

WHOLE_BYTES = 16 << 20
"""A file up to this size is read whole."""

MAX_JSON_BYTES = 256 << 20
"""The largest ``.json`` list that is read: it cannot be read from its middle, so it is read whole or not at all."""

BLOCK_BYTES = 16 << 10
"""Bytes read of a large file at one position: few, so that a few thousand windows come from hundreds of positions."""

MAX_LINE_BYTES = 64 << 20

MAX_OBJECTS, MAX_ITEMS = MAX_JSON_BYTES // 32, MAX_JSON_BYTES // 4
"""Of a ``.json`` list: records are objects, so it has more of them than a model's file."""

GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True, slots=True)
class Held:
    """Documents in memory."""

    documents: Sequence[Document]

    def drawn(self, draw: random.Random) -> Iterator[Document]:
        yield from draw.sample(self.documents, len(self.documents))

    def in_order(self) -> Iterator[Document]:
        yield from self.documents


@dataclass(frozen=True, slots=True)
class LargeText:
    """A ``.txt`` too large to be read whole: stretches of it, which begin and end at white space where there is some."""

    path: Path

    def drawn(self, draw: random.Random) -> Iterator[Document]:
        for start in _starts(self.path, draw):
            yield from self._stretch(start)

    def in_order(self) -> Iterator[Document]:
        """The text from its beginning, in pieces of a block, which are to be joined without anything between them."""
        with self.path.open(encoding="utf8", newline="") as file:
            try:
                while piece := file.read(BLOCK_BYTES):
                    yield piece
            except UnicodeDecodeError as error:
                raise CheckpointError(f"{self.path}: not UTF-8 text: {error}") from error

    def _stretch(self, start: int) -> Iterator[str]:
        with self.path.open("rb") as file:
            file.seek(start)
            data = file.read(BLOCK_BYTES)
        within = data[next((i for i, byte in enumerate(data[:4]) if byte & 0xC0 != 0x80), 0) :]  # not inside a character
        try:
            text = codecs.getincrementaldecoder("utf8")().decode(within)
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path}, byte {start}: not UTF-8 text: {error}") from error
        if stretch := re.sub(r"\s\S*\Z", "", re.sub(r"\A\S*\s", "", text, count=1) if start else text, count=1):
            yield stretch


@dataclass(frozen=True, slots=True)
class LargeLines:
    """A ``.jsonl`` too large to be read whole."""

    path: Path

    def drawn(self, draw: random.Random) -> Iterator[Document]:
        with self.path.open("rb") as file:
            for start in _starts(self.path, draw):
                for offset, line in self._lines(file, start, start + BLOCK_BYTES):
                    yield from _row(line, f"{self.path}, byte {offset}")

    def in_order(self) -> Iterator[Document]:
        with self.path.open("rb") as file:
            for number, (_, line) in enumerate(self._lines(file, 0, None), 1):
                yield from _row(line, f"{self.path}:{number}")

    def _lines(self, file: Any, start: int, end: int | None) -> Iterator[tuple[int, bytes]]:
        """The lines that begin in ``start`` … ``end`` (None: the file's), each with its offset."""
        file.seek(max(0, start - 1))
        if start > 0 and not _skip_line(file, end):
            return
        while end is None or file.tell() < end:
            offset = file.tell()
            if not (line := file.readline(MAX_LINE_BYTES)):
                return
            if len(line) == MAX_LINE_BYTES:
                raise CheckpointError(
                    f"{self.path}, byte {offset}: a line of more than {MAX_LINE_BYTES >> 20} MiB; expected a record a line"
                )
            yield offset, line


def open_txt(path: Path) -> Held | LargeText:
    """One text."""
    return LargeText(path) if path.stat().st_size > WHOLE_BYTES else Held([_decoded(path)])


def open_lines(path: Path) -> Held | LargeLines:
    """A record a line."""
    if path.stat().st_size > WHOLE_BYTES:
        return LargeLines(path)
    lines = path.read_bytes().split(b"\n")
    return Held([document for number, line in enumerate(lines, 1) for document in _row(line, f"{path}:{number}")])


def open_json(path: Path) -> Held | LargeLines:
    """A list of records; a file that begins with one record is read as ``.jsonl``, which some of these are."""
    with path.open("rb") as file:
        beginning = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
    if not beginning.startswith(b"["):
        return open_lines(path)
    if path.stat().st_size > MAX_JSON_BYTES:
        raise RecipeError(
            f"{path}: a .json list above {MAX_JSON_BYTES >> 20} MiB would have to be read whole; make it .jsonl, a record a line"
        )
    try:
        rows = strict_json.parse(path.read_bytes(), unique=False, max_objects=MAX_OBJECTS, max_items=MAX_ITEMS)
    except NotJson as error:
        raise CheckpointError(f"{path}: not a JSON list of records: {error}") from error
    return Held([document_of(row, f"{path}, record {i}") for i, row in enumerate(rows)])


def _row(line: bytes, where: str) -> Iterable[Document]:
    """The document of one line of JSON; none for a blank line."""
    if not line.strip():
        return ()
    try:
        return (document_of(strict_json.parse(line, unique=False), where),)
    except NotJson as error:
        raise CheckpointError(f"{where}: not a line of JSON: {error}; expected a record a line") from error


def _starts(path: Path, draw: random.Random) -> Iterator[int]:
    """The offset of every block of a file, once, starting at a drawn block in steps of the golden section: however few are taken, they
    are spread over the whole file."""
    n = -(-path.stat().st_size // BLOCK_BYTES)
    step = max(1, round(n * GOLDEN))
    while math.gcd(step, n) > 1:  # else some blocks would never be visited
        step += 1
    first = draw.randrange(n)
    yield from ((first + i * step) % n * BLOCK_BYTES for i in range(n))


def _skip_line(file: Any, end: int | None) -> bool:
    """Read to the end of the current line. False when that is not before ``end``, so that no line begins there."""
    while end is None or file.tell() < end:
        piece = file.readline(BLOCK_BYTES)
        if piece.endswith(b"\n"):
            return True
        if not piece:
            return False
    return False


def _decoded(path: Path) -> str:
    try:
        return path.read_text("utf8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8 text: {error}") from error
