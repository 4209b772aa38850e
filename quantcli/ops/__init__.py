"""The ops: a torch reference for each, and the compiled kernel that replaces it.

Each op lives in one file of this package with its ``_reference`` twin; both give the same result, bit for bit, on every instruction set
(except :mod:`quantcli.ops.choice`, whose docstring states where they differ).
"""

from quantcli.ops.activations import round_cache, round_inputs
from quantcli.ops.affine import affine_errors, fit_affine
from quantcli.ops.bits import pack_bits, unpack_bits
from quantcli.ops.blocks import dequantize_blocks, fit_blocks, pack_blocks, quantize_blocks, unpack_blocks
from quantcli.ops.choice import choose_grid
from quantcli.ops.dispatch import active, available, set_threads, use
from quantcli.ops.float4 import dequantize_float4, float4_errors, quantize_float4
from quantcli.ops.minifloat import dequantize_fp4, dequantize_fp8, fit_fp4, quantize_fp4, quantize_fp8, tile_absmax
from quantcli.ops.solve import gptq_chunk

__all__ = [
    "active",
    "affine_errors",
    "available",
    "choose_grid",
    "dequantize_blocks",
    "dequantize_float4",
    "dequantize_fp4",
    "dequantize_fp8",
    "fit_affine",
    "fit_blocks",
    "fit_fp4",
    "float4_errors",
    "gptq_chunk",
    "pack_bits",
    "pack_blocks",
    "quantize_blocks",
    "quantize_float4",
    "quantize_fp4",
    "quantize_fp8",
    "round_cache",
    "round_inputs",
    "set_threads",
    "tile_absmax",
    "unpack_bits",
    "unpack_blocks",
    "use",
]
