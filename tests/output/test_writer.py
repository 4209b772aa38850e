"""The writer: right bytes under the final name, or nothing there."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import threading
from collections import namedtuple
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from quantcli.errors import CheckpointError, RecipeError, ResourceError
from quantcli.output import disk, system
from quantcli.output import writer as module
from quantcli.output.layouts import FileLayout, Slot
from quantcli.output.work_folder import WorkFolder
from quantcli.output.writer import Writer
from quantcli.tensors import TensorSpec

HEADER = b"HEAD"


def a_layout(name: str = "x.bin", tensors: Sequence[str] = ("a", "b"), gap: int = 4) -> FileLayout:
    """A file of F32 [3] tensors with ``gap`` bytes of padding before each."""
    slots = {t: Slot(TensorSpec.dense(t, "F32", (3,)), len(HEADER) + gap + i * (12 + gap)) for i, t in enumerate(tensors)}
    return FileLayout(name, HEADER, len(HEADER) + len(tensors) * (12 + gap), slots)


def value(k: float) -> torch.Tensor:
    return torch.full((3,), float(k))


def write(target: Path, *, k: float = 1, overwrite: bool = False) -> None:
    """A finished folder whose tensors hold ``k``."""
    with Writer(target, overwrite=overwrite) as out:
        out.declare([a_layout()], {"config.json": b"{}"})
        out.put("a", value(k))
        out.put("b", value(k + 1))
        out.commit()


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_folder_gets_its_name_only_at_commit(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with Writer(target) as out:
        out.declare([a_layout("x.bin", "ab"), a_layout("y.bin", "c")], {"config.json": b"{}", "extra/t.jinja": b"hi"})
        for name in "cba":
            out.put(name, value(ord(name)))
            assert not target.exists()
        out.add_sidecar("quantcli.json", b"[1]")
        out.commit()
    zero, bits = bytes(4), lambda name: value(ord(name)).numpy().tobytes()
    assert (target / "x.bin").read_bytes() == HEADER + zero + bits("a") + zero + bits("b")
    assert (target / "y.bin").read_bytes() == HEADER + zero + bits("c")
    assert (target / "quantcli.json").read_bytes() == b"[1]"
    assert (target / "extra" / "t.jinja").read_bytes() == b"hi"
    assert leftovers(target.parent) == ["out"]


def test_a_single_file_gets_its_name_only_at_commit(tmp_path: Path) -> None:
    target = tmp_path / "m.gguf"
    with Writer(target, folder=False) as out:
        out.declare([a_layout("m.gguf", "a", gap=28)])
        out.put("a", value(2))
        assert leftovers(tmp_path) == ["m.gguf.part"]
        out.commit()
    assert target.read_bytes() == HEADER + bytes(28) + value(2).numpy().tobytes()
    assert leftovers(tmp_path) == ["m.gguf"]


def test_ggml_types_take_their_bytes(tmp_path: Path) -> None:
    spec = TensorSpec("q", "Q4_K", (2, 256), 288)
    with Writer(tmp_path / "m.gguf", folder=False) as out:
        out.declare([FileLayout("m.gguf", HEADER, 4 + 288, {"q": Slot(spec, 4)})])
        with pytest.raises(ValueError, match="q: Q4_K needs 288 bytes of uint8"):
            out.put("q", torch.zeros(2, 143, dtype=torch.uint8))
        out.put("q", torch.full((2, 144), 7, dtype=torch.uint8))
        out.commit()
    assert (tmp_path / "m.gguf").read_bytes() == HEADER + b"\x07" * 288


@pytest.mark.parametrize("view", ["transposed", "strided", "scalar", "empty"])
def test_any_view_of_memory_is_written_in_row_order(tmp_path: Path, view: str) -> None:
    cube = torch.arange(24, dtype=torch.int16).reshape(4, 6)
    tensor = {"transposed": cube.T, "strided": cube[::2, 1::2], "scalar": cube[3, 5], "empty": cube[:0]}[view]
    spec = TensorSpec.dense("t", "I16", tuple(tensor.shape))
    with Writer(tmp_path / "m", folder=False) as out:
        out.declare([FileLayout("m", HEADER, 4 + spec.nbytes, {"t": Slot(spec, 4)})])
        out.put("t", tensor)
        out.commit()
    assert (tmp_path / "m").read_bytes() == HEADER + tensor.numpy().tobytes()


def test_threads_may_put_at_once_and_only_one_wins_a_name(tmp_path: Path) -> None:
    names = [f"t{i}" for i in range(200)]
    barrier, refused = threading.Barrier(8), []
    with Writer(tmp_path / "out") as out, ThreadPoolExecutor(8) as pool:
        out.declare([a_layout("x.bin", names)])

        def race(k: int) -> None:
            barrier.wait()
            try:
                out.put("t0", value(k))
            except ValueError:
                refused.append(k)

        list(pool.map(race, range(8)))
        list(pool.map(lambda i: out.put(f"t{i}", value(i)), range(1, 200)))
        out.commit()
    assert len(refused) == 7
    data = (tmp_path / "out" / "x.bin").read_bytes()
    assert all(data[8 + 16 * i : 20 + 16 * i] == value(i).numpy().tobytes() for i in range(1, 200))


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (value(1).double(), "a: expected F32 .*got F64"),
        (value(1).view(torch.int32), "a: expected F32 .*got I32"),
        (torch.zeros(4), r"a: expected F32 \[3\], got F32 \[4\]"),
        (torch.zeros(1, 3), r"got F32 \[1, 3\]"),
    ],
)
def test_a_tensor_unlike_its_spec_is_refused_by_name(tmp_path: Path, tensor: torch.Tensor, message: str) -> None:
    with Writer(tmp_path / "out") as out:
        out.declare([a_layout()])
        with pytest.raises(ValueError, match=message):
            out.put("a", tensor)
        out.put("a", value(1))  # the refusal claimed nothing


def test_every_other_order_is_an_error(tmp_path: Path) -> None:
    out = Writer(tmp_path / "out")
    for early in (lambda: out.put("a", value(1)), out.commit, lambda: out.add_sidecar("s", b"")):
        with pytest.raises(ValueError):
            early()
    out.declare([a_layout()])
    with pytest.raises(ValueError, match="once"):
        out.declare([a_layout()])
    with pytest.raises(ValueError, match="z: not declared"):
        out.put("z", value(1))
    out.put("a", value(1))
    with pytest.raises(ValueError, match="a: put twice"):
        out.put("a", value(1))
    with pytest.raises(ValueError, match="1 tensors were declared and never put, the first is b"):
        out.commit()
    out.put("b", value(1))
    out.commit()
    for late in (lambda: out.put("a", value(1)), out.commit, lambda: out.add_sidecar("s", b"")):
        with pytest.raises(ValueError):
            late()


@pytest.mark.parametrize("bad", ["overlap", "beyond", "into the header", "twice", "same file", "outside"])
def test_layouts_that_contradict_themselves_are_refused_before_writing(tmp_path: Path, bad: str) -> None:
    spec = TensorSpec.dense("a", "F32", (3,))
    one = FileLayout("x", HEADER, 16, {"a": Slot(spec, 4)})
    files = {
        "overlap": [FileLayout("x", HEADER, 40, {"a": Slot(spec, 4), "b": Slot(TensorSpec.dense("b", "F32", (3,)), 12)})],
        "beyond": [FileLayout("x", HEADER, 15, {"a": Slot(spec, 4)})],
        "into the header": [FileLayout("x", HEADER, 15, {"a": Slot(spec, 3)})],
        "twice": [one, FileLayout("y", HEADER, 16, {"a": Slot(spec, 4)})],
        "same file": [one, FileLayout("x", HEADER, 16, {"b": Slot(TensorSpec.dense("b", "F32", (3,)), 4)})],
        "outside": [FileLayout("../x", HEADER, 16, {"a": Slot(spec, 4)})],
    }[bad]
    with pytest.raises(ValueError), Writer(tmp_path / "out") as out:
        out.declare(files)
    assert leftovers(tmp_path) == []


def test_a_finished_output_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    write(tmp_path / "out")
    with pytest.raises(RecipeError, match="already exists; give --overwrite"):
        Writer(tmp_path / "out")
    assert leftovers(tmp_path) == ["out"]


@pytest.mark.parametrize("folder", [True, False])
def test_overwriting_keeps_the_old_output_until_commit(tmp_path: Path, folder: bool) -> None:
    target = tmp_path / "out"
    if folder:
        write(target)
        (target / "stale.txt").write_text("of the old output")
    else:
        target.write_bytes(b"old")
    with Writer(target, overwrite=True, folder=folder) as out:
        out.declare([a_layout("out", "a")], {"config.json": b"{}"} if folder else {})
        out.put("a", value(9))
        assert (target / "stale.txt").exists() if folder else target.read_bytes() == b"old"
        out.commit()
    assert leftovers(tmp_path) == ["out"]
    data = (target / "out" if folder else target).read_bytes()
    assert data.endswith(value(9).numpy().tobytes())
    assert not (target / "stale.txt").exists()


def test_an_empty_folder_is_no_output(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write(tmp_path / "out")
    assert leftovers(tmp_path / "out") == ["config.json", "x.bin"]


@pytest.mark.parametrize(("there", "folder"), [("file", True), ("model", False), ("photos", True)])
def test_overwrite_never_destroys_what_is_no_such_output(tmp_path: Path, there: str, folder: bool) -> None:
    target = tmp_path / "out"
    if there == "file":
        target.write_bytes(b"precious")
    else:
        target.mkdir()
        (target / ("config.json" if there == "model" else "photo.jpg")).write_bytes(b"precious")
    with pytest.raises(RecipeError, match="choose another -o"):
        Writer(target, overwrite=True, folder=folder)
    assert any(p.read_bytes() == b"precious" for p in [target, *target.glob("*")] if p.is_file())


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, GeneratorExit])
@pytest.mark.parametrize("folder", [True, False])
def test_an_interruption_leaves_nothing_behind(tmp_path: Path, error: type[BaseException], folder: bool) -> None:
    with pytest.raises(error), Writer(tmp_path / "out", folder=folder) as out:  # noqa: PT012 (the writer must see it pass)
        out.declare([a_layout()])
        out.put("a", value(1))
        raise error
    assert leftovers(tmp_path) == []


def test_leaving_without_commit_leaves_nothing_behind(tmp_path: Path) -> None:
    with Writer(tmp_path / "out") as out:
        out.declare([a_layout()])
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("step", ["fsync", "checksum", "rename"])
def test_an_interrupted_commit_leaves_the_old_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    target = tmp_path / "out"
    write(target, k=5)
    old = (target / "x.bin").read_bytes()

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(system if step == "rename" else disk, {"rename": "renameat2"}.get(step, step), interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(target, k=6, overwrite=True)
    assert (target / "x.bin").read_bytes() == old
    assert leftovers(tmp_path) == ["out"]


def die(*args: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_writing(target: Path, moment: str) -> None:
    """In a child process: write to ``target`` and be killed at ``moment``."""
    if moment == "putting":
        module.zlib = SimpleNamespace(crc32=die)
    elif moment == "between renames":
        real = system.rename
        system.renameat2 = lambda *args: False  # as on a file system that cannot exchange
        system.rename = lambda source, to: die() if Path(source).name == "output" else real(source, to)
    else:
        WorkFolder._remove = lambda self: die()
    write(target, k=6, overwrite=True)


@pytest.mark.parametrize("moment", ["putting", "between renames", "after renames"])
def test_a_killed_process_costs_nothing_and_its_leftovers_go_with_the_next_run(tmp_path: Path, moment: str) -> None:
    target = tmp_path / "out"
    write(target, k=5)
    child = multiprocessing.get_context("fork").Process(target=die_writing, args=(target, moment))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert leftovers(tmp_path) != ["out"]
    with pytest.raises(RecipeError, match="already exists"):
        Writer(target)
    kept = 6 if moment == "after renames" else 5
    assert (target / "x.bin").read_bytes()[8:20] == value(kept).numpy().tobytes()
    write(target, k=7, overwrite=True)
    assert (target / "x.bin").read_bytes()[8:20] == value(7).numpy().tobytes()
    assert leftovers(tmp_path) == ["out"]


def test_two_writers_of_one_target_do_not_destroy_each_other(tmp_path: Path) -> None:
    with Writer(tmp_path / "out") as first:
        first.declare([a_layout()])
        with pytest.raises(RecipeError, match="another process is writing"), Writer(tmp_path / "out") as second:
            second.declare([a_layout()])
        first.put("a", value(1))
        first.put("b", value(1))
        first.commit()
    assert leftovers(tmp_path) == ["out"]


def test_a_full_disk_is_known_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: usage(100, 65, 35))
    with pytest.raises(ResourceError, match="free space there or choose another -o"), Writer(tmp_path / "out") as out:
        out.declare([a_layout()])  # 36 bytes
    assert leftovers(tmp_path) == []


def test_a_disk_that_fills_up_while_writing_is_a_resource_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: memoryview, offset: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ResourceError, match="No space left"), Writer(tmp_path / "out") as out:  # noqa: PT012 (the writer must see it pass)
        out.declare([a_layout()])
        monkeypatch.setattr(system, "pwrite", full)
        out.put("a", value(1))
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(("file", "at"), [("x.bin", 9), ("x.bin", 1), ("config.json", 0)])
def test_bytes_that_changed_on_the_disk_are_found_at_commit(tmp_path: Path, file: str, at: int) -> None:
    with pytest.raises(CheckpointError, match=f"{file}: .*the disk may be failing"), Writer(tmp_path / "out") as out:  # noqa: PT012 (the writer must see it pass)
        out.declare([a_layout()], {"config.json": b"{}"})
        out.put("a", value(1))
        out.put("b", value(1))
        with (tmp_path / "out.part" / "output" / file).open("r+b") as damaged:
            damaged.seek(at)
            damaged.write(b"\xff")
        out.commit()
    assert leftovers(tmp_path) == []


def test_a_truncated_file_is_found_at_commit(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError), Writer(tmp_path / "out") as out:  # noqa: PT012 (the writer must see it pass)
        out.declare([a_layout()])
        out.put("a", value(1))
        out.put("b", value(1))
        os.truncate(tmp_path / "out.part" / "output" / "x.bin", 20)
        out.commit()


def test_a_link_is_followed_so_that_the_rename_stays_on_its_disk(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "far" / "real")
    write(tmp_path / "out")
    assert leftovers(tmp_path / "far") == ["real"]
    assert (tmp_path / "out").is_symlink()


def beside(n: int = 3) -> list[FileLayout]:
    return [a_layout(f"m-{i}", [f"{i}a", f"{i}b"]) for i in range(n)]


def put_all(out: Writer, files: list[FileLayout]) -> None:
    for layout in files:
        for name in layout.slots:
            out.put(name, value(7))


def test_several_files_come_to_stand_beside_each_other(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("kept")
    with Writer(tmp_path / "m-0", folder=False) as out:
        out.declare(beside())
        assert out.files == tuple(tmp_path / f"m-{i}" for i in range(3))
        put_all(out, beside())
        assert not (tmp_path / "m-1").exists()
        out.commit()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m-0", "m-1", "m-2", "mine.txt"]
    assert (tmp_path / "m-2").read_bytes() == (tmp_path / "m-0").read_bytes()


def test_any_of_several_files_that_stands_is_replaced_only_when_asked(tmp_path: Path) -> None:
    (tmp_path / "m-2").write_bytes(b"old")
    with Writer(tmp_path / "m-0", folder=False) as out, pytest.raises(RecipeError, match="m-2: already exists"):
        out.declare(beside())
    with Writer(tmp_path / "m-0", folder=False, overwrite=True) as out:
        out.declare(beside())
        put_all(out, beside())
        assert (tmp_path / "m-2").read_bytes() == b"old"
        out.commit()
    assert (tmp_path / "m-2").read_bytes() != b"old"


@pytest.mark.parametrize("n_moves", range(4))
def test_a_set_that_cannot_be_moved_whole_leaves_the_old_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_moves: int) -> None:
    for i in range(3):
        (tmp_path / f"m-{i}").write_bytes(b"old")
    left = [n_moves]
    rename, exchange = system.rename, system.renameat2

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def moved(source: Path, target: Path, *flags: int) -> Any:
            if tmp_path / "m.part" not in (source, target):
                left[0] -= 1
                if left[0] == -1:
                    raise KeyboardInterrupt
            assert left[0] < 0 or not ((tmp_path / "m-0").exists() and (tmp_path / "m-1").read_bytes() != b"old")
            return call(source, target, *flags)

        return moved

    with Writer(tmp_path / "m-0", folder=False, overwrite=True) as out:
        out.declare(beside())
        put_all(out, beside())
        monkeypatch.setattr(system, "rename", counted(rename))
        monkeypatch.setattr(system, "renameat2", counted(exchange))
        with pytest.raises(KeyboardInterrupt):
            out.commit()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {f"m-{i}": b"old" for i in range(3)}


def test_the_first_of_several_files_has_the_targets_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="first of several"), Writer(tmp_path / "other", folder=False) as out:
        out.declare(beside())


def test_a_check_sees_the_finished_output_before_it_has_its_name_and_leaves_nothing_when_it_fails(tmp_path: Path) -> None:
    def refuse(path: Path) -> None:
        assert not (tmp_path / "out").exists()
        assert path.is_dir() or path.read_bytes().startswith(HEADER)
        raise CheckpointError("refused")

    for folder in (True, False):
        with Writer(tmp_path / "out", folder=folder) as out:
            out.declare([a_layout("out")])
            out.put("a", value(1))
            out.put("b", value(2))
            with pytest.raises(CheckpointError, match="refused"):
                out.commit(refuse)
        assert leftovers(tmp_path) == []
