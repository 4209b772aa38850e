"""IQ2_XXS: runs of 8 magnitudes from a code book of 256 points of 3 levels, 2.0625 bpw.

``w = ±d·(scale + ½)/4·magnitude``, 8 sub-blocks of 32 with 4-bit scales; of each eight signs seven are stored, for an even number is
minus. 66 bytes for 256 weights, drawn in ``kernels/blocks/iq2.h``. Each sub-block's scale is the best of 13, refined once. Importance is
needed, as in ggml.
The search is llama.cpp's (ggml-quants.c), bit for bit.
"""

from __future__ import annotations

from quantcli.qtypes.shared.ggml import BookType

QTYPE = BookType("iq2_xxs")
