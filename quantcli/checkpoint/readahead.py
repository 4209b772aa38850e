"""Reads the next layer's bytes into the system's file cache while this layer is worked on, so that the walk does not wait for the disk.

A layer's tensors are mapped from their files when it is loaded; cached bytes cost no wait. One thread reads, a piece at a time into one
buffer whose content is discarded: the process's memory does not grow, and the system frees cached pages when memory is needed.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import TypeVar

from quantcli.checkpoint.locations import Location

T = TypeVar("T")

PIECE_BYTES = 1 << 20
"""Bytes read at once: enough to keep a disk busy, few enough to stop soon."""


def reading_ahead(layers: Iterable[T], names: Sequence[str], locations: Iterable[Location]) -> Iterator[T]:
    """Yields ``layers``, whose names are ``names``; while one is worked on, the next one's tensors at ``locations`` are read."""
    with ReadAhead(locations) as ahead:
        for layer, following in zip(layers, [*names[1:], None][: len(names)], strict=True):
            if following is not None:
                ahead.begin(following)
            yield layer


class ReadAhead:
    """A thread that reads a layer's tensors on request; ``locations``: of all tensors in the model's files.

    A context manager, which ends the thread. Read errors are ignored here: the walk reads again, and its errors name the tensor.
    """

    def __init__(self, locations: Iterable[Location]) -> None:
        self._locations = tuple(locations)
        self._wanted: SimpleQueue[str | None] = SimpleQueue()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="quantcli-readahead", daemon=True)

    def begin(self, layer: str) -> None:
        """Read what belongs to ``layer`` ("model.layers.3") in the background; returns at once."""
        self._wanted.put(layer)

    def __enter__(self) -> ReadAhead:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._wanted.put(None)
        self._thread.join()

    def _run(self) -> None:
        buffer = bytearray(PIECE_BYTES)
        while (layer := self._wanted.get()) is not None:
            for path, start, stop in spans(self._locations, layer):
                with contextlib.suppress(OSError):
                    self._read(path, start, stop, buffer)

    def _read(self, path: Path, start: int, stop: int, buffer: bytearray) -> None:
        with open(path, "rb", buffering=0) as file:
            file.seek(start)
            while start < stop and not self._stop.is_set():
                n = file.readinto(memoryview(buffer)[: min(PIECE_BYTES, stop - start)])
                if not n:
                    return
                start += n


def spans(locations: Sequence[Location], layer: str) -> list[tuple[Path, int, int]]:
    """File, first byte and end of the tensors of ``layer``, adjacent ones as one, in the order in which they lie in their files."""
    mine = sorted((x.path, x.offset, x.offset + x.spec.nbytes) for x in locations if f"{x.spec.name}.".startswith(f"{layer}."))
    joined: list[tuple[Path, int, int]] = []
    for path, start, stop in mine:
        if joined and joined[-1][0] == path and start <= joined[-1][2] + PIECE_BYTES:
            joined[-1] = (path, joined[-1][1], max(stop, joined[-1][2]))
        else:
            joined.append((path, start, stop))
    return joined
