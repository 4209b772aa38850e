"""While a layer is worked on, the next one's bytes are read, those and no others, and what is written is the same."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from quantcli.checkpoint import readahead
from quantcli.checkpoint.locations import Location
from quantcli.checkpoint.readahead import ReadAhead, reading_ahead, spans
from quantcli.formats import open_checkpoint
from quantcli.tensors import TensorSpec
from support.tiny_models import TinyLlama

Span = tuple[Path, int, int]


def location(path: Path, name: str, offset: int, n_bytes: int) -> Location:
    return Location(path, TensorSpec(name, "U8", (n_bytes,), n_bytes), offset)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Span]:
    """What was read, span by span."""
    found: list[Span] = []
    original = ReadAhead._read

    def noting(self: ReadAhead, path: Path, start: int, stop: int, buffer: bytearray) -> None:
        original(self, path, start, stop, buffer)
        found.append((path, start, stop))

    monkeypatch.setattr(ReadAhead, "_read", noting)
    return found


def wait_for(n: int, found: list[Span]) -> None:
    deadline = time.monotonic() + 20
    while len(found) < n and time.monotonic() < deadline:
        threading.Event().wait(0.001)


def test_a_layers_tensors_are_read_in_the_order_of_the_file_neighbours_at_once(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    found = [
        location(b, "layers.1.q", 64, 10),
        location(a, "layers.1.down", 5_000_000, 100),
        location(a, "layers.1.up", 110, 50),
        location(a, "layers.1.gate", 10, 100),
        location(a, "layers.11.gate", 200, 100),
        location(a, "layers.0.gate", 0, 10),
        location(a, "norm", 300, 10),
    ]
    assert spans(found, "layers.1") == [(a, 10, 160), (a, 5_000_000, 5_000_100), (b, 64, 74)]
    assert spans(found, "norm") == [(a, 300, 310)]
    assert spans(found, "layers.2") == []


def test_only_the_next_layer_is_read_while_one_is_worked_on(tmp_path: Path, read: list[Span]) -> None:
    file = tmp_path / "model"
    file.write_bytes(bytes(4000))
    names = ["layers.0", "layers.1", "layers.2"]
    found = [location(file, f"{name}.w", 1000 * i, 1000) for i, name in enumerate(names)]
    for i, name in enumerate(reading_ahead(names, names, found)):
        assert name == names[i]
        n = min(i + 1, 2)
        wait_for(n, read)
        assert read == [(file, 1000 * (k + 1), 1000 * (k + 2)) for k in range(n)]


def test_one_buffer_holds_whatever_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model"
    file.write_bytes(bytes(10_000))
    monkeypatch.setattr(readahead, "PIECE_BYTES", 512)
    sizes: list[int] = []
    original = ReadAhead._read

    def noting(self: ReadAhead, path: Path, start: int, stop: int, buffer: bytearray) -> None:
        original(self, path, start, stop, buffer)
        sizes.append(len(buffer))

    monkeypatch.setattr(ReadAhead, "_read", noting)
    with ReadAhead([location(file, "layers.1.w", 0, 10_000)]) as ahead:
        ahead.begin("layers.1")
        ahead.begin("layers.1")
        deadline = time.monotonic() + 20
        while len(sizes) < 2 and time.monotonic() < deadline:
            threading.Event().wait(0.001)
    assert sizes == [512, 512]


def test_the_thread_is_gone_when_the_walk_is_left_half_way(tmp_path: Path) -> None:
    file = tmp_path / "model"
    file.write_bytes(bytes(1000))
    names = ["layers.0", "layers.1"]
    walk = reading_ahead(names, names, [location(file, "layers.1.w", 0, 1000)])
    next(walk)
    assert "quantcli-readahead" in {thread.name for thread in threading.enumerate()}
    walk.close()  # type: ignore[attr-defined]
    assert "quantcli-readahead" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize("n_bytes", [None, 10])
def test_what_cannot_be_read_is_left_to_the_walk(tmp_path: Path, n_bytes: int | None) -> None:
    file = tmp_path / "model"
    if n_bytes is not None:
        file.write_bytes(bytes(n_bytes))
    names = ["layers.0", "layers.1", "layers.2"]
    found = [location(file, f"{name}.w", 1000, 1000) for name in names]
    assert list(reading_ahead(names, names, found)) == names


def test_a_models_layers_are_found_in_its_files(tiny_llama: TinyLlama) -> None:
    with open_checkpoint(str(tiny_llama(layers=3, shards=3))) as source:
        for i in range(3):
            mine = [x for x in source.locations() if x.spec.name.startswith(f"model.layers.{i}.")]
            found = spans(list(source.locations()), f"model.layers.{i}")
            assert sum(stop - start for _, start, stop in found) >= sum(x.spec.nbytes for x in mine) > 0
            assert all(any(p == x.path and a <= x.offset and x.offset + x.spec.nbytes <= b for p, a, b in found) for x in mine)
