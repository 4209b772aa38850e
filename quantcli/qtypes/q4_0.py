"""Q4_0: 4 bits in blocks of 32 weights, 4.5 bpw.

``w = d·q, q in −8 … 7``; 18 bytes a block, drawn in ``kernels/blocks/symmetric32.h``.
Without importance the scale is the extreme value over −8; with it, the best of 19 spacings in the weighted square error.
The search is llama.cpp's (ggml-quants.c), bit for bit.
"""

from __future__ import annotations

from quantcli.qtypes.shared.ggml import SignedType

QTYPE = SignedType("q4_0")
