"""The disk's part: all bytes or none, one process at a time, and no moment at which a finished output is lost."""

from __future__ import annotations

import errno
import os
import zlib
from pathlib import Path

import pytest

from quantcli.errors import QuantcliError, RecipeError, ResourceError
from quantcli.output import disk, system


def a_folder(path: Path, text: str) -> Path:
    path.mkdir()
    (path / "x").write_text(text)
    return path


def test_a_system_that_takes_and_gives_a_few_bytes_at_once_loses_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, pwrite, read, pread = os.write, os.pwrite, os.read, os.pread
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:7]))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:7], at))
    monkeypatch.setattr(os, "read", lambda fd, n: read(fd, min(n, 5)))
    monkeypatch.setattr(os, "pread", lambda fd, n, at: pread(fd, min(n, 5), at))
    data = os.urandom(100)
    with (tmp_path / "x").open("wb", buffering=0) as file:
        disk.write_all(file.fileno(), memoryview(data[:40]))
        disk.write_at(file.fileno(), memoryview(data[40:]), 40)
    with (tmp_path / "x").open("rb", buffering=0) as file:
        assert disk.read_exactly(file.fileno(), 60) == data[:60]
    assert disk.checksum(tmp_path / "x", 60, 40) == zlib.crc32(data[60:])


def test_a_file_that_ends_too_soon_is_none_and_no_shorter_answer(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"four")
    with (tmp_path / "x").open("rb", buffering=0) as file:
        assert disk.read_exactly(file.fileno(), 5) is None
    assert disk.checksum(tmp_path / "x", 0, 5) is None
    assert disk.checksum(tmp_path / "x", 3, 2) is None


def test_a_lock_keeps_another_holder_out_until_it_is_let_go(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    one, two = (os.open(tmp_path / "x", os.O_RDONLY) for _ in range(2))
    disk.lock(one, tmp_path / "x")
    with pytest.raises(RecipeError, match="another process is writing it"):
        disk.lock(two, tmp_path / "x")
    os.close(one)
    disk.lock(two, tmp_path / "x")
    os.close(two)


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_failing_exchange_leaves_the_old_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool) -> None:
    part, target, aside = a_folder(tmp_path / "part", "new"), a_folder(tmp_path / "out", "old"), tmp_path / "aside"
    real = os.rename

    def rename(source: Path, to: Path) -> None:
        if source == part:
            raise OSError(errno.EIO, "failing")
        real(source, to)

    def renameat2(*args: object) -> bool:
        if can_exchange:
            raise OSError(errno.EIO, "failing")
        return False

    monkeypatch.setattr(system, "rename", rename)
    monkeypatch.setattr(system, "renameat2", renameat2)
    with pytest.raises(OSError, match="failing"):
        disk.replace(part, target, aside)
    assert (target / "x").read_text() == "old"
    assert not aside.exists()


@pytest.mark.parametrize("can_exchange", [True, False])
def test_an_output_takes_the_place_of_an_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool) -> None:
    if not can_exchange:
        monkeypatch.setattr(system, "renameat2", lambda *args: False)
    part, target, aside = a_folder(tmp_path / "part", "new"), a_folder(tmp_path / "out", "old"), tmp_path / "aside"
    disk.replace(part, target, aside)
    assert (target / "x").read_text() == "new"
    assert ((part if can_exchange else aside) / "x").read_text() == "old"
    (tmp_path / "new.gguf").write_text("new")
    (tmp_path / "m.gguf").write_text("old")
    disk.replace(tmp_path / "new.gguf", tmp_path / "m.gguf", aside)
    assert (tmp_path / "m.gguf").read_text() == "new"


def test_what_appeared_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    part, target = a_folder(tmp_path / "part", "new"), a_folder(tmp_path / "out", "somebody's")
    with pytest.raises(RecipeError, match="appeared while the output was made; move it away and run the same command again"):
        disk.move_new(part, target)
    assert (target / "x").read_text() == "somebody's"
    (target / "x").unlink()
    disk.move_new(part, target)
    assert (target / "x").read_text() == "new"


def test_removing_a_link_leaves_what_it_points_to(tmp_path: Path) -> None:
    a_folder(tmp_path / "real", "precious")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    disk.remove(tmp_path / "link")
    assert (tmp_path / "real" / "x").read_text() == "precious"
    assert not os.path.lexists(tmp_path / "link")


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (errno.ENOSPC, ResourceError),
        (errno.EDQUOT, ResourceError),
        (errno.EFBIG, ResourceError),
        (errno.EIO, ResourceError),
        (errno.EINVAL, ResourceError),
        (errno.EINTR, ResourceError),
        (errno.ENOMEM, ResourceError),
        (errno.EROFS, RecipeError),
        (errno.EACCES, RecipeError),
        (errno.ENAMETOOLONG, RecipeError),
    ],
)
def test_what_a_user_can_mend_is_said_with_a_way_out(code: int, error: type[QuantcliError]) -> None:
    with pytest.raises(error, match=r"/out: .* (choose another -o|run the same command again)"), disk.wording_errors(Path("/out")):
        raise OSError(code, os.strerror(code))


def test_any_other_failure_stays_what_it_is() -> None:
    with pytest.raises(OSError, match="Bad file descriptor"), disk.wording_errors(Path("/out")):
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
