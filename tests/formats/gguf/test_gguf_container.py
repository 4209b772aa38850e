"""The GGUF container: what is written is read back, and a hostile header is an error in time, by name, without memory."""

from __future__ import annotations

import struct
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from gguf import GGUFValueType as T

from quantcli.errors import CheckpointError, UnsupportedError
from quantcli.formats.gguf.file.container import Field, tensor_spec
from quantcli.formats.gguf.file.headers import header, read_header

FIELDS = {
    "general.architecture": Field(T.STRING, "llama"),
    "a.bool": Field(T.BOOL, True),
    "a.float": Field(T.FLOAT32, 0.5),
    "a.long": Field(T.INT64, -(2**40)),
    "a.words": Field(T.ARRAY, ["", "é", "a\udcff"], T.STRING),
    "a.numbers": Field(T.ARRAY, [1, -2, 3], T.INT32),
    "a.bytes": Field(T.ARRAY, np.arange(5, dtype=np.uint8), T.UINT8),
}
SPECS = [
    tensor_spec("one.weight", "Q4_K", (3, 512)),
    tensor_spec("two.weight", "F32", (5,)),
    tensor_spec("three.weight", "BF16", (2, 3, 4)),
]


def write(path: Path, fields: dict[str, Field] = FIELDS, specs: list = SPECS) -> Path:
    head, _, size = header(fields, specs)
    path.write_bytes(head + bytes(size - len(head)))
    return path


def raw(fields: bytes = b"", tensors: bytes = b"", *, version: int = 3, n_fields: int = 0, n_tensors: int = 0, data: bytes = b"") -> bytes:
    """A file by its raw pieces, the data aligned to 32."""
    out = b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_fields) + fields + tensors
    return out + bytes(-len(out) % 32) + data


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def tensor(name: bytes = b"t", dims: tuple[int, ...] = (8,), kind: int = 0, offset: int = 0, n_dims: int | None = None) -> bytes:
    n = len(dims) if n_dims is None else n_dims
    return string(name) + struct.pack("<I", n) + struct.pack(f"<{len(dims)}Q", *dims) + struct.pack("<IQ", kind, offset)


def test_fields_and_tensors_come_back_as_written(tmp_path: Path) -> None:
    container = read_header(write(tmp_path / "a.gguf"))
    for key, field in FIELDS.items():
        got = container.fields[key]
        assert (got.type, got.element) == (field.type, field.element)
        assert got.value == field.value if field.element is None else list(got.value) == list(field.value)
    assert list(container.specs.values()) == SPECS


def test_gguf_package_reads_the_same_places(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf")
    container, second = read_header(path), GGUFReader(path)
    assert [(t.name, t.data_offset, t.n_bytes, t.shape.tolist()[::-1]) for t in second.tensors] == [
        (name, container.offsets[name], spec.nbytes, list(spec.shape)) for name, spec in container.specs.items()
    ]
    assert second.get_field("a.numbers").contents() == [1, -2, 3]


def test_every_tensor_starts_at_a_multiple_of_32() -> None:
    head, offsets, size = header(FIELDS, SPECS)
    assert len(head) % 32 == 0
    assert all(offset % 32 == 0 for offset in offsets.values())
    assert size == offsets["three.weight"] + 64


def test_version_2_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(raw(tensors=tensor(), version=2, n_tensors=1, data=bytes(32)))
    assert read_header(path).specs["t"].shape == (8,)


def test_a_declared_alignment_is_honoured(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    key = string(b"general.alignment") + struct.pack("<II", T.UINT32, 128)
    body = b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + key + tensor()
    path.write_bytes(body + bytes(-len(body) % 128) + bytes(32))
    assert read_header(path).offsets["t"] == 128


FIELD = struct.pack
HOSTILE = {
    "empty": (b"", "empty"),
    "other magic": (b"PK\3\4" + bytes(60), "begins with"),
    "ends in the preamble": (b"GGUF\3\0\0\0", "file ends"),
    "absurd tensor count": (raw(n_tensors=2**63), "tensors"),
    "absurd key count": (raw(n_fields=2**40), "metadata keys"),
    "key of 2^60 bytes": (raw(FIELD("<Q", 2**60) + bytes(32), n_fields=1), "name of"),
    "empty key": (raw(FIELD("<Q", 0) + bytes(32), n_fields=1), "name of 0 bytes"),
    "key that is no UTF-8": (raw(string(b"\xff\xfe") + bytes(32), n_fields=1), "UTF-8"),
    "key that cannot be printed": (raw(string(b"a\x1b[2J") + bytes(32), n_fields=1), "printed"),
    "string of 2^62 bytes": (raw(string(b"k") + FIELD("<IQ", T.STRING, 2**62), n_fields=1), "'k'"),
    "unknown value type": (raw(string(b"k") + FIELD("<IQ", 99, 0), n_fields=1), "type 99"),
    "bool of 7": (raw(string(b"k") + FIELD("<IB", T.BOOL, 7) + bytes(9), n_fields=1), "bool"),
    "array of 2^61 numbers": (raw(string(b"k") + FIELD("<IIQ", T.ARRAY, T.FLOAT64, 2**61), n_fields=1), "promises"),
    "array of 2^61 strings": (raw(string(b"k") + FIELD("<IIQ", T.ARRAY, T.STRING, 2**61), n_fields=1), "promises"),
    "array of arrays": (raw(string(b"k") + FIELD("<IIQ", T.ARRAY, T.ARRAY, 1) + bytes(32), n_fields=1), "array of arrays"),
    "key twice": (raw((string(b"k") + FIELD("<IB", T.UINT8, 1)) * 2, n_fields=2), "twice"),
    "alignment 0": (raw(string(b"general.alignment") + FIELD("<II", T.UINT32, 0), n_fields=1), "alignment"),
    "alignment 24": (raw(string(b"general.alignment") + FIELD("<II", T.UINT32, 24), n_fields=1), "power of two"),
    "alignment as text": (raw(string(b"general.alignment") + FIELD("<I", T.STRING) + string(b"32"), n_fields=1), "UINT32"),
    "five dimensions": (raw(tensors=tensor(dims=(1,) * 5), n_tensors=1, data=bytes(64)), "5 dimensions"),
    "no dimensions": (raw(tensors=tensor(dims=()) + bytes(16), n_tensors=1), "0 dimensions"),
    "2^32-1 dimensions": (raw(tensors=tensor(n_dims=2**32 - 1), n_tensors=1, data=bytes(64)), "dimensions"),
    "empty tensor": (raw(tensors=tensor(dims=(8, 0)), n_tensors=1, data=bytes(64)), "empty"),
    "product over 2^64": (raw(tensors=tensor(dims=(2**62, 2**62, 4)), n_tensors=1, data=bytes(64)), "file ends"),
    "unknown ggml type": (raw(tensors=tensor(kind=77), n_tensors=1, data=bytes(64)), "type 77"),
    "half a block": (raw(tensors=tensor(dims=(100,), kind=12), n_tensors=1, data=bytes(640)), "Q4_K block 256"),
    "offset past the end": (raw(tensors=tensor(offset=2**63), n_tensors=1, data=bytes(64)), "file ends"),
    "offset unaligned": (raw(tensors=tensor(offset=4), n_tensors=1, data=bytes(64)), "alignment"),
    "cut data": (raw(tensors=tensor(), n_tensors=1, data=bytes(31)), "file ends"),
    "overlap": (raw(tensors=tensor(b"a", (16,)) + tensor(b"b", (16,), offset=32), n_tensors=2, data=bytes(96)), "inside tensor 'a'"),
    "tensor twice": (raw(tensors=tensor() + tensor(offset=32), n_tensors=2, data=bytes(96)), "twice"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_header_is_an_error_that_names_the_file(case: str, tmp_path: Path) -> None:
    data, word = HOSTILE[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=word) as error:
        read_header(path)
    assert "bad.gguf" in str(error.value)


def test_a_bad_tensor_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(raw(tensors=tensor(b"blk.3.ffn_up.weight", offset=2**40), n_tensors=1, data=bytes(64)))
    with pytest.raises(CheckpointError, match=r"tensor 'blk\.3\.ffn_up\.weight'"):
        read_header(path)


@pytest.mark.parametrize(("version", "word"), [(1, "version 1"), (4, "version 4"), (3 << 24, "big-endian")])
def test_versions_nobody_here_reads_are_refused(version: int, word: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(raw(version=version))
    with pytest.raises(UnsupportedError, match=word):
        read_header(path)


def test_lengths_that_lie_cost_neither_time_nor_memory(tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    tracemalloc.start()
    start = time.perf_counter()
    for data, _ in HOSTILE.values():
        path.write_bytes(data)
        with pytest.raises(CheckpointError):
            read_header(path)
    seconds, peak = time.perf_counter() - start, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds < 2
    assert peak < 4 << 20


def test_a_file_full_of_strings_is_refused_before_they_fill_memory(tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    count = 3 << 20
    path.write_bytes(raw(string(b"k") + struct.pack("<IIQ", T.ARRAY, T.STRING, count) + bytes(8 * count), n_fields=1))
    with pytest.raises(CheckpointError, match="'k'"):
        read_header(path)


def test_strings_and_tensors_take_little_more_memory_than_they_take_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "many.gguf"
    count, n_tensors = 1 << 18, 1 << 12
    words = b"".join(string(b"%02d" % (i % 100)) for i in range(count))
    tensors = b"".join(tensor(b"t%d" % i, offset=32 * i) for i in range(n_tensors))
    key = string(b"k") + struct.pack("<IIQ", T.ARRAY, T.STRING, count) + words
    path.write_bytes(raw(key, tensors, n_fields=1, n_tensors=n_tensors, data=bytes(32 * n_tensors)))
    del words, tensors, key
    tracemalloc.start()
    container = read_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < path.stat().st_size + (6 << 20)
    assert container.get("k")[:3] == ["00", "01", "02"]
    assert len(container.get("k")) == count
