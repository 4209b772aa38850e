"""Q4_K: 4 bits in super-blocks of 256 weights with 8 six-bit scales and minima, 4.5 bpw.

``w = (d·scale)·q − (dmin·min), q in 0 … 15``; 144 bytes a block, drawn in ``kernels/blocks/q4_k.h``.
Each sub-block's scale and minimum are the best of 21 spacings (37 with importance), fitted by weighted least squares.
The search is llama.cpp's (ggml-quants.c), bit for bit.
"""

from __future__ import annotations

from quantcli.qtypes.shared.ggml import BlockType

QTYPE = BlockType("q4_k")
