"""IQ2_XS: runs of 8 magnitudes from a code book of 512 points of 3 levels, 2.3125 bpw.

``w = ±d·(scale + ½)/4·magnitude``, 16 sub-blocks of 16 with 4-bit scales; of each eight signs seven are stored, for an even number is
minus. 74 bytes for 256 weights, drawn in ``kernels/blocks/iq2.h``. Each sub-block's scale is the best of 19, refined once. Importance is
needed, as in ggml.
The search is llama.cpp's (ggml-quants.c), bit for bit.
"""

from __future__ import annotations

from quantcli.qtypes.shared.ggml import BookType

QTYPE = BookType("iq2_xs")
