"""Layouts of output files: which tensor lies where, known before any weight is read, and the bytes that fill them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from quantcli.output import disk, system
from quantcli.tensors import DTYPE_NAMES, DTYPES, TensorSpec


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
    disk.write_file(path, layout.header, size=layout.size)


def has_header(path: Path, layout: FileLayout) -> bool:
    """Whether the file is there with its header and its whole size."""
    if not path.is_file():
        return False
    with disk.opened(path, os.O_RDONLY) as fd:
        return os.fstat(fd).st_size == layout.size and disk.read_exactly(fd, len(layout.header)) == layout.header


def check_tensor(spec: TensorSpec, tensor: Tensor) -> None:
    """Raise ValueError unless ``tensor`` has the dtype and shape of ``spec``."""
    if spec.dtype not in DTYPES:
        if tensor.dtype != torch.uint8 or tensor.nbytes != spec.nbytes:
            raise ValueError(f"{spec.name}: {spec.dtype} needs {spec.nbytes} bytes of uint8, got {tensor.nbytes} of {tensor.dtype}")
        return
    if tensor.dtype != DTYPES[spec.dtype] or tuple(tensor.shape) != spec.shape:
        got = DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype))
        raise ValueError(f"{spec.name}: expected {spec.dtype} {list(spec.shape)}, got {got} {list(tensor.shape)}")


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The tensor's bytes in row order; a copy only when it is on a device or not contiguous."""
    data = tensor.detach().cpu().contiguous().reshape(-1)
    return data.view(torch.uint8).numpy().data


def write_tensors(path: Path, layout: FileLayout, tensors: Mapping[str, Tensor]) -> None:
    """Write a file of ``layout`` at once, and flush it."""
    write_header(path, layout)
    with disk.opened(path, os.O_RDWR) as fd:
        for name, slot in layout.slots.items():
            disk.write_at(fd, tensor_bytes(tensors[name]), slot.offset)
        system.fsync(fd)
