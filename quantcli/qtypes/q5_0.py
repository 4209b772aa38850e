"""Q5_0: 5 bits in blocks of 32 weights, 5.5 bpw.

``w = d·q, q in −16 … 15``; 22 bytes a block, drawn in ``kernels/blocks/symmetric32.h``.
Without importance the scale is the extreme value over −16; with it, the best of 19 spacings in the weighted square error.
The search is llama.cpp's (ggml-quants.c), bit for bit. In its mixes it stands in for Q4_K where rows are no multiple of 256.
"""

from __future__ import annotations

from quantcli.qtypes.shared.ggml import SignedType

QTYPE = SignedType("q5_0")
