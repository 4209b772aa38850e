"""Documents from files of any size and from datasets by name, in an order drawn by a seed, read only as far as needed.

A small file (at most ``files.WHOLE_BYTES``) is read and checked whole, its records shuffled. A larger one is sampled, in bounded memory
and in time proportional to what is taken: ``.jsonl`` in blocks spread over the file, a line belonging to the block in which it begins, so
that every line comes once; ``.txt`` in stretches likewise; ``.parquet`` row group by row group, of each a fixed number of rows at a
stride, the rows between them in later rounds; a dataset by name as a stream whose shards and next thousand rows are shuffled.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from quantcli.errors import CheckpointError, RecipeError
from quantcli.text.documents import files, tables
from quantcli.text.documents.files import Held
from quantcli.text.documents.records import Conversation, Document, Renderer, Rows

__all__ = ["Conversation", "Dataset", "Document", "Held", "Renderer", "Rows", "Source"]


class Source(Protocol):
    """Documents in one of two orders, each document once."""

    def drawn(self, draw: random.Random) -> Iterator[Document]:
        """In an order drawn from ``draw``."""

    def in_order(self) -> Iterator[Document]:
        """From the first to the last."""


@dataclass(frozen=True, slots=True)
class Dataset:
    """One ``--dataset``: its documents, and its weight among several."""

    name: str
    source: Source
    weight: float = 1.0

    @classmethod
    def open(cls, name: str) -> Dataset:
        """The dataset ``name``: ``PATH`` (.txt, .jsonl, .json or .parquet) or ``NAME[:CONFIG][:SPLIT]``, each with or without ``=WEIGHT``.

        Raises :class:`CheckpointError` for a file that cannot be read, :class:`RecipeError` for a name without the extra to fetch it.
        """
        match = re.fullmatch(r"(.+)=(\d+(?:\.\d+)?)", name)
        if match is None or Path(name).exists():
            return cls(name, _open(name))
        if float(match[2]) == 0:
            raise RecipeError(f"--dataset {name}: a weight must be above zero")
        return cls(match[1], _open(match[1]), float(match[2]))


def _open(name: str) -> Source:
    path = Path(name).expanduser()
    readers: dict[str, Callable[[Path], Source]] = {".txt": files.open_txt, ".jsonl": files.open_lines, ".json": files.open_json}
    readers |= {".parquet": tables.Parquet.open}
    if path.suffix in readers:
        if not path.is_file():
            raise CheckpointError(f"--dataset {name}: no such file")
        return readers[path.suffix](path)
    if path.exists():
        raise RecipeError(f"--dataset {name}: a file must end in {', '.join(readers)}")
    return tables.Streamed.open(name)
