"""TQ1_0: ternary weights, five in a byte, in blocks of 256, 1.6875 bpw.

``w = d·q, q in −1, 0, 1``; 54 bytes a block, drawn in ``kernels/blocks/tq.h``. For models trained to be ternary (BitNet b1.58, TriLM).
The scale is the largest |w|, and weights are rounded to nearest, as llama.cpp does, bit for bit.
"""

from __future__ import annotations

from quantcli.qtypes.shared.ggml import BlockType

QTYPE = BlockType("tq1_0")
