"""Tensors read from where they lie: right bytes, no file held open, no memory but their own."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quantcli.checkpoint.locations import Location, first_bytes, read_tensor
from quantcli.checkpoint.shards import layout, open_folder, read_header
from quantcli.errors import CheckpointError
from quantcli.tensors import TensorSpec


@pytest.mark.parametrize("n", [3, 50_000])
@pytest.mark.parametrize("offset", [0, 1, 4, 4095, 4096, 70_001])
def test_a_tensor_at_any_place_is_read_aligned(tmp_path: Path, offset: int, n: int) -> None:
    values = torch.arange(float(n))
    (tmp_path / "file").write_bytes(b"\xff" * offset + values.numpy().tobytes() + b"\xff")
    tensor = read_tensor(Location(tmp_path / "file", TensorSpec.dense("a", "F32", (n,)), offset))
    assert torch.equal(tensor, values)
    assert tensor.data_ptr() % 4 == 0


@pytest.mark.parametrize("n", [100, 100_000])
def test_a_truncated_tensor_is_an_error_even_after_opening(tmp_path: Path, n: int) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(n)}, path)
    location = read_header(path)["a"]
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CheckpointError, match="a: the file ends before"):
        read_tensor(location)
    with pytest.raises(CheckpointError, match="a: the file ends before"):
        first_bytes(location, location.spec.nbytes)


def test_first_bytes_are_the_tensors_own_and_end_with_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(range(40)))
    location = Location(tmp_path / "file", TensorSpec.dense("a", "I32", (2, 3)), 5)
    assert first_bytes(location, 7) == bytes(range(5, 12))
    assert first_bytes(location, 1000) == bytes(range(5, 29))


def test_a_tensor_may_be_written_to_and_its_file_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"large": torch.ones(100, 1000), "small": torch.ones(3)}, path)
    before = path.read_bytes()
    for name, location in read_header(path).items():
        tensor = read_tensor(location)
        tensor.mul_(2)
        assert float(tensor.sum()) == 2 * tensor.numel(), name
        assert float(read_tensor(location).sum()) == tensor.numel()
    assert path.read_bytes() == before


def test_a_view_outlives_its_tensor_and_its_file(tmp_path: Path) -> None:
    save_file({"a": torch.arange(100_000.0).reshape(100, 1000)}, tmp_path / "model.safetensors")
    row = open_folder(tmp_path).read("a")[99]
    (tmp_path / "model.safetensors").unlink()
    gc.collect()
    assert row[-1] == 99_999


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts descriptors in Linux's /proc")
def test_living_tensors_hold_no_file_open(tmp_path: Path) -> None:
    save_file({f"t{i}": torch.full((32, 1024), float(i)) for i in range(50)}, tmp_path / "model.safetensors")
    shards = open_folder(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    living = [shards.read(name) for name in shards.specs]
    assert len(os.listdir("/proc/self/fd")) == before
    assert sum(float(tensor[0, 0]) for tensor in living) == sum(range(50))


MEASURE = """
import sys
from pathlib import Path
from quantcli import heap
from quantcli.checkpoint.shards import open_folder
shards = open_folder(Path(sys.argv[1]))
def walk():
    return sum(float(shards.read(name)[0, 0]) for name in shards.specs)
shards.read(next(iter(shards.specs)))
before = heap.peak_bytes()
total = walk()
print(total, heap.peak_bytes() - before)
"""


def test_walking_through_200_mb_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    (planned,), _ = layout([TensorSpec.dense(f"t{i}", "F32", (1024, 1280)) for i in range(40)])
    with open(tmp_path / planned.name, "wb") as file:
        file.write(planned.header)
        file.truncate(planned.size)  # a sparse file: 200 MB to a reader, none on the disk
    run = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True)
    total, grown_bytes = run.stdout.split()
    assert float(total) == 0
    assert int(grown_bytes) < (5 + 8) << 20
