"""A run that was stopped: the next one of the same identity goes on with its steps, and with nothing that is not its own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from quantcli.errors import CheckpointError, NumericsError, RecipeError, ResourceError
from quantcli.output.journal import Journal, Run, Step
from quantcli.output.layouts import FileLayout, Slot
from quantcli.output.writer import Writer
from quantcli.tensors import TensorSpec

RUN = Run({"weights": "w", "recipe": {"bits": 4, "name": "gptq"}})


class Stopped(BaseException):
    """As a signal stops a run: no error of quantcli's."""


def files(n: int = 1) -> list[FileLayout]:
    """``n`` files, "m" first, of two tensors each."""
    return [
        FileLayout(
            f"m{i or ''}", b"HEAD", 28, {f"{i}{t}": Slot(TensorSpec.dense(f"{i}{t}", "F32", (3,)), 4 + 12 * k) for k, t in enumerate("ab")}
        )
        for i in range(n)
    ]


def stopped(target: Path, *, folder: bool = True, n_files: int = 1, error: type[BaseException] = Stopped, run: Run = RUN) -> None:
    """A run that is stopped behind its first step, in the middle of the second."""
    with pytest.raises(error), Writer(target, folder=folder, run=run) as out:  # noqa: PT012 (the writer must see it pass)
        out.declare(files(n_files), {"config.json": b"{}"} if folder else {})
        out.put("0a", torch.ones(3))
        out.finish_step("one", {"error": 0.25})
        out.put("0b", torch.zeros(3))
        raise error


@pytest.mark.parametrize(("folder", "n_files"), [(True, 1), (True, 2), (False, 1), (False, 2)])
def test_the_next_run_goes_on_behind_the_finished_steps(tmp_path: Path, folder: bool, n_files: int) -> None:
    target = tmp_path / "m"
    stopped(target, folder=folder, n_files=n_files)
    assert [path.name for path in tmp_path.iterdir()] == ["m.part"]
    with Writer(target, folder=folder, run=RUN) as out:
        out.declare(files(n_files), {"config.json": b"{}"} if folder else {})
        assert [(step.name, step.told) for step in out.steps] == [("one", {"error": 0.25})]
        assert [out.has(name) for name in ("0a", "0b")] == [True, False]
        with pytest.raises(ValueError, match="0a: put twice"):
            out.put("0a", torch.ones(3))
        for name in ["0b", *(f"1{t}" for t in "ab" if n_files == 2)]:
            out.put(name, torch.full((3,), 2.0))
        out.commit()
    written = target / "m" if folder else target
    assert written.read_bytes() == b"HEAD" + torch.tensor([1.0, 1, 1, 2, 2, 2]).numpy().tobytes()
    assert not (tmp_path / "m.part").exists()


def test_what_another_run_left_is_kept_and_the_difference_named(tmp_path: Path) -> None:
    stopped(tmp_path / "m")
    other = Run({"weights": "w", "recipe": {"bits": 3, "name": "gptq"}})
    with pytest.raises(RecipeError, match=r"differs in recipe bits \(4 → 3\); repeat that command .* or give --fresh"):
        Writer(tmp_path / "m", run=other).declare(files())
    with pytest.raises(RecipeError, match="differs in files"):
        Writer(tmp_path / "m", run=RUN).declare([FileLayout("m", b"OTHER", 29, {})])
    with Writer(tmp_path / "m", run=RUN) as out:
        out.declare(files())
        assert len(out.steps) == 1


def test_fresh_drops_what_another_run_left(tmp_path: Path) -> None:
    stopped(tmp_path / "m")
    with Writer(tmp_path / "m", run=Run({"weights": "other"}, fresh=True)) as out:
        out.declare(files())
        assert out.steps == ()


@pytest.mark.parametrize("damage", ["bytes", "file gone", "file cut"])
def test_a_step_whose_bytes_changed_is_done_again(tmp_path: Path, damage: str) -> None:
    stopped(tmp_path / "m")
    path = tmp_path / "m.part/output/m"
    if damage == "bytes":
        path.write_bytes(path.read_bytes()[:5] + b"\xff" + path.read_bytes()[6:])
    elif damage == "file gone":
        path.unlink()
    else:
        os.truncate(path, 10)
    with Writer(tmp_path / "m", run=RUN) as out:
        out.declare(files())
        assert out.steps == ()
        out.put("0a", torch.ones(3))
        out.put("0b", torch.ones(3))
        out.commit()


@pytest.mark.parametrize("error", [ResourceError, CheckpointError, OSError, KeyboardInterrupt, GeneratorExit])
def test_work_is_kept_where_the_same_command_may_end_well(tmp_path: Path, error: type[BaseException]) -> None:
    stopped(tmp_path / "m", error=error)
    assert (tmp_path / "m.part").is_dir()


@pytest.mark.parametrize("error", [RecipeError, NumericsError])
def test_work_goes_where_the_same_command_would_fail_again(tmp_path: Path, error: type[BaseException]) -> None:
    stopped(tmp_path / "m", error=error)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["folder", "file", "link", "pipe"])
def test_what_is_no_work_folder_is_never_touched(tmp_path: Path, kind: str) -> None:
    part = tmp_path / "m.part"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    if kind == "folder":
        (tmp_path / "mine").rename(part)
    elif kind == "file":
        part.write_text("years of work")
    elif kind == "link":
        part.symlink_to(tmp_path / "mine")
    else:
        os.mkfifo(part)
    before = sorted(tmp_path.rglob("*"))
    for run in (None, RUN, Run({}, fresh=True)):
        with pytest.raises(RecipeError, match=r"m\.part: is in the way, and no work folder of quantcli"):
            Writer(tmp_path / "m", run=run).declare(files())
    assert sorted(tmp_path.rglob("*")) == before


def test_a_name_that_is_taken_while_the_run_goes_is_left_and_the_work_kept(tmp_path: Path) -> None:
    with pytest.raises(RecipeError), Writer(tmp_path / "m", run=RUN) as out:  # noqa: PT012 (the writer must see it pass)
        out.declare(files(), {"config.json": b"{}"})
        out.put("0a", torch.ones(3))
        out.put("0b", torch.ones(3))
        out.finish_step("all", {})
        (tmp_path / "m").mkdir()
        (tmp_path / "m/thesis.txt").write_text("years of work")
        out.commit()
    assert (tmp_path / "m/thesis.txt").read_text() == "years of work"
    (tmp_path / "m").rename(tmp_path / "mine")
    with Writer(tmp_path / "m", run=RUN) as out:
        out.declare(files(), {"config.json": b"{}"})
        out.commit()
    assert (tmp_path / "m/m").exists()


def test_a_line_that_a_crash_cut_short_counts_as_not_written(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path, {"weights": "w"})
    for name in ("one", "two"):
        journal.append(Step(name, {name: 7}))
    whole = (tmp_path / "journal.jsonl").read_bytes()
    starts = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for n in range(len(whole)):
        (tmp_path / "journal.jsonl").write_bytes(whole[:n])
        read = Journal.read(tmp_path)
        assert read is not None
        assert [step.name for step in read.steps] == ["one", "two"][: max(0, sum(start <= n for start in starts) - 1)]
    (tmp_path / "journal.jsonl").write_bytes(whole.replace(b"two", b"six"))
    read = Journal.read(tmp_path)
    assert read is not None
    assert [step.name for step in read.steps] == ["one"]
