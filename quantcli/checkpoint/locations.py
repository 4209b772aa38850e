"""Locations of tensors in files, and reading them: each tensor is memory-mapped on its own and unmapped when it is freed.

Any thread may read at any time, no file stays open, and only the pages of live tensors are in memory.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
import weakref
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from quantcli.errors import CheckpointError
from quantcli.output import disk
from quantcli.tensors import DTYPES, TensorSpec

MIN_MAPPED_BYTES = 1 << 16
MADV_POPULATE_READ = 22
"""From Linux's mman.h (since 5.14; older kernels refuse it, which is ignored); Python's mmap lacks it."""

TOO_SHORT = "the file ends before the tensor does; did it change?"


@dataclass(frozen=True, slots=True)
class Location:
    """A tensor in a file: ``offset`` counts from the start of the file."""

    path: Path
    spec: TensorSpec
    offset: int


def read_tensor(location: Location) -> Tensor:
    """The tensor at ``location``: mapped from its file for as long as it lives, copied when it is small or lies unaligned.

    It may be written to; the file never changes by that.
    """
    spec = location.spec
    dtype = DTYPES[spec.dtype]
    try:
        with open(location.path, "rb", buffering=0) as file:
            if os.fstat(file.fileno()).st_size < location.offset + spec.nbytes:
                raise CheckpointError(f"{location.path}: {spec.name}: {TOO_SHORT}")
            if spec.nbytes >= MIN_MAPPED_BYTES and location.offset % dtype.itemsize == 0:
                return torch.frombuffer(mapped(file.fileno(), location.offset, spec.nbytes), dtype=dtype).view(spec.shape)
            file.seek(location.offset)
            tensor = torch.empty(spec.shape, dtype=dtype)
            data = disk.read_exactly(file.fileno(), spec.nbytes) or b""
    except OSError as error:
        raise CheckpointError(f"{location.path}: {spec.name}: cannot be read: {error.strerror}") from error
    tensor.reshape(-1).view(torch.uint8).numpy()[:] = np.frombuffer(data, np.uint8)
    return tensor


def first_bytes(location: Location, n_bytes: int) -> bytes:
    """The first ``n_bytes`` of a tensor's data, or all of them; no more of the file is touched."""
    try:
        with open(location.path, "rb", buffering=0) as file:
            file.seek(location.offset)
            data = disk.read_exactly(file.fileno(), min(n_bytes, location.spec.nbytes))
    except OSError as error:
        raise CheckpointError(f"{location.path}: {location.spec.name}: cannot be read: {error.strerror}") from error
    if data is None:
        raise CheckpointError(f"{location.path}: {location.spec.name}: {TOO_SHORT}")
    return data


def mapped(fd: int, offset: int, n_bytes: int) -> ctypes.Array[ctypes.c_char]:
    """``n_bytes`` of a file at ``offset`` as memory of our own (private pages), unmapped when the last reference goes.

    Ten times as fast as reading when the file is cached, and the pages are the cache's own. Python's mmap would keep a descriptor open
    for each tensor, which a layer of a thousand experts cannot afford. Raises OSError.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    lead = offset % mmap.ALLOCATIONGRANULARITY
    address = libc.mmap(None, lead + n_bytes, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE, fd, offset - lead)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    array = (ctypes.c_char * n_bytes).from_address(address + lead)
    # Not at exit: a tensor that outlives the interpreter's clean-up would find its memory gone.
    weakref.finalize(array, libc.munmap, address, lead + n_bytes).atexit = False
    # A failing disk is an error here, rather than a signal in the middle of a computation.
    if (
        sys.platform == "linux"
        and libc.madvise(address, lead + n_bytes, MADV_POPULATE_READ)
        and ctypes.get_errno() in (errno.EFAULT, errno.EIO)
    ):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    return array
