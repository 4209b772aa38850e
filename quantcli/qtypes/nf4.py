"""NF4: sixteen levels at the quantiles of a normal distribution, in blocks scaled by their largest magnitude, as bitsandbytes stores them.

Dettmers, Pagnoni, Holtzman, Zettlemoyer: "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv 2305.14314, section 3. Parts of a matrix
[out, in], whose n weights are taken as one row of n_blocks = ⌈n / block_size⌉ blocks::

    packed         U8  [⌈n/2⌉]               two codes a byte, the even weight in the high half
    absmax         F32 [n_blocks]            or, with ``double_quant``, U8, and
    nested_absmax  F32 [⌈n_blocks / 256⌉]
    nested_offset  F32 [1]

The levels are bitsandbytes' constants. Formulas in circulation, QLoRA's equation 4 among them, give others: theirs are the midpoints of
seventeen quantiles, bitsandbytes' the quantiles of two half ranges with an offset of 0.9677083, divided by the largest. Engines decode with
the constants, so that a file made with other levels is read as another model.

Options: ``block_size`` 32 … 4096; ``double_quant``: the scales in 8 bits, 0.4 bpw less at blocks of 64. Time: one pass over the weights.
"""

from __future__ import annotations

from quantcli.qtypes.shared.float4 import Float4Type

LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

QTYPE = Float4Type("nf4", LEVELS)
