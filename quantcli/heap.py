"""Process memory: returns freed pages to the system after each layer, and reports the peak use."""

from __future__ import annotations

import ctypes
import resource
import sys


def trim() -> None:
    """Give the pages of freed tensors back to the system (glibc only; elsewhere the allocator is left to itself).

    glibc serves aligned blocks of up to 32 MiB from its heap and often cannot fit the next layer's weights into the gaps that the last
    one's left, so that without this a walk's memory would grow with every layer.
    """
    if sys.platform != "linux":
        return
    trim_heap = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim_heap is not None:
        trim_heap(0)


def peak_bytes() -> int:
    """The most memory this process has held so far.

    On Linux from /proc: ``ru_maxrss`` starts at what the parent process held when it started this one.
    """
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        scale = 1 if sys.platform == "darwin" else 1 << 10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
