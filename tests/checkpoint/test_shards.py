"""Safetensors files read and laid out; most of this is what a hostile or damaged file must not achieve."""

from __future__ import annotations

import json
import random
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from quantcli.checkpoint.locations import read_tensor
from quantcli.checkpoint.shards import INDEX, layout, open_folder, read_header
from quantcli.errors import CheckpointError
from quantcli.output.writer import Writer
from quantcli.tensors import DTYPE_NAMES, DTYPES, TensorSpec


def raw(header: object, data: bytes = b"", n: int | None = None) -> bytes:
    """A safetensors file by hand; ``n``: the header length it claims."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if n is None else n).to_bytes(8, "little") + text + data


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def sample_tensors() -> dict[str, torch.Tensor]:
    """One tensor of every dtype, with odd sizes, a scalar and an empty one."""
    g = torch.Generator().manual_seed(1)
    tensors = {}
    for i, (word, dtype) in enumerate(DTYPES.items()):
        bits = torch.randint(0, 256, (3 * (2 * i + 1) * dtype.itemsize,), generator=g, dtype=torch.uint8)
        tensors[f"t.{word}"] = (bits % 2).bool().reshape(3, -1) if word == "BOOL" else bits.view(dtype).reshape(3, -1)
    return tensors | {"scalar": torch.tensor(7, dtype=torch.int32), "empty": torch.empty(0, 5, dtype=torch.bfloat16)}


def equal_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    same = a.dtype == b.dtype and a.shape == b.shape
    return same and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def test_every_dtype_reads_as_safetensors_itself_reads_it(tmp_path: Path) -> None:
    tensors = sample_tensors()
    save_file(tensors, tmp_path / "model.safetensors")
    shards = open_folder(tmp_path)
    assert shards.specs.keys() == tensors.keys()
    for name, tensor in tensors.items():
        spec = shards.specs[name]
        assert (spec.dtype, spec.shape, spec.nbytes) == (DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), tensor.nbytes)
        assert equal_bytes(shards.read(name), tensor)


@pytest.mark.parametrize(("word", "value"), [("U16", 65_535), ("U32", 2**32 - 1), ("U64", 2**63)])
def test_unsigned_numbers_are_read_beyond_what_signed_ones_hold(tmp_path: Path, word: str, value: int) -> None:
    data = value.to_bytes(int(word[1:]) // 8, "little")
    (tmp_path / "model.safetensors").write_bytes(raw({"a": entry(word, (1,), (0, len(data)))}, data))
    assert open_folder(tmp_path).read("a").tolist() == [value]


def test_exponents_are_read_as_powers_of_two(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(raw({"a": entry("F8_E8M0", (3,), (0, 3))}, bytes([127, 130, 0])))
    assert open_folder(tmp_path).read("a").float().tolist() == [1, 8, 2**-127]


def test_shards_and_index_of_another_writer_read_the_same(tiny_llama: Callable[..., Path]) -> None:
    folder = tiny_llama(shards=3)
    shards = open_folder(folder)
    expected = {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}
    assert shards.notes == ()
    assert shards.specs.keys() == expected.keys()
    assert all(equal_bytes(shards.read(name), tensor) for name, tensor in expected.items())


def test_many_threads_read_the_same_bytes_as_one(tiny_llama: Callable[..., Path]) -> None:
    shards = open_folder(tiny_llama(shards=2))
    names = list(shards.specs) * 8
    with ThreadPoolExecutor(8) as pool:
        assert all(equal_bytes(a, b) for a, b in zip(pool.map(shards.read, names), map(shards.read, names), strict=True))


@pytest.mark.parametrize("max_shard_bytes", [10**9, 40, 1])
def test_what_we_write_equals_safetensors_own_bytes(tmp_path: Path, max_shard_bytes: int) -> None:
    tensors = sample_tensors()
    specs = [TensorSpec.dense(name, DTYPE_NAMES[t.dtype], tuple(t.shape)) for name, t in tensors.items()]
    files, sidecars = layout(specs, max_shard_bytes=max_shard_bytes)
    with Writer(tmp_path / "out") as writer:
        writer.declare(files, sidecars)
        for name, tensor in tensors.items():
            writer.put(name, tensor)
        writer.commit()
    for file in files:
        save_file({name: tensors[name] for name in file.slots}, tmp_path / "theirs", metadata={"format": "pt"})
        assert (tmp_path / "out" / file.name).read_bytes() == (tmp_path / "theirs").read_bytes()
        assert max_shard_bytes >= sum(s.spec.nbytes for s in file.slots.values()) or len(file.slots) == 1
    shards = open_folder(tmp_path / "out")
    assert all(equal_bytes(shards.read(name), tensor) for name, tensor in tensors.items())


def test_shards_are_named_and_indexed_as_hugging_face_does() -> None:
    files, sidecars = layout([TensorSpec.dense(name, "F32", (4,)) for name in "abcd"], max_shard_bytes=32)
    assert [f.name for f in files] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = json.loads(sidecars[INDEX])
    assert index["metadata"]["total_size"] == 64
    assert index["weight_map"] == {"a": files[0].name, "b": files[0].name, "c": files[1].name, "d": files[1].name}


HUGE = 2**62
BAD_HEADERS: dict[str, bytes] = {
    "an empty file": b"",
    "half a length": b"\x08\0\0",
    "a length beyond the file": raw({}, n=10**6),
    "the longest length": raw({}, n=2**64 - 1),
    "no UTF-8": raw(b'{"\xff":1}'),
    "no JSON": raw(b'{"a":'),
    "no object": raw([]),
    "nothing": raw(b""),
    "a double key": raw(b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'),
    "a double field": raw(b'{"a":{"dtype":"F32","dtype":"F16","shape":[2],"data_offsets":[0,8]}}', bytes(8)),
    "an entry that is a list": raw({"a": []}),
    "an entry without shape": raw({"a": {"dtype": "F32", "data_offsets": [0, 0]}}),
    "an unknown dtype": raw({"a": entry("F7")}, bytes(8)),
    "a dtype that is no word": raw({"a": entry(["F32"])}, bytes(8)),
    "a negative size": raw({"a": entry(shape=(-2,))}, bytes(8)),
    "two negative sizes": raw({"a": entry(shape=(-1, -2))}, bytes(8)),
    "a float size": raw({"a": entry(shape=(2.0,))}, bytes(8)),
    "a boolean size": raw({"a": entry(shape=(True, 2))}, bytes(8)),
    "a shape that is a number": raw({"a": entry(shape=2)}, bytes(8)),
    "an overflowing shape": raw({"a": entry(shape=(HUGE, HUGE, 0, 2))}, bytes(8)),
    "a shape whose product wraps to 8 bytes": raw({"a": entry(shape=(2**63 + 1, 2))}, bytes(8)),
    "a thousand dimensions": raw({"a": entry(shape=(1,) * 1000 + (2,))}, bytes(8)),
    "an offset past the end": raw({"a": entry(offsets=(0, 8))}, bytes(7)),
    "an absurd tensor": raw({"a": entry(shape=(HUGE,), offsets=(0, 4 * HUGE))}, bytes(8)),
    "a negative offset": raw({"a": entry(offsets=(-8, 0))}, bytes(8)),
    "offsets in reverse": raw({"a": entry(offsets=(8, 0))}, bytes(8)),
    "three offsets": raw({"a": entry(offsets=(0, 8, 8))}, bytes(8)),
    "a size unlike dtype and shape": raw({"a": entry(shape=(3,))}, bytes(8)),
    "an overlap": raw({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)),
    "a hole": raw({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)),
    "a hole at the start": raw({"a": entry(offsets=(4, 12))}, bytes(12)),
    "data behind the last tensor": raw({"a": entry()}, bytes(9)),
    "no tensor but data": raw({}, bytes(8)),
    "metadata that are no strings": raw({"__metadata__": {"a": 1}, "a": entry()}, bytes(8)),
    "metadata that are a list": raw({"__metadata__": [], "a": entry()}, bytes(8)),
    "a name without letters": raw({"": entry()}, bytes(8)),
    "a name that moves the cursor": raw({"a\x1b[2J": entry()}, bytes(8)),
    "a name that is half a character": raw(b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8)),
    "deep nesting": raw(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
    "a number of ten thousand digits": raw(b'{"a":{"dtype":"F32","shape":[' + b"9" * 10_000 + b'],"data_offsets":[0,8]}}', bytes(8)),
    "millions of list items": raw(b'{"a":[' + b"0," * 8_000_000 + b"0]}"),
    "millions of objects": raw(b'{"a":[' + b"{}," * 2_000_000 + b"{}]}"),
}


@pytest.mark.parametrize("what", BAD_HEADERS)
def test_a_bad_header_is_an_error_at_once_and_without_memory(tmp_path: Path, what: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(BAD_HEADERS[what])
    tracemalloc.start()
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .") as caught:
        open_folder(tmp_path)
    seconds, (_, peak) = time.perf_counter() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 1
    assert peak < 3 * len(BAD_HEADERS[what]) + 2**20
    assert len(str(caught.value)) < 500 + len(str(tmp_path))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("bad", [entry("F7"), entry(shape=(-2,)), entry(offsets=(0, 80)), entry(shape=(3,))])
def test_an_error_names_the_tensor(tmp_path: Path, bad: dict) -> None:
    (tmp_path / "model.safetensors").write_bytes(raw({"model.norm.weight": bad}, bytes(8)))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: "):
        open_folder(tmp_path)


@pytest.mark.parametrize("metadata", [{}, {"__metadata__": {}}, {"__metadata__": None}], ids=["absent", "empty", "null"])
def test_a_header_without_metadata_is_read_whatever_stands_in_its_place(tmp_path: Path, metadata: dict) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw({**metadata, "a": entry()}, bytes(range(8))))
    with safe_open(path, "pt") as reference:
        assert torch.equal(open_folder(tmp_path).read("a"), reference.get_tensor("a"))


def test_unaligned_tensors_of_any_size_are_read(tmp_path: Path) -> None:
    values = torch.arange(50_000.0)
    header = {"a": entry("U8", (1,), (0, 1)), "b": entry("F32", (50_000,), (1, 200_001))}
    (tmp_path / "model.safetensors").write_bytes(raw(header, b"\x07" + values.numpy().tobytes()))
    shards = open_folder(tmp_path)
    assert shards.read("a").tolist() == [7]
    assert torch.equal(shards.read("b"), values)
    assert shards.read("b").data_ptr() % 4 == 0


def mutated(good: bytes, rng: random.Random) -> bytes:
    """``good`` with a few random edits, mostly of the header: bytes, numbers, words, cuts and copies."""
    n = int.from_bytes(good[:8], "little")
    text, data = bytearray(good[8 : 8 + n]), good[8 + n :]
    words = [
        b"-1",
        b"0",
        b"9" * 30,
        b"1e3",
        b"null",
        b"[]",
        b"{}",
        b'"F16"',
        b'"I8"',
        b"[[",
        b"\xff",
        b'"',
        b"true",
        b"18446744073709551615",
    ]
    for _ in range(rng.choice((1, 1, 2))):
        at, end = sorted((rng.randrange(len(text)), rng.randrange(len(text))))
        kind = rng.randrange(6)
        if kind == 0:
            text[at] = rng.randrange(256)
        elif kind == 1:
            text[at : at + rng.randint(1, 4)] = rng.choice(words)
        elif kind == 2:
            del text[at : min(end, at + 20)]
        elif kind == 3:
            text[at:at] = text[at : min(end, at + 60)]
        elif kind == 4:
            digits = [i for i, c in enumerate(text) if chr(c).isdigit()]
            text[rng.choice(digits)] = ord(rng.choice("0123456789"))
        else:
            data = data[: rng.randrange(len(data) + 1)] if rng.random() < 0.5 else data + b"x"
    length = len(text) if rng.random() < 0.9 else rng.choice([0, 1, n, len(text) + 1, 2**40, 2**63])
    return length.to_bytes(8, "little") + bytes(text) + data


def test_four_thousand_damaged_files_are_errors_or_read_as_the_reference_reads_them(tmp_path: Path) -> None:
    rng = random.Random(0)
    path = tmp_path / "model.safetensors"
    save_file({"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.arange(5, dtype=torch.int16), "c": torch.zeros(0)}, path, {"x": "y"})
    good = path.read_bytes()
    outcome = {"error": 0, "read": 0}
    for _ in range(4000):
        path.write_bytes(mutated(good, rng))
        try:
            tensors = {name: read_tensor(location) for name, location in read_header(path).items()}
        except CheckpointError:
            outcome["error"] += 1
            continue
        outcome["read"] += 1
        with safe_open(path, "pt") as theirs:  # what we accept, the reference accepts
            assert set(theirs.keys()) == tensors.keys()
            assert all(equal_bytes(theirs.get_tensor(name), tensor) for name, tensor in tensors.items())
    assert outcome["error"] > 1000
    assert outcome["read"] > 100


def test_the_reference_refuses_no_less_than_half_of_the_bad_headers(tmp_path: Path) -> None:
    """Holds the table above to reality: had it errors of its own making, the reference would read them."""
    refused = 0
    for data in BAD_HEADERS.values():
        (tmp_path / "x.safetensors").write_bytes(data)
        try:
            with safe_open(tmp_path / "x.safetensors", "pt"):
                pass
        except SafetensorError:
            refused += 1
    assert refused > len(BAD_HEADERS) / 2


def two_shards(folder: Path) -> dict:
    """A good folder of two shards; returns its index."""
    save_file({"a": torch.ones(2)}, folder / "m-1.safetensors")
    save_file({"b": torch.ones(2)}, folder / "m-2.safetensors")
    return {"metadata": {"total_size": 16.0}, "weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}


def placed(**where: object) -> Callable[[dict], object]:
    return lambda index: {**index, "weight_map": {**index["weight_map"], **where}}


BAD_INDEXES: dict[str, tuple[Callable[[dict], object], str]] = {
    "a list": (lambda index: [], "weight_map"),
    "no weight_map": (lambda index: {}, "weight_map"),
    "a weight_map that is a list": (lambda index: {"weight_map": ["a"]}, "weight_map"),
    "an empty weight_map": (lambda index: {"weight_map": {}}, "weight_map"),
    "a missing shard": (placed(c="m-3.safetensors"), "m-3.safetensors; finish the download"),
    "a name that no shard has": (placed(c="m-1.safetensors"), "places c in m-1.safetensors"),
    "the wrong shard": (placed(a="m-2.safetensors", b="m-1.safetensors"), "places a in m-2.safetensors, but it is in m-1"),
    "a path upwards": (placed(a="../m-1.safetensors"), "a: '../m-1.safetensors' leaves the folder"),
    "a path upwards in the middle": (placed(a="x/../../m-1.safetensors"), "leaves the folder"),
    "an absolute path": (placed(a="/etc/m-1.safetensors"), "leaves the folder"),
    "a path of Windows": (placed(a="..\\m-1.safetensors"), "leaves the folder"),
    "a drive of Windows": (placed(a="C:\\m-1.safetensors"), "leaves the folder"),
    "a pickle": (placed(a="m-1.bin"), "is not a .safetensors file"),
    "a file that is a number": (placed(a=1), "is not a .safetensors file"),
    "a name that is control characters": (placed(**{"\x1b[0m": "m-1.safetensors"}), "is not a valid name"),
}


@pytest.mark.parametrize("what", BAD_INDEXES)
def test_a_bad_index_is_an_error_that_says_where(tmp_path: Path, what: str) -> None:
    damage, message = BAD_INDEXES[what]
    (tmp_path / INDEX).write_text(json.dumps(damage(two_shards(tmp_path))))
    with pytest.raises(CheckpointError) as caught:
        open_folder(tmp_path)
    assert message in str(caught.value)
    assert INDEX in str(caught.value)


def test_an_index_with_two_places_for_one_tensor_is_an_error(tmp_path: Path) -> None:
    two_shards(tmp_path)
    (tmp_path / INDEX).write_text('{"weight_map":{"a":"m-1.safetensors","b":"m-2.safetensors","a":"m-2.safetensors"}}')
    with pytest.raises(CheckpointError, match="duplicate key 'a'"):
        open_folder(tmp_path)


def test_a_tensor_that_lies_in_two_shards_is_an_error(tmp_path: Path) -> None:
    index = two_shards(tmp_path)
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "m-2.safetensors")
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="a: lies in two shards"):
        open_folder(tmp_path)


def test_a_tensor_that_the_index_forgot_is_read_and_noted(tmp_path: Path) -> None:
    index = two_shards(tmp_path)
    save_file({"b": torch.ones(2), "lm_head.weight": torch.full((2,), 3.0)}, tmp_path / "m-2.safetensors")
    (tmp_path / INDEX).write_text(json.dumps(index))
    shards = open_folder(tmp_path)
    assert "lm_head.weight" in shards.notes[0]
    assert shards.read("lm_head.weight").tolist() == [3.0, 3.0]


def test_links_into_a_cache_are_followed(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "blobs/0a1b")
    (tmp_path / "snapshot/model.safetensors").symlink_to("../blobs/0a1b")
    assert open_folder(tmp_path / "snapshot").read("a").tolist() == [1.0, 1.0]


def test_a_lone_file_of_another_name_is_the_model_and_two_are_an_error(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "gptq_model-4bit-128g.safetensors")
    save_file({"x": torch.ones(2)}, tmp_path / "adapter_model.safetensors")
    assert open_folder(tmp_path).specs.keys() == {"a"}
    save_file({"b": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"no model\.safetensors\.index\.json"):
        open_folder(tmp_path)


def test_a_folder_without_weights_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no weights"):
        open_folder(tmp_path)
