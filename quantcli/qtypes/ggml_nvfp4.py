"""GGUF's NVFP4: E2M1 with an unsigned E4M3 scale for each 16 inputs, in ggml's blocks of 64, 4.5 bpw.

``w = scale/2·level[q]``, levels twice E2M1's; 36 bytes a block, drawn in ``kernels/blocks/e2m1.h``. The block has no scale of the whole
matrix, as the qtype ``nvfp4`` does: a group whose largest weight is under 0.006 becomes zero, and one beyond 2688 is refused.
llama.cpp's scale, bit for bit, is the largest |w| over 6, and importance does not count.
"""

from __future__ import annotations

from typing import Any

from quantcli.qtypes._ggml import BlockType

OPTIONS: dict[str, Any] = {}

_TYPE = BlockType("ggml_nvfp4")

layout = _TYPE.layout
fit = _TYPE.fit
pack = _TYPE.pack
unpack = _TYPE.unpack
encode = _TYPE.encode
