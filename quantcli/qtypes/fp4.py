"""FP4: a sign, two bits of exponent and one of mantissa, in blocks scaled by their largest magnitude, as bitsandbytes stores them.

The parts are those of :mod:`quantcli.qtypes.nf4`. A code is not E2M1 of the microscaling formats: its bits select one of eight magnitudes
and a sign, and the order of magnitudes is bitsandbytes' own. In twelfths of the block's scale::

    code   0  1       2  3   4  5  6  7     8 … 15
           0  0.0625  8  12  4  6  2  3     the same, negative (8 is a second zero, chosen for weights just above zero)

At equal size NF4 is nearer to trained weights, which are close to normal; FP4 is there for the files that have it.
"""

from __future__ import annotations

from quantcli.qtypes.shared.float4 import Float4Type

TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)

LEVELS = (*(level / 12 for level in TWELFTHS), *(0.0 - level / 12 for level in TWELFTHS))

QTYPE = Float4Type("fp4", LEVELS)
