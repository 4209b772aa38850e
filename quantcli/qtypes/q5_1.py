"""Q5_1: 5 bits in blocks of 32 weights with an offset, 6 bpw.

``w = d·q + m, q in 0 … 31``; 24 bytes a block, drawn in ``kernels/blocks/affine32.h``.
Without importance the grid spans the block's least and largest weight; with it, scale and offset are the best of 38 spacings, fitted by
weighted least squares.
The search is llama.cpp's (ggml-quants.c), bit for bit. In its mixes it stands in for Q5_K where rows are no multiple of 256.
"""

from __future__ import annotations

from quantcli.qtypes.shared.ggml import OffsetType

QTYPE = OffsetType("q5_1")
