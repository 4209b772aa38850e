"""IQ3_S: runs of 4 magnitudes from a code book of 512 points of 8 levels, all signs stored, 3.4375 bpw.

``w = ±d·(2·scale + 1)·magnitude``, 8 sub-blocks of 32 with 4-bit scales; 110 bytes for 256 weights, drawn in ``kernels/blocks/iq3.h``.
Each sub-block's scale is the best of 19, refined once; a run takes the nearest point of those that ggml lists for it.
The search is llama.cpp's (ggml-quants.c), bit for bit.
"""

from __future__ import annotations

from quantcli.qtypes.shared.ggml import BookType

QTYPE = BookType("iq3_s")
