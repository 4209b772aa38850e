"""Damaged folders by the thousand: what a reader of any dialect must answer with an error of ours, or read as it stands.

    def test_mutations(tmp_path):
        assert wrong_answers(folder, tmp_path, seed=0, n=5000) == []

Each mutant differs from ``folder`` in one place, or in two: a value of a JSON file, a field of a safetensors header, a tensor dropped,
renamed, reshaped or of another dtype (the file around it stays sound, so that the dialect's own checks are what is asked), the JSON or the
numbers inside of a small tensor. The same seed gives the same mutants. Folders should be tiny: each mutant writes its changed file anew.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantcli.errors import CheckpointError, UnsupportedError
from quantcli.formats import open_checkpoint
from quantcli.tensors import DTYPES

ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 5, 7, 16, 17, 31, 63, 65, 127, 129, 255, 2**31, 2**63, 10**30, -(10**30), 0.0, -0.5, 0.5, 1e308,
    float("nan"), float("inf"), "", "0", "4", "none", "int", "float", "tensor", "channel", "group", "Linear", "..", "re:(", "re:.*", "\x00",
    "é" * 40, "float16", "float64", "complex64",
    [], [None], [0], [-1, -1], [2**40, 2**40], ["a", "b"], [[]], {}, {"": None}, {"a": {"b": []}},
)  # fmt: skip
"""Values of every JSON type: the one that is expected elsewhere, one off, huge, negative, not a number, and nested where none is."""

SMALL_BYTES = 4096
"""Tensors up to this size hold shapes, flags and metadata as often as weights: their contents are mutated too."""

SKIPPED_FILES = ("tokenizer", "generation_config", "quantcli.json")
"""No reader of weights looks at them."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """A damaged folder, valid until the next one is asked for; ``what`` says what was done to it."""

    path: Path
    what: str


@dataclass(slots=True)
class File:
    """One safetensors file taken apart: name → [dtype, shape, bytes], in the order of the data."""

    name: str
    tensors: dict[str, tuple[str, list[int], bytes]]

    @classmethod
    def read(cls, path: Path) -> File:
        raw = path.read_bytes()
        size = int.from_bytes(raw[:8], "little")
        header, data = json.loads(raw[8 : 8 + size]), raw[8 + size :]
        entries = sorted(((k, v) for k, v in header.items() if k != "__metadata__"), key=lambda item: item[1]["data_offsets"])
        return cls(path.name, {k: (v["dtype"], v["shape"], data[slice(*v["data_offsets"])]) for k, v in entries})

    def header(self) -> dict[str, Any]:
        """The header that fits the data."""
        offset, header = 0, {}
        for name, (dtype, shape, data) in self.tensors.items():
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + len(data)]}
            offset += len(data)
        return header

    def to_bytes(self, header: Any = None) -> bytes:
        text = json.dumps(self.header() if header is None else header).encode()
        return len(text).to_bytes(8, "little") + text + b"".join(data for _, _, data in self.tensors.values())


Change = Callable[[random.Random, File], str]


def mutated_folders(folder: Path, scratch: Path, *, seed: int, n: int) -> Iterator[Mutant]:
    """``n`` mutants of ``folder``, one after another in the same folder under ``scratch``."""
    rng = random.Random(seed)
    work = scratch / "mutant"
    shutil.copytree(folder, work)
    documents = {p.name: json.loads(p.read_text()) for p in sorted(folder.glob("*.json")) if not p.name.startswith(SKIPPED_FILES)}
    files = [File.read(path) for path in sorted(folder.glob("*.safetensors"))]
    for _ in range(n):
        touched: dict[str, bytes] = {}
        what = [mutate_json(rng, documents, touched) if rng.random() < 0.4 else mutate_weights(rng, files, touched)]
        if rng.random() < 0.2:
            what.append(mutate_json(rng, documents, touched))
        for name, data in touched.items():
            (work / name).write_bytes(data)
        yield Mutant(work, "; ".join(what))
        for name in touched:
            shutil.copyfile(folder / name, work / name)


def wrong_answers(folder: Path, scratch: Path, *, seed: int = 0, n: int = 5000, read: Callable[[Path], None] | None = None) -> list[str]:
    """What of ``n`` mutants ``read`` (by default :func:`read_everything`) answered with neither a sound read nor an error of ours."""
    read = read or read_everything
    read(folder)
    wrong = []
    for mutant in mutated_folders(folder, scratch, seed=seed, n=n):
        try:
            read(mutant.path)
        except (CheckpointError, UnsupportedError):
            continue
        except Exception as error:  # the list is of these
            wrong.append(f"{mutant.what}: {type(error).__name__}: {error}")
    return wrong


def read_everything(path: Path) -> None:
    """Open ``path`` and read each of its tensors: as announced, dense and as codes."""
    with open_checkpoint(str(path)) as checkpoint:
        for name, spec in checkpoint.specs.items():
            W = checkpoint.read(name)
            if tuple(W.shape) != spec.shape:
                raise AssertionError(f"{name}: announced {list(spec.shape)}, read {list(W.shape)}")
            if name in checkpoint.schemes and checkpoint.quantized(name).scheme.qtype != checkpoint.schemes[name].qtype:
                raise AssertionError(f"{name}: announced {checkpoint.schemes[name]}, read another")


# --- JSON files --------------------------------------------------------------------------------------------------------------------


def mutate_json(rng: random.Random, documents: dict[str, Any], touched: dict[str, bytes]) -> str:
    """Change one value of one JSON file; in config.json mostly what speaks of quantization."""
    name = rng.choice(sorted(documents))
    if rng.random() < 0.03:
        touched[name] = rng.choice((b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"a": 1, "a": 2}', b"[" * 100_000))
        return f"{name}: {touched[name][:20]!r}"
    document = copy.deepcopy(documents[name])
    words = document.get("quantization_config") if isinstance(document, dict) else None
    inside = bool(words) and rng.random() < 0.85
    what = mutate_value(rng, words if inside else document)
    touched[name] = json.dumps(document).encode()
    return f"{name}{': quantization_config' if inside else ''}{what}"


def mutate_value(rng: random.Random, root: Any) -> str:
    """Change one place of ``root``, chosen evenly among all its places, and say where."""
    places = [(parent, key, path) for parent, key, path in walk(root, "")]
    if not places:
        return ": nothing to change"
    parent, key, path = rng.choice(places)
    action = rng.choice(("replace", "replace", "replace", "delete", "rename", "nudge"))
    if action == "delete":
        del parent[key]
    elif action == "rename" and isinstance(parent, dict):
        parent[rng.choice(("x", str(key) + "_", str(key)[:-1]))] = parent.pop(key)
    elif action == "nudge" and type(parent[key]) in (int, float):
        parent[key] += rng.choice((-1, 1, 64, -64))
    else:
        action = "replace"
        parent[key] = copy.deepcopy(rng.choice(ODD_VALUES))
    now = json.dumps(parent[key])[:60] if action in ("replace", "nudge") else ""
    return f"{path}: {action} {now}"


def walk(node: Any, path: str) -> Iterator[tuple[Any, Any, str]]:
    """(parent, key, path) of every value under ``node``."""
    items = list(node.items()) if isinstance(node, dict) else list(enumerate(node)) if isinstance(node, list) else []
    for key, value in items:
        yield node, key, f"{path}.{key}"
        yield from walk(value, f"{path}.{key}")


# --- safetensors files ---------------------------------------------------------------------------------------------------------------


def mutate_weights(rng: random.Random, files: list[File], touched: dict[str, bytes]) -> str:
    """Change one file of weights: its header alone, or a tensor and the header with it."""
    original = rng.choice(files)
    if rng.random() < 0.2:
        return mutate_header(rng, original, touched)
    file = File(original.name, dict(original.tensors))
    change = rng.choice(CHANGES)
    what = change(rng, file)
    touched[file.name] = file.to_bytes()
    return f"{file.name}: {what}"


def mutate_header(rng: random.Random, file: File, touched: dict[str, bytes]) -> str:
    """A header that no longer fits its data, or bytes that are no header."""
    if rng.random() < 0.2:
        data = bytearray(file.to_bytes())
        at = rng.randrange(min(len(data), 400))
        data[at] = rng.randrange(256)
        touched[file.name] = bytes(data[: rng.randrange(len(data))] if rng.random() < 0.3 else data)
        return f"{file.name}: byte {at} of the file, {len(touched[file.name])} bytes"
    header = file.header()
    what = mutate_value(rng, header)
    touched[file.name] = file.to_bytes(header)
    return f"{file.name}: header{what}"


def pick(rng: random.Random, file: File, *, small: bool = False) -> str:
    """A tensor; half of the time one that is not a plain float, since these are the dialect's own."""
    names = [k for k, (_, _, data) in file.tensors.items() if not small or len(data) <= SMALL_BYTES] or list(file.tensors)
    coded = [k for k in names if file.tensors[k][0] not in ("BF16", "F16")]
    return rng.choice(coded if coded and rng.random() < 0.7 else names)


def drop(rng: random.Random, file: File) -> str:
    name = pick(rng, file)
    del file.tensors[name]
    return f"without {name}"


def rename(rng: random.Random, file: File) -> str:
    """Give a tensor another's last word, or a word that no reader knows; what stood there goes."""
    name, other = pick(rng, file), pick(rng, file)
    stem, _, _ = name.rpartition(".")
    new = rng.choice((f"{stem}.{other.rpartition('.')[2]}", f"{name}.weight", f"{name}x", other, stem or "x"))
    file.tensors = {new if k == name else k: v for k, v in file.tensors.items() if k == name or k != new}
    return f"{name} as {new}"


def duplicate(rng: random.Random, file: File) -> str:
    name, other = pick(rng, file), pick(rng, file)
    file.tensors[other] = file.tensors[name]
    return f"{other} is a copy of {name}"


def reshape(rng: random.Random, file: File) -> str:
    """Another shape, with as much data as it takes."""
    name = pick(rng, file)
    dtype, shape, data = file.tensors[name]
    new = list(shape)
    action = rng.choice(("one more", "one less", "turned", "flat", "deeper", "double", "empty"))
    if action in ("one more", "one less", "double", "empty") and new:
        axis = rng.randrange(len(new))
        new[axis] = {"one more": new[axis] + 1, "one less": max(0, new[axis] - 1), "double": 2 * new[axis], "empty": 0}[action]
    elif action == "turned":
        new = new[::-1]
    elif action == "flat":
        new = [size_of(new)]
    else:
        new = [1, *new]
    file.tensors[name] = (dtype, new, resized(data, size_of(new) * DTYPES[dtype].itemsize))
    return f"{name}: {shape} → {new}"


def retype(rng: random.Random, file: File) -> str:
    """Another dtype; the data are cut or repeated to fit."""
    name = pick(rng, file)
    dtype, shape, data = file.tensors[name]
    new = rng.choice([d for d in DTYPES if d != dtype])
    file.tensors[name] = (new, shape, resized(data, size_of(shape) * DTYPES[new].itemsize))
    return f"{name}: {dtype} → {new}"


def scramble(rng: random.Random, file: File) -> str:
    """Other contents of a small tensor: one byte, all ones, zeros, noise."""
    name = pick(rng, file, small=True)
    dtype, shape, data = file.tensors[name]
    noise = bytearray(data)
    if noise:
        noise[rng.randrange(len(noise))] = rng.randrange(256)
    new = rng.choice((bytes(noise), b"\xff" * len(data), bytes(len(data)), rng.randbytes(len(data))))
    file.tensors[name] = (dtype, shape, new)
    return f"{name}: other contents"


def rewrite(rng: random.Random, file: File) -> str:
    """Change the JSON that a tensor of bytes holds; a file without one has its small tensors scrambled."""
    names = [k for k, (dtype, _, data) in file.tensors.items() if dtype == "U8" and data[:1] == b"{" and data.strip()[-1:] == b"}"]
    if not names:
        return scramble(rng, file)
    name = rng.choice(names)
    document = json.loads(file.tensors[name][2])
    what = mutate_value(rng, document)
    data = json.dumps(document).encode()
    file.tensors[name] = ("U8", [len(data)], data)
    return f"{name}{what}"


CHANGES: tuple[Change, ...] = (drop, rename, duplicate, reshape, reshape, retype, scramble, rewrite, rewrite)


def size_of(shape: list[int]) -> int:
    n = 1
    for side in shape:
        n *= side
    return n


def resized(data: bytes, n: int) -> bytes:
    """``data`` cut or repeated to ``n`` bytes."""
    return (data * (n // len(data) + 1))[:n] if data else bytes(n)
