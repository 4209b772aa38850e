"""Records in Parquet files and in datasets by name, which need the extra ``data``."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantcli.errors import CheckpointError, RecipeError
from quantcli.text.documents.records import EXPECTED, FIELDS, Document, document_of

ROWS_A_ROUND = 1000
"""Rows taken from a row group before the next one's turn."""

ROWS_AT_ONCE = 256
"""Rows that are decoded at a time."""

SHUFFLED_ROWS = 1000
"""Rows of a streamed dataset that are held at a time, to be drawn from."""


@dataclass(frozen=True, slots=True)
class Parquet:
    """A ``.parquet`` file of any size; only the columns that a record's text is made of are read."""

    path: Path
    columns: tuple[str, ...]

    @classmethod
    def open(cls, path: Path) -> Parquet:
        with _parquet(path) as file:
            names = file.schema_arrow.names
        columns = tuple(name for name in names if name in FIELDS)
        if not columns:
            raise CheckpointError(f"{path}: no text; its columns are {', '.join(names) or 'none'}, expected {EXPECTED}")
        return cls(path, columns)

    def drawn(self, draw: random.Random) -> Iterator[Document]:
        with _parquet(self.path) as file:
            n_rows = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
            order = draw.sample(range(len(n_rows)), len(n_rows))
            strides = [-(-n // ROWS_A_ROUND) for n in n_rows]
            shifts = [draw.sample(range(stride), stride) for stride in strides]
            turns = ((g, shifts[g][t]) for t in range(max(strides, default=0)) for g in order if t < strides[g])
            for g, shift in turns:
                rows = list(self._rows(file, g, sum(n_rows[:g]), strides[g], shift))
                yield from (document_of(*row) for row in draw.sample(rows, len(rows)))

    def in_order(self) -> Iterator[Document]:
        with _parquet(self.path) as file:
            first = 0
            for g in range(file.num_row_groups):
                yield from (document_of(*row) for row in self._rows(file, g, first, 1, 0))
                first += file.metadata.row_group(g).num_rows

    def _rows(self, file: Any, group: int, first: int, stride: int, shift: int) -> Iterator[tuple[Any, str]]:
        """Every ``stride``-th row of a row group from row ``shift`` on, and where it is; ``first``: rows before the group."""
        start = 0
        for batch in self._batches(file, group):
            wanted = range((shift - start) % stride, len(batch), stride)
            for i, row in zip(wanted, batch.take(list(wanted)).to_pylist() if wanted else (), strict=True):
                yield row, f"{self.path}, row {first + start + i}"
            start += len(batch)

    def _batches(self, file: Any, group: int) -> Iterator[Any]:
        try:
            yield from file.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=list(self.columns), use_threads=False)
        except (OSError, ValueError) as error:  # pyarrow's own are among these
            raise CheckpointError(f"{self.path}, row group {group}: pyarrow cannot read it: {error}") from error


@dataclass(frozen=True, slots=True)
class Streamed:
    """The dataset ``NAME[:CONFIG][:SPLIT]``, streamed; its train split, or its first one, unless a split is named."""

    name: str

    @classmethod
    def open(cls, name: str) -> Streamed:
        try:
            import datasets  # noqa: F401 (only whether it is there)
        except ImportError as error:
            raise RecipeError(
                f"--dataset {name}: no such file, and fetching a dataset by name needs the extra: pip install 'quantcli[data]'"
            ) from error
        return cls(name)

    def drawn(self, draw: random.Random) -> Iterator[Document]:
        seed = draw.randrange(1 << 31)
        yield from self._documents(lambda rows: rows.shuffle(seed=seed, buffer_size=SHUFFLED_ROWS))

    def in_order(self) -> Iterator[Document]:
        yield from self._documents(lambda rows: rows)

    def _documents(self, ordered: Callable[[Any], Any]) -> Iterator[Document]:
        import datasets

        repo, *rest = self.name.split(":")
        config = rest[0] if len(rest) > 1 else None
        try:
            available = datasets.get_dataset_split_names(repo, config)
            split = rest[-1] if rest else ("train" if "train" in available else available[0])
            rows = ordered(datasets.load_dataset(repo, config, split=split, streaming=True))
            for i, row in enumerate(rows):
                yield document_of(row, f"dataset {self.name}, row {i} as drawn")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"--dataset {self.name}: cannot be fetched: {error}") from error


def _parquet(path: Path) -> Any:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise RecipeError(f"--dataset {path}: reading Parquet needs pyarrow: pip install 'quantcli[data]'") from error
    try:
        # Without pre-buffering, pages are read as they are decoded and not a whole column of a row group.
        return parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
    except (ArrowException, OSError) as error:
        raise CheckpointError(f"{path}: not a Parquet file that pyarrow reads: {error}") from error
