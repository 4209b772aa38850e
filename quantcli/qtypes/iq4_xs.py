"""IQ4_XS: IQ4_NL's sixteen levels in super-blocks of 256 weights with 8 six-bit scales, 4.25 bpw.

``w = (d·scale)·level[q], level from −127 to 113``; 136 bytes a block, drawn in ``kernels/blocks/iq4.h``.
Each sub-block's scale is the best of 16 spacings in the square error, weighted by w² or by importance.
The search is llama.cpp's (ggml-quants.c), bit for bit.
"""

from __future__ import annotations

from quantcli.qtypes.shared.ggml import BlockType

QTYPE = BlockType("iq4_xs")
