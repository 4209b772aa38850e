"""GGUF's MXFP4: E2M1 with a power of two for each 32 inputs, in ggml's blocks, 4.25 bpw.

``w = 2^(scale − 128)·level[q]``, levels twice E2M1's; 17 bytes a block, drawn in ``kernels/blocks/e2m1.h``. The numbers are those of the
qtype ``mxfp4``, which stores them as compressed-tensors does, and either passes on to the other unrounded; only how they are searched
differs. llama.cpp's exponent, bit for bit, is ⌊log2(largest |w|)⌋ − 2, and importance does not count.
"""

from __future__ import annotations

from quantcli.qtypes.shared.ggml import Mxfp4Type

QTYPE = Mxfp4Type("ggml_mxfp4")
