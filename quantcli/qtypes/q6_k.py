"""Q6_K: 6 bits in super-blocks of 256 weights with 16 eight-bit scales, 6.5625 bpw.

``w = (d·scale)·q, q in −32 … 31``; 210 bytes a block, drawn in ``kernels/blocks/q6_k.h``.
Each sub-block's scale is the best of 19 spacings in the weighted square error (weights x², or the importance).
The search is llama.cpp's (ggml-quants.c), bit for bit.
"""

from __future__ import annotations

from quantcli.qtypes.shared.ggml import BlockType

QTYPE = BlockType("q6_k")
