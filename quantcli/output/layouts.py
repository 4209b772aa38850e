"""Layouts of output files: which tensor lies where, known before any weight is read."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from quantcli.output import disk
from quantcli.tensors import TensorSpec


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one tensor lies: ``offset`` counts from the start of its file."""

    spec: TensorSpec
    offset: int


@dataclass(frozen=True, slots=True)
class FileLayout:
    """The layout of a file before any weight is read: its header, its size and the place of each tensor (padding is zeros)."""

    name: str
    header: bytes
    size: int
    slots: Mapping[str, Slot]


def check_layouts(files: Sequence[FileLayout]) -> None:
    """Raise ValueError for inconsistent layouts: a duplicate name, tensors that overlap or exceed their file."""
    seen: set[str] = set()
    for layout in files:
        relative(layout.name)
        end = len(layout.header)
        for name, slot in sorted(layout.slots.items(), key=lambda item: (item[1].offset, item[1].spec.nbytes)):
            if name != slot.spec.name or name in seen:
                raise ValueError(f"{layout.name}: {name} is declared twice or under another name")
            if slot.offset < end:
                raise ValueError(f"{layout.name}: {name} at {slot.offset} overlaps what ends at {end}")
            end = slot.offset + slot.spec.nbytes
            seen.add(name)
        if end > layout.size:
            raise ValueError(f"{layout.name}: tensors end at {end}, the file at {layout.size}")
    if len({layout.name for layout in files}) != len(files):
        raise ValueError("two files have one name")


def relative(name: str) -> PurePosixPath:
    """``name`` as a path inside the output; ValueError when it leaves it."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise ValueError(f"'{name}' is not a path inside the output")
    return path


def write_header(path: Path, layout: FileLayout) -> None:
    """Create the file with its header and its whole size."""
    with path.open("wb", buffering=0) as file:
        disk.write_all(file.fileno(), memoryview(layout.header))
        file.truncate(layout.size)


def has_header(path: Path, layout: FileLayout) -> bool:
    """Whether the file is there with its header and its whole size."""
    if not path.is_file():
        return False
    with path.open("rb", buffering=0) as file:
        return os.fstat(file.fileno()).st_size == layout.size and file.read(len(layout.header)) == layout.header
