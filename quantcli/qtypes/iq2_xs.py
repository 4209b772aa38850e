"""IQ2_XS: runs of 8 magnitudes from a code book of 512 points of 3 levels, 2.3125 bpw.

``w = ±d·(scale + ½)/4·magnitude``, 16 sub-blocks of 16 with 4-bit scales; of each eight signs seven are stored, for an even number is
minus. 74 bytes for 256 weights, drawn in ``kernels/blocks/iq2.h``. Each sub-block's scale is the best of 19, refined once. Importance is
needed, as in ggml.
The search is llama.cpp's (ggml-quants.c), bit for bit.
"""

from __future__ import annotations

from typing import Any

from quantcli.qtypes._ggml import BookType

OPTIONS: dict[str, Any] = {}

_TYPE = BookType("iq2_xs")

NO_GRID = _TYPE.no_grid
NEEDS_IMPORTANCE = _TYPE.needs_importance

layout = _TYPE.layout
fit = _TYPE.fit
pack = _TYPE.pack
unpack = _TYPE.unpack
encode = _TYPE.encode
