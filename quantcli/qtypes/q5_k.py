"""Q5_K: 5 bits in super-blocks of 256 weights with 8 six-bit scales and minima, 5.5 bpw.

``w = (d·scale)·q − (dmin·min), q in 0 … 31``; 176 bytes a block, drawn in ``kernels/blocks/q5_k.h``.
Each sub-block's scale and minimum are the best of 16 spacings (37 with importance), fitted by weighted least squares.
The search is llama.cpp's (ggml-quants.c), bit for bit.
"""

from __future__ import annotations

from quantcli.qtypes.shared.ggml import BlockType

QTYPE = BlockType("q5_k")
