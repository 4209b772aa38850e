"""IQ2_S: runs of 8 magnitudes from a code book of 1024 points of 3 levels, all signs stored, 2.5625 bpw.

``w = ±d·(scale + ½)/4·magnitude``, 16 sub-blocks of 16 with 4-bit scales; 82 bytes for 256 weights, drawn in ``kernels/blocks/iq2.h``.
Each sub-block's scale is the best of 19, refined once. ggml quantizes to it without importance too; llama-quantize asks for some.
The search is llama.cpp's (ggml-quants.c), bit for bit.
"""

from __future__ import annotations

from quantcli.qtypes.shared.ggml import BookType

QTYPE = BookType("iq2_s")
