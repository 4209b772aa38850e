"""The GGUF container: what its header holds, in types and names.

    "GGUF" · version u32 · n_tensors u64 · n_fields u64 · fields · tensor infos · padding · tensor data
    field        key: string · type: u32 · value                     string: length u64 · bytes
    array        element type: u32 · count: u64 · values
    tensor info  name: string · n_dims: u32 · dims: u64 × n_dims, fastest first · ggml type: u32 · offset: u64, from the data's start

Everything little endian; tensor data starts at a multiple of ``general.alignment`` (32 unless given) and so does every tensor.
Specification: ggml's docs/gguf.md, versions 2 and 3.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import eq
from pathlib import Path
from typing import Any, overload

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUFValueType
from typing_extensions import override

from quantcli.checkpoint.locations import Location
from quantcli.ops.blocks import KINDS
from quantcli.tensors import TensorSpec

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32

BLOCKS: dict[str, tuple[int, int]] = {t.name: sizes for t, sizes in GGML_QUANT_SIZES.items()}
"""ggml type → (weights, bytes) of one block."""

PREFIX = "ggml_"

SCALARS: dict[GGUFValueType, np.dtype] = {
    GGUFValueType.UINT8: np.dtype("<u1"),
    GGUFValueType.INT8: np.dtype("<i1"),
    GGUFValueType.UINT16: np.dtype("<u2"),
    GGUFValueType.INT16: np.dtype("<i2"),
    GGUFValueType.UINT32: np.dtype("<u4"),
    GGUFValueType.INT32: np.dtype("<i4"),
    GGUFValueType.FLOAT32: np.dtype("<f4"),
    GGUFValueType.UINT64: np.dtype("<u8"),
    GGUFValueType.INT64: np.dtype("<i8"),
    GGUFValueType.FLOAT64: np.dtype("<f8"),
    GGUFValueType.BOOL: np.dtype("?"),
}


class Strings(Sequence[str]):
    """An array of strings as it is in the file, read when it is asked for: as objects a vocabulary takes five times the memory."""

    def __init__(self, packed: bytes, count: int) -> None:
        self.packed, self._count = packed, count

    @override
    def __len__(self) -> int:
        return self._count

    @override
    def __iter__(self) -> Iterator[str]:
        at = 0
        while at < len(self.packed):
            end = at + 8 + LENGTH.unpack_from(self.packed, at)[0]
            yield self.packed[at + 8 : end].decode("utf-8", "surrogateescape")
            at = end

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    @override
    def __getitem__(self, index: int | slice) -> str | list[str]:
        return list(self)[index]

    @override
    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(eq, self, other))

    __hash__ = None  # type: ignore[assignment]


LENGTH = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class Field:
    """A value with its GGUF type; ``element`` is the type of an array's elements, None for a scalar.

    Strings that are no UTF-8 are kept by ``surrogateescape``, so that they are written back as they were.
    """

    type: GGUFValueType
    value: Any
    element: GGUFValueType | None = None


@dataclass(frozen=True, slots=True)
class Container:
    """A parsed header. ``specs``: by GGUF name, in file order, shapes as PyTorch has them; ``offsets`` are absolute in the
    tensor's file, one of ``paths``: a model may lie in several. ``path``, ``version`` and ``fields`` are the first one's.
    """

    path: Path
    version: int
    fields: dict[str, Field]
    specs: dict[str, TensorSpec]
    offsets: dict[str, int]
    paths: dict[str, Path]

    def get(self, key: str, default: Any = None) -> Any:
        """The value of metadata ``key``."""
        return self.fields[key].value if key in self.fields else default

    def location(self, name: str) -> Location:
        """The location of tensor ``name``."""
        return Location(self.paths[name], self.specs[name], self.offsets[name])


def qtype_of(ggml_type: str) -> str:
    """The qtype that stores what ggml calls ``ggml_type``: Q4_K is ``q4_k``, and MXFP4 is ``ggml_mxfp4``, for compressed-tensors lays the
    same numbers out otherwise."""
    name = ggml_type.lower()
    return f"{PREFIX}{name}" if PREFIX + name in KINDS else name


def ggml_type_of(qtype: str) -> str:
    """The inverse of :func:`qtype_of`."""
    return qtype.removeprefix(PREFIX).upper()


def row_bytes(ggml_type: str, in_features: int) -> int:
    """Bytes of a row of ``in_features`` weights; these must fill whole blocks."""
    n_weights, n_bytes = BLOCKS[ggml_type]
    return in_features // n_weights * n_bytes


def tensor_spec(name: str, ggml_type: str, shape: Sequence[int]) -> TensorSpec:
    """The spec of a tensor of logical ``shape`` stored as ``ggml_type``."""
    return TensorSpec(name, ggml_type, tuple(shape), math.prod(shape[:-1]) * row_bytes(ggml_type, shape[-1]))
