"""Q4_1: 4 bits in blocks of 32 weights with an offset, 5 bpw.

``w = d·q + m, q in 0 … 15``; 20 bytes a block, drawn in ``kernels/blocks/affine32.h``.
Without importance the grid spans the block's least and largest weight; with it, scale and offset are the best of 38 spacings, fitted by
weighted least squares.
The search is llama.cpp's (ggml-quants.c), bit for bit.
"""

from __future__ import annotations

from typing import Any

from quantcli.qtypes._ggml import BlockType

OPTIONS: dict[str, Any] = {}

_TYPE = BlockType("q4_1")

layout = _TYPE.layout
fit = _TYPE.fit
moved = _TYPE.moved
pack = _TYPE.pack
unpack = _TYPE.unpack
encode = _TYPE.encode
