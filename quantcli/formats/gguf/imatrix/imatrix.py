"""llama.cpp's importance matrices: read from either of its file formats, written as llama-imatrix writes them.

For every matrix the sum of x² of its inputs over the tokens that it saw. Of a GGUF file, for each GGUF name of a tensor,

    <name>.in_sum2  F32 [in], or [n_experts, in]        <name>.counts  F32 [1], or [n_experts, 1]: tokens

and the metadata imatrix.datasets, .chunk_count and .chunk_size. The legacy format (.dat) is a run of little-endian values:

    n_entries i32 · for each: length i32, name, n_calls i32, n_values i32, n_values × f32 (means of x², times n_calls)
    and, in most files: n_chunks i32, length i32, name of the dataset
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from gguf import GGUFValueType
from torch import Tensor
from typing_extensions import override

from quantcli.checkpoint.json_files import shown
from quantcli.checkpoint.locations import Location, read_tensor
from quantcli.errors import CheckpointError, NumericsError
from quantcli.formats.gguf.file.container import MAGIC, Field, tensor_spec
from quantcli.formats.gguf.file.headers import header, read_header
from quantcli.output.layouts import FileLayout, Slot
from quantcli.output.writer import Writer
from quantcli.tensors import TensorSpec

SUMS, COUNTS = ".in_sum2", ".counts"
DATASETS, CHUNK_COUNT, CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
OURS = ("quantcli.dataset_sha256", "quantcli.dataset_sketch")
"""What quantcli records about the text, besides llama-imatrix's own keys, and passes on to the files that are made with the matrix."""

MAX_NAME_BYTES = 1 << 16


@dataclass(frozen=True)
class Entry:
    """Where the values of one tensor lie, F32 [n_matrices · in]. ``counts``: the tokens that each of its matrices saw; of the legacy
    format one number, the calls by which the means there are multiplied."""

    sums: Location
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Imatrix(Mapping[str, Tensor]):
    """GGUF name → the importance of a tensor's inputs, F32 [n_matrices · in]: mean squares, read when asked for.

    ``datasets``: what was measured on, as its maker called it; ``own_fields``: keys of quantcli's own in its metadata.
    """

    path: Path
    entries: Mapping[str, Entry]
    datasets: tuple[str, ...]
    n_chunks: int
    own_fields: Mapping[str, Field] = field(default_factory=dict)

    @staticmethod
    def read(path: str | Path) -> Imatrix:
        """The importance matrix at ``path``, in either of llama.cpp's forms; :class:`CheckpointError` when it is none."""
        return read(Path(path))

    @override
    def __getitem__(self, name: str) -> Tensor:
        """The means; ones for an expert that saw no token, as llama-quantize takes them. :class:`NumericsError` unless they are finite."""
        entry = self.entries[name]
        return self._means(name, entry.sums, entry.counts)

    def slice(self, name: str, index: int, in_features: int) -> Tensor:
        """The means of one of the matrices that lie in the tensor of that name, [in]; no other is read."""
        entry = self.entries[name]
        spec = TensorSpec.dense(name, "F32", (in_features,))
        location = Location(entry.sums.path, spec, entry.sums.offset + index * spec.nbytes)
        return self._means(name, location, entry.counts if len(entry.counts) == 1 else entry.counts[index : index + 1])

    def _means(self, name: str, sums: Location, n_tokens: Sequence[int]) -> Tensor:
        values = read_tensor(sums).view(len(n_tokens), -1)
        counts = torch.tensor(n_tokens, dtype=torch.float32)[:, None]
        means = torch.where(counts > 0, values / counts, 1.0).view(-1)
        if not means.isfinite().all():
            raise NumericsError(f"{self.path}: {name} has NaN or Inf; measure the importance matrix again")
        return means

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    @override
    def __len__(self) -> int:
        return len(self.entries)

    @override
    def __contains__(self, name: object) -> bool:
        return name in self.entries  # Mapping's own reads the tensor

    def n_values(self, name: str) -> int:
        """How many values the tensor of that name has; nothing is read."""
        return self.entries[name].sums.spec.n_elements

    def unseen(self, name: str) -> list[int]:
        """The experts of the tensor of that name that no token reached."""
        return [e for e, count in enumerate(self.entries[name].counts) if count == 0]


def read(path: Path) -> Imatrix:
    """The importance matrix at ``path``; :class:`CheckpointError` when it is none, or a damaged one."""
    try:
        with path.open("rb") as file:
            is_gguf = file.read(len(MAGIC)) == MAGIC
        return _read_gguf(path) if is_gguf else _read_legacy(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def _read_gguf(path: Path) -> Imatrix:
    container = read_header(path)

    def located(name: str) -> Location:
        spec = container.specs.get(name)
        if spec is None or spec.dtype != "F32":
            raise CheckpointError(f"{path}: {name} is {'missing' if spec is None else spec.dtype}, expected F32; measure the matrix again")
        return Location(path, spec, container.offsets[name])

    entries: dict[str, Entry] = {}
    for name in dict.fromkeys(name.removesuffix(SUMS).removesuffix(COUNTS) for name in container.specs if name.endswith((SUMS, COUNTS))):
        sums, counts = located(name + SUMS), read_tensor(located(name + COUNTS)).view(-1)
        if not counts.isfinite().all() or (counts < 0).any() or sums.spec.n_elements % len(counts):
            raise CheckpointError(f"{path}: {name}{COUNTS} is no count of the tokens of {sums.spec.n_elements} values; measure again")
        entries[name] = Entry(sums, tuple(math.floor(count + 0.5) for count in counts.tolist()))
    if not entries:
        raise CheckpointError(f"{path}: a GGUF file, but no importance matrix: it has no tensor <name>{SUMS}")
    datasets = container.get(DATASETS, [])
    n_chunks = container.get(CHUNK_COUNT, 0)
    if isinstance(datasets, str) or not isinstance(datasets, Sequence) or not isinstance(n_chunks, int):
        raise CheckpointError(f"{path}: its {DATASETS} or {CHUNK_COUNT} is of another type than llama-imatrix writes; measure again")
    own_fields = {key: value for key, value in container.fields.items() if key in OURS}
    return Imatrix(path, entries, tuple(map(str, datasets)), n_chunks, own_fields)


def _read_legacy(path: Path) -> Imatrix:
    size = path.stat().st_size
    with path.open("rb") as file:

        def integer(what: str, least: int, most: int) -> int:
            data = file.read(4)
            value: int | None = struct.unpack("<i", data)[0] if len(data) == 4 else None
            if value is None or not least <= value <= most:
                got = "the end of the file" if value is None else str(value)
                raise CheckpointError(f"{path}: no importance matrix, or a damaged one: its {what} is {got}, expected {least} to {most}")
            return value

        def text(what: str) -> str:
            return file.read(integer(f"length of {what}", 0, min(size, MAX_NAME_BYTES))).decode("utf-8", "surrogateescape")

        entries: dict[str, Entry] = {}
        for k in range(integer("number of entries", 1, size // 12)):
            name = text(f"name {k}")
            n_calls = integer(f"number of calls of {shown(name)}", -(1 << 31), (1 << 31) - 1)
            n_values = integer(f"number of values of {shown(name)}", 1, (size - file.tell()) // 4)
            entries[name] = Entry(Location(path, TensorSpec.dense(name, "F32", (n_values,)), file.tell()), (max(1, n_calls),))
            file.seek(4 * n_values, 1)
        if file.tell() == size:
            return Imatrix(path, entries, (), 0)
        n_chunks = integer("number of chunks", -(1 << 31), (1 << 31) - 1)
        dataset = text("dataset's name") if file.tell() < size else ""
    return Imatrix(path, entries, (dataset,) if dataset else (), n_chunks)


@dataclass(frozen=True)
class Measured:
    """What is written of one tensor: ``n_tokens`` that each of its matrices saw; ``squares()``: their mean squares F32 [n_matrices, in]."""

    n_tokens: Sequence[int]
    in_features: int
    squares: Callable[[], Tensor]


def write(
    path: Path,
    measured: Mapping[str, Measured],
    *,
    datasets: Sequence[str],
    n_chunks: int,
    chunk_size: int,
    own_fields: Mapping[str, Field],
    overwrite: bool,
) -> tuple[str, ...]:
    """Write ``measured``, GGUF name → what was seen of that tensor's inputs, as llama-imatrix does; ``own_fields`` join the metadata.

    Returns what failed once the file had its name.
    """
    fields = {
        "general.type": Field(GGUFValueType.STRING, "imatrix"),
        DATASETS: Field(GGUFValueType.ARRAY, list(datasets), GGUFValueType.STRING),
        CHUNK_COUNT: Field(GGUFValueType.UINT32, n_chunks),
        CHUNK_SIZE: Field(GGUFValueType.UINT32, chunk_size),
        **own_fields,
    }
    specs = [tensor_spec(name + part, "F32", shape) for name in sorted(measured) for part, shape in shapes_of(measured[name]).items()]
    head, offsets, size = header(fields, specs)
    layout = FileLayout(path.name, head, size, {spec.name: Slot(spec, offsets[spec.name]) for spec in specs})
    with Writer(path, overwrite=overwrite, folder=False) as writer:
        writer.declare([layout])
        for name, tensor in measured.items():
            counts = torch.tensor(tensor.n_tokens, dtype=torch.float32)[:, None]  # [n_matrices, 1]
            shapes = shapes_of(tensor)
            writer.put(name + SUMS, (tensor.squares() * counts).view(shapes[SUMS]))
            writer.put(name + COUNTS, counts.view(shapes[COUNTS]))
        writer.commit()
    return tuple(writer.notes)


def shapes_of(tensor: Measured) -> dict[str, tuple[int, ...]]:
    """The shapes of the two tensors that are written: ggml knows no dimension of one matrix."""
    stack = () if len(tensor.n_tokens) == 1 else (len(tensor.n_tokens),)
    return {SUMS: (*stack, tensor.in_features), COUNTS: (*stack, 1)}
