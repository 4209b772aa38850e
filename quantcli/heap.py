"""Memory that C's allocator keeps: given back to the system after each layer."""

from __future__ import annotations

import ctypes
import sys


def trim() -> None:
    """Give the pages of freed tensors back to the system (glibc only; elsewhere the allocator is left to itself).

    glibc serves aligned blocks of up to 32 MiB from its heap and often cannot fit the next layer's weights into the gaps that the last
    one's left, so that without this a walk would hold more with every layer.
    """
    if sys.platform != "linux":
        return
    trim_heap = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim_heap is not None:
        trim_heap(0)
