"""Q8_0: 8 bits in blocks of 32 weights, 8.5 bpw.

``w = d·q``; 34 bytes a block, drawn in ``kernels/blocks/q8_0.h``.
The scale is the largest magnitude over 127; importance is not used, as in ggml.
The search is llama.cpp's (ggml-quants.c), bit for bit.
"""

from __future__ import annotations

from quantcli.qtypes.shared.ggml import SignedType

QTYPE = SignedType("q8_0")
