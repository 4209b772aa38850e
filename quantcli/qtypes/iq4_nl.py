"""IQ4_NL: 4-bit codes of sixteen fixed levels, finer around zero, in blocks of 32 weights, 4.5 bpw.

``w = d·level[q], level from −127 to 113``; 18 bytes a block, drawn in ``kernels/blocks/iq4.h``.
The scale is the best of 16 spacings in the square error, weighted by w² or by importance.
The search is llama.cpp's (ggml-quants.c), bit for bit.
"""

from __future__ import annotations

from quantcli.qtypes.shared.ggml import BlockType

QTYPE = BlockType("iq4_nl")
