"""Q4_1: 4 bits in blocks of 32 weights with an offset, 5 bpw.

``w = d·q + m, q in 0 … 15``; 20 bytes a block, drawn in ``kernels/blocks/affine32.h``.
Without importance the grid spans the block's least and largest weight; with it, scale and offset are the best of 38 spacings, fitted by
weighted least squares.
The search is llama.cpp's (ggml-quants.c), bit for bit.
"""

from __future__ import annotations

from quantcli.qtypes.shared.ggml import OffsetType

QTYPE = OffsetType("q4_1")
