"""Q2_K: 2 bits in super-blocks of 256 weights with 16 four-bit scales and minima, 2.625 bpw.

``w = (d·scale)·q − (dmin·min), q in 0 … 3``; 84 bytes a block, drawn in ``kernels/blocks/q2_k.h``.
Each sub-block's scale and minimum are the best of 16 spacings in the magnitude of the error (37 in its weighted square with importance).
The search is llama.cpp's (ggml-quants.c), bit for bit.
"""

from __future__ import annotations

from quantcli.qtypes.shared.ggml import BlockType

QTYPE = BlockType("q2_k")
