"""TQ2_0: ternary weights, four in a byte, in blocks of 256, 2.0625 bpw.

``w = d·q, q in −1, 0, 1``; 66 bytes a block, drawn in ``kernels/blocks/tq.h``. For models trained to be ternary (BitNet b1.58, TriLM).
The scale is the largest |w|, and weights are rounded to nearest, as llama.cpp does, bit for bit.
"""

from __future__ import annotations

from quantcli.qtypes.shared.ggml import BlockType

QTYPE = BlockType("tq2_0")
