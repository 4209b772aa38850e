"""IQ3_XXS: runs of 4 magnitudes from a code book of 256 points of 8 levels, 3.0625 bpw.

``w = ±d·(scale + ½)/2·magnitude``, 8 sub-blocks of 32 with 4-bit scales; of each eight signs seven are stored, for an even number is
minus. 98 bytes for 256 weights, drawn in ``kernels/blocks/iq3.h``. Each sub-block's scale is the best of 31, refined once.
The search is llama.cpp's (ggml-quants.c), bit for bit.
"""

from __future__ import annotations

from quantcli.qtypes.shared.ggml import BookType

QTYPE = BookType("iq3_xxs")
