"""The header of a GGUF file: read whole, each promise checked against the file's size before anything is allocated; and written."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType

from quantcli.checkpoint.json_files import shown
from quantcli.errors import CheckpointError, UnsupportedError
from quantcli.formats.gguf.file.container import (
    ALIGNMENT,
    BLOCKS,
    LENGTH,
    MAGIC,
    SCALARS,
    VERSION,
    Container,
    Field,
    Strings,
    tensor_spec,
)
from quantcli.tensors import TensorSpec

MAX_DIMS = 4
MAX_NAME_BYTES = 65535
MAX_FIELDS = 1 << 14
MAX_TENSORS = 1 << 14
MAX_STRINGS = 1 << 21
"""Bounds on what a header may ask of us: far above any real model (vocabulary and merges: under a million strings), and soon parsed."""


def read_header(path: Path) -> Container:
    """The header of a GGUF file; :class:`CheckpointError` names the file, and the field or tensor that is wrong."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _HeaderReader(path, data).read()
    except ValueError as error:  # mmap refuses an empty file
        raise CheckpointError(f"{path}: not a GGUF file: it is empty") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


class _HeaderReader:
    """A cursor over the mapped file. Every read is bounded by the file's end before anything is allocated."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at, self.size = path, data, 0, len(data)
        self.n_strings = 0
        self.what = "the header"

    def read(self) -> Container:
        version, n_tensors, n_fields = self.preamble()
        fields: dict[str, Field] = {}
        for k in range(n_fields):
            self.what = f"metadata key {k} of {n_fields}"
            key = self.name()
            self.what = f"metadata key '{key}'"
            if key in fields:
                raise self.error("is there twice")
            fields[key] = self.field()
        alignment = self.alignment(fields)
        specs, relative = self.tensors(n_tensors)
        start = -(-self.at // alignment) * alignment
        offsets = {name: start + offset for name, offset in relative.items()}
        self.check_places(specs, offsets, alignment, start)
        return Container(self.path, version, fields, specs, offsets, dict.fromkeys(specs, self.path))

    def preamble(self) -> tuple[int, int, int]:
        """Version, number of tensors, number of fields: each within what the file can hold."""
        if (magic := self.take(4)) != MAGIC:
            raise CheckpointError(f"{self.path}: not a GGUF file: it begins with {magic!r}, not {MAGIC!r}")
        version = self.integer("<I")
        if version and version & 0xFFFF == 0:
            raise UnsupportedError(f"{self.path}: a big-endian GGUF file; convert it with gguf-py's gguf_convert_endian.py first")
        if version not in (2, 3):
            raise UnsupportedError(f"{self.path}: GGUF version {version}; quantcli reads 2 and 3: convert the model again")
        n_tensors, n_fields = self.integer("<Q"), self.integer("<Q")
        # the smallest tensor info (an empty name, one dimension) takes 32 bytes, the smallest field 13
        for kind, n, limit, least in (("tensors", n_tensors, MAX_TENSORS, 32), ("metadata keys", n_fields, MAX_FIELDS, 13)):
            if n > min(limit, (self.size - self.at) // least):
                raise CheckpointError(f"{self.path}: the header promises {n} {kind}, more than {self.size} bytes can hold or a model has")
        return version, n_tensors, n_fields

    def error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {self.what}: {problem}; the file is damaged: fetch or convert it again")

    def take(self, n: int) -> bytes:
        if n > self.size - self.at:
            raise self.error(f"needs {n} bytes at offset {self.at}, but the file ends at {self.size}")
        self.at += n
        return self.data[self.at - n : self.at]

    def integer(self, form: str) -> int:
        value: int = struct.unpack(form, self.take(struct.calcsize(form)))[0]
        return value

    def strings(self, count: int) -> Strings:
        """The next ``count`` strings. A vocabulary has hundreds of thousands, so this loop is spelled out."""
        self.n_strings += count
        if self.n_strings > MAX_STRINGS or count > (self.size - self.at) // 8:
            raise self.error(f"promises {count} strings, more than {self.size - self.at} bytes can hold or a model has")
        data, start, size, length_at = self.data, self.at, self.size, LENGTH.unpack_from
        at = start
        for _ in range(count):
            if size - at < 8 or (length := length_at(data, at)[0]) > size - at - 8:
                raise self.error(f"has a string at offset {at} that would end after the file, at {size}")
            at += 8 + length
        self.at = at
        return Strings(data[start:at], count)

    def name(self) -> str:
        length = self.integer("<Q")
        if not 0 < length <= MAX_NAME_BYTES:
            raise self.error(f"has a name of {length} bytes, expected 1 to {MAX_NAME_BYTES}")
        try:
            name = self.take(length).decode()
        except UnicodeDecodeError as error:
            raise self.error("has a name that is not UTF-8") from error
        if not name.isprintable():
            raise self.error(f"has the name {shown(name)}, which cannot be printed")
        return name

    def value_type(self) -> GGUFValueType:
        number = self.integer("<I")
        try:
            return GGUFValueType(number)
        except ValueError as error:
            raise self.error(f"has value type {number}, which GGUF does not define") from error

    def field(self) -> Field:
        kind = self.value_type()
        if kind == GGUFValueType.ARRAY:
            return self.array()
        return Field(kind, self.strings(1)[0] if kind == GGUFValueType.STRING else self.scalars(kind, 1)[0].item())

    def array(self) -> Field:
        element, count = self.value_type(), self.integer("<Q")
        if element == GGUFValueType.ARRAY:
            raise self.error("is an array of arrays, which no GGUF reader takes")
        if element != GGUFValueType.STRING:
            return Field(GGUFValueType.ARRAY, self.scalars(element, count), element)
        return Field(GGUFValueType.ARRAY, self.strings(count), element)

    def scalars(self, kind: GGUFValueType, count: int) -> np.ndarray:
        """``count`` numbers, copied out of the file."""
        dtype = SCALARS[kind]
        if count > (self.size - self.at) // dtype.itemsize:
            raise self.error(f"promises {count} values of {dtype.itemsize} bytes, but the file ends {self.size - self.at} bytes later")
        data = self.take(count * dtype.itemsize)
        if kind == GGUFValueType.BOOL and data.strip(b"\0\1"):
            raise self.error("holds a bool that is neither 0 nor 1")
        return np.frombuffer(data, dtype)

    def alignment(self, fields: Mapping[str, Field]) -> int:
        field = fields.get("general.alignment", Field(GGUFValueType.UINT32, ALIGNMENT))
        self.what = "metadata key 'general.alignment'"
        if field.type != GGUFValueType.UINT32 or field.value < 1 or field.value & (field.value - 1):
            raise self.error(f"is {field.value!r} ({field.type.name}), expected a UINT32 that is a power of two")
        value: int = field.value
        return value

    def tensors(self, n_tensors: int) -> tuple[dict[str, TensorSpec], dict[str, int]]:
        """Specs and offsets from the data's start."""
        specs: dict[str, TensorSpec] = {}
        offsets: dict[str, int] = {}
        for k in range(n_tensors):
            self.what = f"tensor {k} of {n_tensors}"
            name = self.name()
            self.what = f"tensor '{name}'"
            if name in specs:
                raise self.error("is there twice")
            specs[name], offsets[name] = self.tensor(name), self.integer("<Q")
        return specs, offsets

    def tensor(self, name: str) -> TensorSpec:
        n_dims = self.integer("<I")
        if not 1 <= n_dims <= MAX_DIMS:
            raise self.error(f"has {n_dims} dimensions, expected 1 to {MAX_DIMS}")
        dims = struct.unpack(f"<{n_dims}Q", self.take(8 * n_dims))
        number = self.integer("<I")
        try:
            ggml_type = GGMLQuantizationType(number).name
        except ValueError as error:
            raise self.error(f"has ggml type {number}, which ggml does not define") from error
        if 0 in dims:
            raise self.error(f"has shape {dims}: an empty tensor")
        if dims[0] % BLOCKS[ggml_type][0]:
            raise self.error(f"has rows of {dims[0]} weights, no multiple of the {ggml_type} block {BLOCKS[ggml_type][0]}")
        return tensor_spec(name, ggml_type, dims[::-1])

    def check_places(self, specs: Mapping[str, TensorSpec], offsets: Mapping[str, int], alignment: int, start: int) -> None:
        """Every tensor lies inside the file, aligned, and on no other."""
        end, before = start, ""
        for name in sorted(specs, key=lambda name: offsets[name]):
            self.what = f"tensor '{name}'"
            offset, nbytes = offsets[name], specs[name].nbytes
            if (offset - start) % alignment:
                raise self.error(f"starts at {offset - start}, not a multiple of the alignment {alignment}")
            if offset < end:
                raise self.error(f"starts at {offset}, inside tensor '{before}', which ends at {end}")
            if offset + nbytes > self.size:
                raise self.error(f"takes bytes {offset} to {offset + nbytes}, but the file ends at {self.size}")
            end, before = offset + nbytes, name


def header(fields: Mapping[str, Field], specs: Sequence[TensorSpec]) -> tuple[bytes, dict[str, int], int]:
    """The bytes before the data, the absolute offset of each tensor (in the order of ``specs``), and the size of the file."""
    out = bytearray(MAGIC + struct.pack("<IQQ", VERSION, len(specs), len(fields)))
    for key, field in fields.items():
        out += _pack_string(key) + _pack_field(field)
    relative, data_size = {}, 0
    for spec in specs:
        relative[spec.name] = data_size
        dims = spec.shape[::-1]
        out += _pack_string(spec.name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        out += struct.pack("<IQ", GGMLQuantizationType[spec.dtype], data_size)
        data_size += aligned(spec.nbytes)
    out += bytes(aligned(len(out)) - len(out))
    return bytes(out), {name: len(out) + offset for name, offset in relative.items()}, len(out) + data_size


def aligned(n: int) -> int:
    """``n`` bytes with the padding that follows them."""
    return -(-n // ALIGNMENT) * ALIGNMENT


def _pack_string(text: str) -> bytes:
    data = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(data)) + data


def _pack_values(kind: GGUFValueType, values: Sequence[Any] | np.ndarray) -> bytes:
    if isinstance(values, Strings):
        return values.packed
    if kind == GGUFValueType.STRING:
        return b"".join(_pack_string(text) for text in values)
    return np.asarray(values).astype(SCALARS[kind]).tobytes()


def _pack_field(field: Field) -> bytes:
    if field.element is None:
        return struct.pack("<I", field.type) + _pack_values(field.type, [field.value])
    return struct.pack("<IIQ", field.type, field.element, len(field.value)) + _pack_values(field.element, field.value)
