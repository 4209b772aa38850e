"""Safetensors files: strict header parsing, reading single tensors, and the byte-exact layout of files to write.

    [n: u64, little endian][header: n bytes of JSON, padded with spaces][data]
    header = {"__metadata__": {str: str}, name: {"dtype": "BF16", "shape": [out, in], "data_offsets": [begin, end]}, …}

Offsets count from the start of the data; the tensors cover the data without a hole or an overlap (safetensors' own rule).

A header is hostile input: every field is checked against the file's true size before anything of that size is allocated, so a bad file is
a :class:`CheckpointError` with the file's and the tensor's name.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor

from quantcli.checkpoint.json_files import fail, parse_json, read_json, shown
from quantcli.checkpoint.locations import Location, read_tensor
from quantcli.errors import CheckpointError, NumericsError
from quantcli.output import disk
from quantcli.output.layouts import FileLayout, Slot
from quantcli.tensors import DTYPES, TensorSpec

MAX_HEADER_BYTES = 100_000_000
"""What the reference implementation accepts."""

MAX_DIMENSIONS = 32

MAX_SHARD_BYTES = 5_000_000_000
"""Size of a written shard (the Hub's long-standing default); a larger tensor gets a file of its own."""

INDEX = "model.safetensors.index.json"

FILE_ORDER = ("U64", "I64", "F64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16", "F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL")
"""Order of dtypes inside a file, as the reference implementation sorts them: wide ones first, so that each tensor is aligned."""


class Shards:
    """The tensors of one or more safetensors files by name. ``notes``: tolerated irregularities. Thread-safe, holds no resource."""

    def __init__(self, locations: Mapping[str, Location], notes: Iterable[str] = ()) -> None:
        self.locations = dict(locations)
        self.notes = tuple(notes)

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """In the order of files and, inside them, of data: reading in this order is sequential."""
        return {name: location.spec for name, location in self.locations.items()}

    def read(self, name: str) -> Tensor:
        """One tensor in its stored dtype, in memory of its own."""
        if name not in self.locations:
            raise CheckpointError(f"{name}: no such tensor in this checkpoint ({len(self.locations)} tensors)")
        return read_tensor(self.locations[name])


def open_folder(folder: Path) -> Shards:
    """The shards of ``folder``: model.safetensors, or the files of its index, or its only .safetensors file.

    Headers are read and checked; no tensor is. A tensor that lies in a shard and not in the index is read (as transformers does) and noted.
    """
    single, index = find_weights(folder)
    if index is None:
        assert single is not None
        return Shards(read_header(single))
    weight_map = read_index(index)
    files = sorted(set(weight_map.values()))
    if absent := [file for file in files if not (folder / file).is_file()]:
        raise CheckpointError(f"{index}: {len(absent)} of {len(files)} shards are missing, the first is {absent[0]}; finish the download")
    locations: dict[str, Location] = {}
    for file in files:
        for name, location in read_header(folder / file).items():
            if name in locations:
                raise CheckpointError(f"{name}: lies in two shards, {locations[name].path} and {location.path}")
            locations[name] = location
    for name, file in weight_map.items():
        if name not in locations or locations[name].path != folder / file:
            where = f"it is in {locations[name].path.name}" if name in locations else "no shard has it"
            raise CheckpointError(f"{index}: places {name} in {file}, but {where}")
    extra = sorted(locations.keys() - weight_map.keys())
    return Shards(locations, [f"{index.name} does not list {len(extra)} tensors of its shards, the first is {extra[0]}"] if extra else [])


def find_weights(folder: Path) -> tuple[Path | None, Path | None]:
    """(the single file, None) or (None, the index) of ``folder``, in the order transformers looks for them."""
    if (folder / "model.safetensors").is_file():
        check_one_save(folder)
        return folder / "model.safetensors", None
    if (folder / INDEX).is_file():
        return None, folder / INDEX
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    files = sorted(f for f in folder.glob("*.safetensors") if f.is_file() and not f.name.startswith("adapter_"))
    if len(indexes) == 1:
        return None, indexes[0]
    if len(files) == 1 and not indexes:
        return files[0], None
    if files:
        raise CheckpointError(f"{folder}: {len(files)} .safetensors files and no {INDEX} that says which of them make the model")
    raise CheckpointError(f"{folder}: no weights: neither model.safetensors nor {INDEX} (pickles such as pytorch_model.bin are not read)")


def check_one_save(folder: Path) -> None:
    """Raise :class:`CheckpointError` where the shards of an index lie beside model.safetensors: the weights of two saves."""
    if not (folder / INDEX).is_file():
        return
    others = sorted(set(read_index(folder / INDEX).values()) - {"model.safetensors"})
    if others and all((folder / file).is_file() for file in others):
        raise CheckpointError(
            f"{folder}: holds two saves of weights, model.safetensors and the {len(others)} files of {INDEX} (the first is {others[0]}); "
            "remove the one that is not meant"
        )


def read_index(path: Path) -> dict[str, str]:
    """{tensor: file} of an index, every file inside its folder."""
    index = read_json(path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        fail(path, "has no weight_map {tensor: file}")
    for name, file in weight_map.items():
        check_name(path, name)
        if not isinstance(file, str) or not file.endswith(".safetensors"):
            fail(path, f"{name}: {shown(file)} is not a .safetensors file")
        check_name(path, file)
        parts = PurePosixPath(file.replace("\\", "/")).parts
        # Lexical, because the files of a Hub cache are links to blobs outside the folder.
        if ".." in parts or parts[0].startswith("/") or ":" in parts[0]:
            fail(path, f"{name}: {shown(file)} leaves the folder")
    return weight_map


def read_header(path: Path) -> dict[str, Location]:
    """The tensors of one file, in the order of their data. Raises :class:`CheckpointError` for an invalid header."""
    size, text = read_header_text(path)
    header = parse_json(path, text)
    if not isinstance(header, dict):
        fail(path, "header is not a JSON object")
    check_metadata(path, header.pop("__metadata__", {}))
    data_size = size - 8 - len(text)
    spans = sorted((check_entry(path, name, entry, data_size) for name, entry in header.items()), key=lambda span: (span[1], span[2]))
    check_cover(path, spans, data_size)
    return {spec.name: Location(path, spec, 8 + len(text) + begin) for spec, begin, _ in spans}


def read_header_text(path: Path) -> tuple[int, bytes]:
    """(size of the file, the JSON of its header); the announced length is checked against the file's size before anything is allocated."""
    try:
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            n = int.from_bytes(file.read(8), "little")
            if size < 8 or n > min(size - 8, MAX_HEADER_BYTES):
                fail(path, f"announces a header of {n} bytes in a file of {size}; it is truncated or not a safetensors file")
            text = disk.read_exactly(file.fileno(), n)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if text is None:
        fail(path, "ends inside its header")
    return size, text


def check_metadata(path: Path, metadata: Any) -> None:
    """Raise unless ``metadata`` is an object of strings, or null, which some writers put where they have none."""
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        fail(path, "__metadata__ is not an object of strings")


def check_entry(path: Path, name: str, entry: Any, data_size: int) -> tuple[TensorSpec, int, int]:
    """(spec, begin, end) of one header entry, its size checked against its dtype and shape and the data of the file."""
    check_name(path, name)
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        fail(path, f"{name}: the header entry lacks dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        fail(path, f"{name}: unknown dtype {shown(dtype)}; known are {', '.join(DTYPES)}")
    if not is_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        fail(path, f"{name}: shape {shown(shape)} is not a list of at most {MAX_DIMENSIONS} sizes")
    if not is_sizes(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= data_size:
        fail(
            path, f"{name}: data_offsets {shown(offsets)} do not lie inside the {data_size} bytes of data; the file is truncated or damaged"
        )
    n_bytes = math.prod(shape) * DTYPES[dtype].itemsize
    if n_bytes != offsets[1] - offsets[0]:
        fail(path, f"{name}: {dtype} {shape} takes {n_bytes} bytes, data_offsets span {offsets[1] - offsets[0]}")
    return TensorSpec(name, dtype, tuple(shape), n_bytes), offsets[0], offsets[1]


def check_cover(path: Path, spans: Sequence[tuple[TensorSpec, int, int]], data_size: int) -> None:
    """Raise unless the spans, sorted, cover the data without a hole or an overlap."""
    end = 0
    for spec, begin, stop in spans:
        if begin != end:
            fail(
                path,
                f"{spec.name}: begins at byte {begin} of the data, where {'a hole' if begin > end else 'an overlap'} with {end} results",
            )
        end = stop
    if end != data_size:
        fail(path, f"has {data_size} bytes of data, its tensors end at {end}; it is damaged or an incomplete download")


def check_name(path: Path, name: str) -> None:
    if not name or not name.isprintable():
        fail(path, f"{shown(name)} is not a valid name of a tensor or file")


def is_sizes(value: Any) -> bool:
    """Whether ``value`` is a list of integers in the range of file sizes. ``True``, an int in Python, does not count."""
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def stored_as(name: str, tensor: Tensor, dtype: str) -> Tensor:
    """``tensor`` in the dtype of its file. Raises :class:`NumericsError` when a finite value does not fit it."""
    out = tensor.to(DTYPES[dtype])
    if out.dtype != tensor.dtype and out.is_floating_point() and out.isinf().sum() > tensor.isinf().sum():
        largest = float(tensor[tensor.isfinite()].abs().max())
        raise NumericsError(f"{name}: a value of magnitude {largest:.3g} does not fit {dtype}; use bf16 or f32")
    return out


def layout(specs: Sequence[TensorSpec], *, max_shard_bytes: int = MAX_SHARD_BYTES) -> tuple[list[FileLayout], dict[str, bytes]]:
    """Files that hold ``specs``, and the index when there is more than one, under Hugging Face's names.

    Shards fill up in the order given. Inside a file tensors lie as the reference implementation sorts them, so the bytes equal its own.
    """
    shards: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in specs:
        if shards[-1] and filled + spec.nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(spec)
        filled += spec.nbytes
    if len(shards) == 1:
        return [file_layout("model.safetensors", shards[0])], {}
    files = [file_layout(f"model-{k + 1:05d}-of-{len(shards):05d}.safetensors", shard) for k, shard in enumerate(shards)]
    weight_map = dict(sorted((name, file.name) for file in files for name in file.slots))
    index = {"metadata": {"total_size": sum(spec.nbytes for spec in specs)}, "weight_map": weight_map}
    return files, {INDEX: (json.dumps(index, indent=2) + "\n").encode()}


def file_layout(name: str, specs: Sequence[TensorSpec], metadata: Mapping[str, str] | None = None) -> FileLayout:
    """One safetensors file of ``specs``; ``metadata`` goes into its header."""
    ordered = sorted(specs, key=lambda spec: (FILE_ORDER.index(spec.dtype), spec.name))
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    begins: list[int] = []
    end = 0
    for spec in ordered:
        begins.append(end)
        end += spec.nbytes
        entries[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [begins[-1], end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    slots = {spec.name: Slot(spec, len(header) + begin) for spec, begin in zip(ordered, begins, strict=True)}
    return FileLayout(name, header, len(header) + end, slots)
