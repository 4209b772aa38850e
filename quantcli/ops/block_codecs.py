"""ggml's block types by name: a codec in torch for each, and its sizes."""

from __future__ import annotations

from quantcli.ops.block_e2m1 import MXFP4, NVFP4
from quantcli.ops.block_iq2_iq3 import IQ2_S, IQ2_XS, IQ2_XXS, IQ3_S, IQ3_XXS
from quantcli.ops.block_iq4 import IQ4_NL, IQ4_XS
from quantcli.ops.block_k import Q2_K, Q3_K, Q4_K, Q5_K, Q6_K
from quantcli.ops.block_legacy import Q4_0, Q4_1, Q5_0, Q5_1, Q8_0
from quantcli.ops.block_search import Codec, Kind
from quantcli.ops.block_ternary import TQ1_0, TQ2_0

CODECS: dict[str, Codec] = {
    "q8_0": Q8_0(),
    "q4_0": Q4_0(),
    "q4_1": Q4_1(),
    "q5_0": Q5_0(),
    "q5_1": Q5_1(),
    "q2_k": Q2_K(),
    "q3_k": Q3_K(),
    "q4_k": Q4_K(),
    "q5_k": Q5_K(),
    "q6_k": Q6_K(),
    "iq4_nl": IQ4_NL(),
    "iq4_xs": IQ4_XS(),
    "iq3_s": IQ3_S(),
    "iq3_xxs": IQ3_XXS(),
    "iq2_xs": IQ2_XS(),
    "iq2_xxs": IQ2_XXS(),
    "iq2_s": IQ2_S(),
    "ggml_mxfp4": MXFP4(),
    "ggml_nvfp4": NVFP4(),
    "tq1_0": TQ1_0(),
    "tq2_0": TQ2_0(),
}

KINDS: dict[str, Kind] = {name: codec.kind for name, codec in CODECS.items()}
