"""Every call of the system that brings an output to the disk, and nothing else: the one place where tests let each of them fail."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import sys
from pathlib import Path

RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2
AT_FDCWD = -100
"""From Linux's fs.h and fcntl.h."""


def open(path: Path, flags: int) -> int:
    """A file's or folder's descriptor, which the caller closes."""
    return os.open(path, flags | os.O_CLOEXEC, 0o666)


def read(fd: int, n: int) -> bytes:
    return os.read(fd, n)


def pread(fd: int, n: int, offset: int) -> bytes:
    return os.pread(fd, n, offset)


def write(fd: int, data: memoryview) -> int:
    return os.write(fd, data)


def pwrite(fd: int, data: memoryview, offset: int) -> int:
    return os.pwrite(fd, data, offset)


def ftruncate(fd: int, size: int) -> None:
    os.ftruncate(fd, size)


def fsync(fd: int) -> None:
    os.fsync(fd)


def flock(fd: int) -> None:
    """Lock for this process alone, or fail at once."""
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def mkdir(path: Path) -> None:
    path.mkdir()


def rename(old: Path, new: Path) -> None:
    os.rename(old, new)


def renameat2(old: Path, new: Path, flags: int) -> bool:
    """Linux' call of that name; False where the system or the file system does not have it. Raises OSError as :func:`rename` does."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if call is None:
        return False
    if call(AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), ctypes.c_uint(flags)) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(new))


def unlink(path: Path) -> None:
    path.unlink()


def rmdir(path: Path) -> None:
    path.rmdir()
