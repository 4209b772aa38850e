"""Disk primitives: space checks, locks, full reads and writes, flushing, atomic rename."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import sys
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path

from quantcli.errors import RecipeError, ResourceError
from quantcli.output import system

PIECE_BYTES = 8 << 20
"""What a checksum reads at once."""

SYNC_FILE_RANGE_WRITE = 2
"""From Linux's fs.h."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
DENIED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR)
FAILING = (errno.EIO, errno.EINVAL, errno.ENOTSUP, errno.EINTR, errno.EAGAIN, errno.EBUSY, errno.ESTALE, errno.ETIMEDOUT)
SHORT = (errno.ENOMEM, errno.EMFILE, errno.ENFILE)
"""What a disk refuses, by what a user does about it; every other number is a mistake of ours."""


def check_space(target: Path, n_bytes: int) -> None:
    """Raise :class:`ResourceError` unless ``n_bytes`` fit on the disk of ``target``."""
    folder = next(p for p in target.parents if p.exists())
    free = shutil.disk_usage(folder).free
    if n_bytes > free:
        raise ResourceError(
            f"{target}: needs {n_bytes / 2**20:.1f}MiB, {folder} has {free / 2**20:.1f}MiB free; free space there or choose another -o"
        )


def check_replaceable(target: Path, *, overwrite: bool, folder: bool) -> None:
    """Raise :class:`RecipeError` unless ``target`` is free, an empty folder, or an earlier output that ``overwrite`` may replace."""
    if not target.name:
        raise RecipeError(f"{target}: cannot be an output; name a new folder or file with -o")
    parent = next(p for p in target.parents if p.exists())
    if not parent.is_dir():
        raise RecipeError(f"{target}: {parent} is no folder; choose another -o")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise RecipeError(f"{target}: no permission to write in {parent}; choose another -o")
    if not target.exists():
        return
    if not target.is_dir() and not target.is_file():
        raise RecipeError(f"{target}: is a device or a pipe, which a finished file would replace; choose another -o")
    kinds = ("folder", "file") if target.is_dir() else ("file", "folder")
    if target.is_dir() != folder:
        raise RecipeError(f"{target}: is a {kinds[0]} and the output a {kinds[1]}; choose another -o")
    if folder and not any(target.iterdir()):
        return
    if not overwrite:
        raise RecipeError(f"{target}: already exists; give --overwrite to replace it, or another -o")
    if folder and not (target / "config.json").is_file():
        raise RecipeError(f"{target}: holds no model (no config.json), so --overwrite will not delete it; choose another -o")


@contextlib.contextmanager
def wording_errors(target: Path) -> Iterator[None]:
    """Turn errors of a write to ``target`` that a user can fix into :class:`ResourceError` or :class:`RecipeError`."""
    try:
        yield
    except OSError as error:
        words = error.strerror or str(error)
        if error.errno in FAILING:
            raise ResourceError(f"{target}: {words} while writing; the disk may be failing, choose another -o") from error
        if error.errno in FULL:
            raise ResourceError(f"{target}: {words} while writing; free space there or choose another -o") from error
        if error.errno in SHORT:
            raise ResourceError(f"{target}: {words} while writing; end other programs and run the same command again") from error
        if error.errno in DENIED:
            raise RecipeError(f"{target}: {words}; choose another -o") from error
        raise


@contextlib.contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    """The descriptor of ``path``, closed at the end."""
    fd = system.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


def read_file(path: Path) -> bytes:
    """All bytes of a small file."""
    with opened(path, os.O_RDONLY) as fd:
        return read_exactly(fd, os.fstat(fd).st_size) or b""


def write_file(path: Path, data: bytes, *, size: int | None = None, flush: bool = False) -> None:
    """Write a file of ``data``, followed by zeros up to ``size``."""
    with opened(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as fd:
        write_all(fd, memoryview(data))
        if size is not None:
            system.ftruncate(fd, size)
        if flush:
            system.fsync(fd)


def make_folders(path: Path) -> None:
    """Make the folder ``path`` and those above it, where they are missing."""
    for folder in reversed([path, *path.parents]):
        if not folder.exists():
            with contextlib.suppress(FileExistsError):  # another process was faster
                system.mkdir(folder)


def write_all(fd: int, data: memoryview) -> None:
    """Write all of ``data`` at the file's position: one call of the system may write less, and at most 2 GiB."""
    while data:
        data = data[system.write(fd, data[: 1 << 30]) :]


def write_at(fd: int, data: memoryview, offset: int) -> None:
    """Write all of ``data`` at ``offset``."""
    while data:
        n = system.pwrite(fd, data[: 1 << 30], offset)
        data, offset = data[n:], offset + n


def read_exactly(fd: int, n: int) -> bytes | None:
    """The next ``n`` bytes, or None when the file ends before."""
    data = b""
    while len(data) < n:
        piece = system.read(fd, n - len(data))
        if not piece:
            return None
        data += piece
    return data


def checksum(path: Path, offset: int, size: int) -> int | None:
    """crc32 of ``size`` bytes of a file, in pieces; None when it ends before."""
    crc = 0
    with opened(path, os.O_RDONLY) as fd:
        while size:
            piece = system.pread(fd, min(size, PIECE_BYTES), offset)
            if not piece:
                return None
            crc = zlib.crc32(piece, crc)
            offset += len(piece)
            size -= len(piece)
    return crc


def start_flushing(fd: int, offset: int, size: int) -> None:
    """Start writing bytes back to the disk at once, so that little is left for the end. Does nothing on systems other than Linux."""
    flush = getattr(ctypes.CDLL(None), "sync_file_range", None) if sys.platform == "linux" else None
    if flush is not None:
        flush(fd, ctypes.c_int64(offset), ctypes.c_int64(size), SYNC_FILE_RANGE_WRITE)


def fsync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk; some file systems refuse that for folders, which then need none."""
    with opened(path, os.O_RDONLY) as fd:
        try:
            system.fsync(fd)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
                raise


def lock(fd: int, part: Path) -> None:
    """Lock ``part`` for this process; :class:`RecipeError` when another one has. On a file system without locks nothing is checked."""
    try:
        system.flock(fd)
    except BlockingIOError:
        raise RecipeError(f"{part}: another process is writing it; wait for it or choose another -o") from None
    except OSError:
        return


def remove(path: Path, *, last: Collection[str] = ()) -> None:
    """Remove a file, or a folder with all that is in it, the names ``last`` at the end; of a link only itself."""
    if path.is_dir() and not path.is_symlink():
        for child in sorted(path.iterdir(), key=lambda child: (child.name in last, child.name)):
            remove(child)
        system.rmdir(path)
    elif os.path.lexists(path):
        system.unlink(path)


def inode(path: Path) -> tuple[int, int]:
    """(device, inode) of ``path``, which stay the same when it is renamed."""
    found = os.lstat(path)
    return found.st_dev, found.st_ino


def move_new(path: Path, target: Path) -> None:
    """Rename ``path`` to ``target``, where nothing stands, or an empty folder; :class:`RecipeError` when something else appeared there."""
    try:
        if not system.renameat2(path, target, system.RENAME_NOREPLACE):
            system.rename(path, target)  # a file system without the call: the caller looked a moment ago
    except FileExistsError:
        if target.is_dir() and not target.is_symlink() and not any(target.iterdir()):
            system.rename(path, target)
            return
        raise RecipeError(f"{target}: appeared while the output was made; move it away and run the same command again") from None


def replace(path: Path, target: Path, aside: Path) -> None:
    """Move ``path`` to ``target``, and what stood there to ``path`` or ``aside``.

    At every moment a whole output has the name, but on a file system that cannot exchange folders."""
    if system.renameat2(path, target, system.RENAME_EXCHANGE):
        return
    if not target.is_dir():
        system.rename(path, target)
        return
    system.rename(target, aside)
    try:
        system.rename(path, target)
    except BaseException:
        system.rename(aside, target)
        raise
