"""Q3_K: 3 bits in super-blocks of 256 weights with 16 six-bit scales, 3.4375 bpw.

``w = (d·scale)·q, q in −4 … 3``; 110 bytes a block, drawn in ``kernels/blocks/q3_k.h``.
Each sub-block's scale is found by coordinate descent on its codes; with importance it is the best of 19 spacings in the weighted square
error.
The search is llama.cpp's (ggml-quants.c), bit for bit.
"""

from __future__ import annotations

from quantcli.qtypes.shared.ggml import BlockType

QTYPE = BlockType("q3_k")
