"""The op table: a torch reference each, and the compiled kernel that replaces it.

Each op lives in one file of this package with its ``_reference`` twin; both give the same result, bit for bit, on every instruction set.
"""

from quantcli.ops.blocks import dequantize_blocks, fit_blocks, pack_blocks, quantize_blocks, unpack_blocks
from quantcli.ops.dispatch import active, available, set_threads, use

__all__ = [
    "active",
    "available",
    "dequantize_blocks",
    "fit_blocks",
    "pack_blocks",
    "quantize_blocks",
    "set_threads",
    "unpack_blocks",
    "use",
]
