"""A malformed GGUF file is an error that is ours, or a correct read: no crash, no hang, and no more memory than the file's own size.

Whole files and models in several are damaged with fixed seeds in every field that a header has: counts, lengths, types, dimensions,
offsets, the alignment, the split.* keys, the names of shards; and in their bytes: changed, cut, inserted, removed, moved.
"""

from __future__ import annotations

import random
import struct
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader
from gguf import GGUFValueType as T

from quantcli.errors import CheckpointError, UnsupportedError
from quantcli.formats import open_checkpoint
from quantcli.formats.gguf.file import splits
from quantcli.formats.gguf.file.container import BLOCKS, Container, Field, tensor_spec
from quantcli.formats.gguf.file.headers import header
from quantcli.formats.gguf.read import GgufCheckpoint
from quantcli.tensors import DTYPES

HIDDEN, WIDE, VOCAB = 64, 96, 40

N_QUICK, N_WHOLE = 400, 10_000
SECONDS = 2.0
"""What one file of 30 KB may take of the processor, ten times what any takes."""
SPARE_BYTES = 4 << 20


def u32(value: int) -> Field:
    return Field(T.UINT32, value)


def fields(arch: str) -> dict[str, Field]:
    """Metadata with every kind of value."""
    words = {"block_count": 1, "context_length": 64, "embedding_length": HIDDEN, "feed_forward_length": WIDE, "attention.head_count": 4}
    return {
        "general.architecture": Field(T.STRING, arch),
        "general.alignment": u32(32),
        "general.file_type": u32(2),
        **{f"{arch}.{word}": u32(value) for word, value in words.items()},
        f"{arch}.attention.head_count_kv": u32(2),
        f"{arch}.attention.layer_norm_rms_epsilon": Field(T.FLOAT32, 1e-5),
        f"{arch}.rope.freq_base": Field(T.FLOAT64, 1e4),
        "tokenizer.ggml.model": Field(T.STRING, "gpt2"),
        "tokenizer.ggml.tokens": Field(T.ARRAY, [f"t{i}" for i in range(VOCAB)], T.STRING),
        "tokenizer.ggml.scores": Field(T.ARRAY, np.arange(VOCAB, dtype=np.float32), T.FLOAT32),
        "tokenizer.ggml.token_type": Field(T.ARRAY, np.ones(VOCAB, dtype=np.int32), T.INT32),
        "tokenizer.ggml.add_bos_token": Field(T.BOOL, True),
        "some.bytes": Field(T.ARRAY, np.arange(7, dtype=np.uint8), T.UINT8),
        "some.long": Field(T.INT64, -(2**40)),
    }


def shapes(arch: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tensors of every dtype that matters, with one, two and three dimensions."""
    found: dict[str, tuple[str, tuple[int, ...]]] = {
        "output.weight": ("Q8_0", (VOCAB, HIDDEN)),
        "token_embd.weight": ("Q4_0", (VOCAB, HIDDEN)),
        "output_norm.weight": ("F32", (HIDDEN,)),
        "blk.0.attn_norm.weight": ("F32", (HIDDEN,)),
        "blk.0.ffn_norm.weight": ("F32", (HIDDEN,)),
        "blk.0.attn_q.weight": ("F16", (HIDDEN, HIDDEN)),
        "blk.0.attn_k.weight": ("BF16", (HIDDEN // 2, HIDDEN)),
        "blk.0.attn_v.weight": ("Q5_1", (HIDDEN // 2, HIDDEN)),
        "blk.0.attn_output.weight": ("Q4_1", (HIDDEN, HIDDEN)),
        "blk.0.ffn_up.weight": ("Q5_0", (WIDE, HIDDEN)),
        "blk.0.ffn_gate.weight": ("Q8_0", (WIDE, HIDDEN)),
        "blk.0.ffn_down.weight": ("Q4_0", (HIDDEN, WIDE)),
    }
    if arch != "llama":
        found["blk.0.experts.weight"] = ("Q4_0", (3, WIDE, HIDDEN))
        found["blk.0.table"] = ("I32", (5,))
    return found


def files_of(arch: str, max_bytes: int | None) -> dict[str, bytes]:
    """Name → bytes of a model in one file, or in several of at most ``max_bytes``."""
    random_bytes = random.Random(arch).randbytes
    specs = [tensor_spec(name, *what) for name, what in shapes(arch).items()]
    made = {}
    for layout in splits.layouts(Path("m.gguf"), fields(arch), specs, max_bytes):
        data = bytearray(layout.header + bytes(layout.size - len(layout.header)))
        for slot in layout.slots.values():
            data[slot.offset : slot.offset + slot.spec.nbytes] = random_bytes(slot.spec.nbytes)
        made[layout.name] = bytes(data)
    return made


@dataclass(frozen=True)
class Spot:
    """A number in a header: where it lies, how it is packed, what it means."""

    at: int
    form: str
    what: str


def spots(data: bytes) -> list[Spot]:
    """Every number of a sound header, found by walking it with no help of the reader."""
    found = [Spot(4, "<I", "version"), Spot(8, "<Q", "n_tensors"), Spot(16, "<Q", "n_fields")]
    at = 24
    sizes = {T.STRING: 0, T.UINT8: 1, T.INT8: 1, T.BOOL: 1, T.UINT16: 2, T.INT16: 2, T.UINT64: 8, T.INT64: 8, T.FLOAT64: 8}

    def number(form: str, what: str) -> int:
        nonlocal at
        found.append(Spot(at, form, what))
        at += struct.calcsize(form)
        return struct.unpack_from(form, data, found[-1].at)[0]

    def string(what: str) -> str:
        nonlocal at
        length = number("<Q", f"length of {what}")
        at += length
        return data[at - length : at].decode()

    def value(kind: int, key: str) -> None:
        nonlocal at
        if kind == T.STRING:
            string(f"value of {key}")
        elif kind in (T.UINT16, T.UINT32, T.INT32):
            number("<H" if kind == T.UINT16 else "<I", f"value of {key}")
        else:
            at += sizes.get(T(kind), 4)

    n_tensors, n_fields = struct.unpack_from("<QQ", data, 8)
    for _ in range(n_fields):
        key = string("key")
        kind = number("<I", f"type of {key}")
        if kind != T.ARRAY:
            value(kind, key)
            continue
        element, count = number("<I", f"element type of {key}"), number("<Q", f"count of {key}")
        for _ in range(count):
            value(element, key)
    for _ in range(n_tensors):
        name = string("tensor name")
        for k in range(number("<I", f"n_dims of {name}")):
            number("<Q", f"dim {k} of {name}")
        number("<I", f"type of {name}")
        number("<Q", f"offset of {name}")
    return found


NUMBERS = (0, 1, 2, 3, 7, 8, 31, 32, 33, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**62, 2**63, 2**64 - 1)


def renumbered(rng: random.Random, data: bytearray, known: list[Spot]) -> str:
    spot = rng.choice(known)
    limit = 1 << (8 * struct.calcsize(spot.form))
    if spot.at + struct.calcsize(spot.form) > len(data):
        return "nothing"
    old = struct.unpack_from(spot.form, data, spot.at)[0]
    near = (old + 1, old - 1, 2 * old, old // 2, old + 32, old ^ (1 << rng.randrange(8 * struct.calcsize(spot.form))))
    new = rng.choice((*NUMBERS, *near, *near, rng.getrandbits(64))) % limit
    struct.pack_into(spot.form, data, spot.at, new)
    return f"{spot.what}: {old} → {new}"


def flipped(rng: random.Random, data: bytearray, known: list[Spot]) -> str:
    at = rng.randrange(min(len(data), known[-1].at + 8) if rng.random() < 0.8 else len(data))
    data[at] = rng.randrange(256)
    return f"byte {at}"


def cut_off(rng: random.Random, data: bytearray, known: list[Spot]) -> str:
    at = rng.choice((rng.randrange(len(data)), rng.randrange(min(len(data), known[-1].at + 8)), len(data) - 1))
    del data[at:]
    return f"cut at {at}"


def inserted(rng: random.Random, data: bytearray, known: list[Spot]) -> str:
    at = rng.randrange(min(len(data), known[-1].at + 8))
    data[at:at] = rng.randbytes(rng.choice((1, 4, 8, 32, 33)))
    return f"inserted at {at}"


def removed(rng: random.Random, data: bytearray, known: list[Spot]) -> str:
    at = rng.randrange(min(len(data), known[-1].at + 8))
    del data[at : at + rng.choice((1, 4, 8, 32, 33))]
    return f"removed at {at}"


def swapped(rng: random.Random, data: bytearray, known: list[Spot]) -> str:
    """Two numbers of one size change places: a tensor's offset with another's, a dimension with a type."""
    a = rng.choice(known)
    b = rng.choice([spot for spot in known if spot.form == a.form])
    n = struct.calcsize(a.form)
    if max(a.at, b.at) + n <= len(data):
        data[a.at : a.at + n], data[b.at : b.at + n] = data[b.at : b.at + n], data[a.at : a.at + n]
    return f"{a.what} ↔ {b.what}"


Change = Callable[[random.Random, bytearray, list[Spot]], str]
CHANGES: tuple[Change, ...] = (renumbered, renumbered, renumbered, renumbered, flipped, cut_off, inserted, removed, swapped)


@dataclass(frozen=True)
class Case:
    """A damaged model: name → bytes of its files, and what was done to them."""

    seed: int
    files: dict[str, bytes]
    done: tuple[str, ...]


def cases(n: int) -> Iterator[Case]:
    """``n`` damaged models, a third of them in several files."""
    whole = [files_of("llama", None), files_of("strange", None), files_of("llama", 12_000)]
    known = {id(data): spots(data) for files in whole for data in files.values()}
    for seed in range(n):
        rng = random.Random(seed)
        files = rng.choice(whole)
        name = rng.choice(list(files))
        data, done = bytearray(files[name]), []
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            if data:
                done.append(rng.choice(CHANGES)(rng, data, known[id(files[name])]))
        changed = files | {name: bytes(data)}
        if len(files) > 1 and rng.random() < 0.1:
            other = rng.choice(list(files))
            changed |= {name: files[other]}
            done.append(f"{name} is a copy of {other}")
        yield Case(seed, changed, (name, *done))


def check(folder: Path, case: Case) -> bool:
    """Open and read a damaged model within time and memory; whether it was refused."""
    for path in folder.iterdir():
        path.unlink()
    for name, data in case.files.items():
        (folder / name).write_bytes(data)
    source = folder / min(case.files)
    budget = sum(map(len, case.files.values())) + SPARE_BYTES
    tracemalloc.reset_peak()
    before, started = tracemalloc.get_traced_memory()[0], time.thread_time()
    refusal = None
    try:
        with open_checkpoint(str(source)) as checkpoint:
            assert isinstance(checkpoint, GgufCheckpoint)
            read_all(checkpoint)
    except (CheckpointError, UnsupportedError) as error:
        refusal = str(error)
    assert time.thread_time() - started < SECONDS, case
    assert tracemalloc.get_traced_memory()[1] - before < budget, case
    assert refusal is None or "/" in refusal, case  # it names the file
    return refusal is not None


def read_all(checkpoint: GgufCheckpoint) -> None:
    """Every tensor as its spec says, of the bytes that lie where the header says."""
    container = checkpoint.container
    for name, spec in checkpoint.specs.items():
        location = container.location(checkpoint.gguf_names[name])
        assert spec.shape[-1] % BLOCKS[spec.dtype][0] == 0
        assert location.offset + spec.nbytes <= location.path.stat().st_size
        if name in checkpoint.schemes:
            assert checkpoint.quantized(name).parts["blocks"].nbytes == spec.nbytes
            assert tuple(checkpoint.read(name).shape) == spec.shape
        elif spec.dtype in DTYPES:
            W = checkpoint.read(name)
            assert (tuple(W.shape), W.dtype) == (spec.shape, DTYPES[spec.dtype])


def run(folder: Path, n: int) -> int:
    """How many of ``n`` damaged models were refused."""
    tracemalloc.start()
    try:
        return sum(check(folder, case) for case in cases(n))
    finally:
        tracemalloc.stop()


def test_no_damage_to_a_file_does_more_than_raise(tmp_path: Path) -> None:
    refused = run(tmp_path, N_QUICK)
    assert N_QUICK // 4 < refused < N_QUICK  # neither deaf nor blind


@pytest.mark.slow
def test_no_damage_to_ten_thousand_files_does_more_than_raise(tmp_path: Path) -> None:
    refused = run(tmp_path, N_WHOLE)
    assert N_WHOLE // 4 < refused < N_WHOLE


@pytest.mark.parametrize(("arch", "max_bytes"), [("llama", None), ("strange", None), ("llama", 12_000)])
def test_the_undamaged_files_are_read(tmp_path: Path, arch: str, max_bytes: int | None) -> None:
    case = Case(0, files_of(arch, max_bytes), ())
    assert len(case.files) == (1 if max_bytes is None else 5)
    assert not check_undamaged(tmp_path, case)


def check_undamaged(folder: Path, case: Case) -> bool:
    tracemalloc.start()
    try:
        return check(folder, case)
    finally:
        tracemalloc.stop()


def test_a_file_that_is_taken_says_what_the_gguf_package_reads(tmp_path: Path) -> None:
    """Of the damaged files that we open, where the second reader opens them too."""
    agreed = 0
    for case in cases(400):
        if len(case.files) > 1:
            continue
        path = tmp_path / "m.gguf"
        path.write_bytes(case.files["m.gguf"])
        try:
            ours = GgufCheckpoint(path, as_stored=True).container
        except (CheckpointError, UnsupportedError):
            continue
        agreed += agrees(ours, GGUFReader(path))
    assert agreed > 20


def agrees(ours: Container, theirs: GGUFReader) -> bool:
    read = {t.name: (GGMLQuantizationType(t.tensor_type).name, tuple(t.shape.tolist()[::-1]), t.data_offset) for t in theirs.tensors}
    assert read == {name: (spec.dtype, spec.shape, ours.offsets[name]) for name, spec in ours.specs.items()}
    return True


def test_every_number_of_a_header_is_found() -> None:
    """The walk that aims the damage covers the header: its last number is the last tensor's offset, and fields of each kind are there."""
    data = files_of("strange", None)["m.gguf"]
    found = spots(data)
    assert found[-1].what == "offset of blk.0.table"
    head, _, _ = header(fields("strange"), [tensor_spec(name, *what) for name, what in shapes("strange").items()])
    assert len(head) - 32 < found[-1].at + 8 <= len(head)
    assert {"n_tensors", "n_fields", "value of general.alignment", "count of tokenizer.ggml.tokens"} <= {spot.what for spot in found}
