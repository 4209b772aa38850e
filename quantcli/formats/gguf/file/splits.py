"""A model in several GGUF files: llama.cpp's file names, the ``split.*`` keys that tie them together, and which file has which tensor.

    model-00001-of-00003.gguf    all metadata, the first tensors     split.no 0    split.count 3    split.tensors.count: of all files
    model-00002-of-00003.gguf    the next tensors                    split.no 1    …

The files are those of llama-gguf-split; any of them names the model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from gguf import GGUFValueType

from quantcli.checkpoint.json_files import shown
from quantcli.errors import CheckpointError, RecipeError
from quantcli.formats.gguf.file.container import ALIGNMENT, MAGIC, Container, Field
from quantcli.formats.gguf.file.headers import aligned, header, read_header
from quantcli.output.layouts import FileLayout, Slot
from quantcli.tensors import TensorSpec

NO, COUNT, TENSORS = "split.no", "split.count", "split.tensors.count"

SHARD_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")

MAX_SHARDS = 2**16 - 1
"""The largest ``split.count``, a UINT16."""

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


def read_model(path: Path) -> Container:
    """The model that the file at ``path`` holds or is a part of, its headers read and checked.

    Raises :class:`CheckpointError` when a part is missing, or belongs to another model than the others.
    """
    container = read_header(path)
    count = integer(container, COUNT, 0)
    if count < 2:
        return container
    if is_followed(container):
        raise CheckpointError(
            f"{path}: another GGUF file follows the tensors of this one: the {count} files of a model, one behind the other, are no model; "
            "give the first of the files as they were, or join them with llama-gguf-split --merge"
        )
    match = SHARD_NAME.fullmatch(path.name)
    if match is None or int(match["count"]) != count:
        name = f"<model>-00001-of-{count:05d}.gguf"
        raise CheckpointError(f"{path}: one of the {count} files of a model, which llama.cpp calls {name} and so on; rename it")
    paths = shard_paths(path.with_name(match["stem"] + ".gguf"), count)
    if missing := [p for p in paths if not p.is_file()]:
        raise CheckpointError(f"{path}: {len(missing)} of the model's {count} files are missing, the first is {missing[0]}; fetch them too")
    return joined([read_header(p) for p in paths])


def is_followed(container: Container) -> bool:
    """Whether the file goes on with a second GGUF file after its own tensors, as ``cat`` makes it."""
    end = max((container.offsets[name] + spec.nbytes for name, spec in container.specs.items()), default=0)
    with container.path.open("rb") as file:
        file.seek(end)
        return file.read(ALIGNMENT + len(MAGIC)).lstrip(b"\0").startswith(MAGIC)


def joined(shards: Sequence[Container]) -> Container:
    """``shards``, in order, as one model: the first one's metadata, everybody's tensors."""
    first = shards[0]
    specs: dict[str, TensorSpec] = {}
    offsets: dict[str, int] = {}
    paths: dict[str, Path] = {}
    for i, shard in enumerate(shards):
        if (integer(shard, NO, -1), integer(shard, COUNT, 0)) != (i, len(shards)):
            raise CheckpointError(f"{shard.path}: is not file {i + 1} of {len(shards)} by its metadata; the files are of several models")
        if duplicates := sorted(specs.keys() & shard.specs.keys()):
            raise CheckpointError(f"{shard.path}: tensor '{duplicates[0]}' is in {paths[duplicates[0]]} already")
        specs |= shard.specs
        offsets |= shard.offsets
        paths |= shard.paths
    if (n_tensors := integer(first, TENSORS, len(specs))) != len(specs):
        raise CheckpointError(f"{first.path}: the model's files hold {len(specs)} tensors, its metadata promises {n_tensors}")
    return replace(first, specs=specs, offsets=offsets, paths=paths)


def integer(container: Container, key: str, default: int) -> int:
    value = container.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise CheckpointError(f"{container.path}: metadata key '{key}' is {shown(value)}, expected an integer")
    return value


def shard_paths(path: Path, count: int) -> list[Path]:
    """The files of a model of ``count`` whose unsplit name is ``path``."""
    return [path.with_name(f"{path.name.removesuffix('.gguf')}-{i + 1:05d}-of-{count:05d}.gguf") for i in range(count)]


def parse_size(text: str) -> int:
    """Bytes that ``--split-max-size`` means: 300M and 2G as llama.cpp counts them, in thousands, or 900MB, 16GiB."""
    match = re.fullmatch(r"(\d+)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in UNITS or not int(match[1]):
        raise RecipeError(f"--split-max-size {text}: expected a size such as 300M, 2G or 16GiB")
    return int(match[1]) * UNITS[match[2].upper()]


def cut(specs: Sequence[TensorSpec], max_bytes: int | None) -> list[list[TensorSpec]]:
    """``specs``, in file order, in shares of at most ``max_bytes`` of tensor data; a larger tensor has a share of its own."""
    shares: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in specs:
        n_bytes = aligned(spec.nbytes)
        if max_bytes is not None and shares[-1] and filled + n_bytes > max_bytes:
            shares.append([])
            filled = 0
        shares[-1].append(spec)
        filled += n_bytes
    if len(shares) > MAX_SHARDS:
        raise RecipeError(f"--split-max-size would make {len(shares)} files, and llama.cpp counts to {MAX_SHARDS}; choose a larger size")
    return shares


def layouts(
    path: Path,
    fields: Mapping[str, Field],
    specs: Sequence[TensorSpec],
    max_bytes: int | None = None,
    *,
    slices: Mapping[str, Sequence[TensorSpec]] = {},
) -> list[FileLayout]:
    """The files of a model: one named as ``path``, or shards in its folder where ``specs`` take more than ``max_bytes``.

    ``slices``: tensor → the specs by which it is written, one after the other, where that is not by its own.
    """
    shares = cut(specs, max_bytes)
    if len(shares) == 1:
        return [file_layout(path.name, fields, specs, slices)]
    count = len(shares)
    names = [shard.name for shard in shard_paths(path, count)]
    return [
        file_layout(name, (dict(fields) if i == 0 else {}) | split_fields(i, count, len(specs)), share, slices)
        for i, (name, share) in enumerate(zip(names, shares, strict=True))
    ]


def split_fields(number: int, count: int, n_tensors: int) -> dict[str, Field]:
    """What ties file ``number`` to the others, in llama-gguf-split's order and types."""
    return {
        NO: Field(GGUFValueType.UINT16, number),
        TENSORS: Field(GGUFValueType.INT32, n_tensors),
        COUNT: Field(GGUFValueType.UINT16, count),
    }


def file_layout(
    name: str, fields: Mapping[str, Field], specs: Sequence[TensorSpec], slices: Mapping[str, Sequence[TensorSpec]] = {}
) -> FileLayout:
    head, offsets, size = header(fields, specs)
    slots: dict[str, Slot] = {}
    for spec in specs:
        for k, part in enumerate(slices.get(spec.name, (spec,))):
            slots[part.name] = Slot(part, offsets[spec.name] + k * part.nbytes)
    return FileLayout(name, head, size, slots)
