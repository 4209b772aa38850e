"""A Hugging Face folder in bitsandbytes' layout, which transformers, peft (QLoRA) and vLLM read: NF4, FP4, or LLM.int8 rows.

A linear ``<module>.weight`` [out, in] of n weights in n_blocks blocks becomes, in 4 bits::

    <module>.weight                                U8  [⌈n/2⌉, 1]             two codes a byte, the even weight in the high half
    <module>.weight.absmax                         F32 [n_blocks]            U8 with double quantization, and then also
    <module>.weight.nested_absmax                  F32 [⌈n_blocks/256⌉]
    <module>.weight.nested_quant_map               F32 [256]
    <module>.weight.quant_map                      F32 [16]
    <module>.weight.quant_state.bitsandbytes__nf4  U8  [bytes]               JSON: type, block size, dtype, shape, nested_offset …

and in 8 bits::

    <module>.weight         I8  [out, in]            <module>.SCB            F32 [out]
    <module>.weight_format  U8  []                   0: rows

Everything else stays dense, and ``llm_int8_skip_modules`` names what of it is a linear. One folder holds 4 bits or 8, never both.

The JSON's length depends on how many digits ``nested_offset`` has, which is not known when the header is written: spaces, which JSON
readers skip, fill it up to the longest. A folder that came from bitsandbytes keeps its own lengths, so that it goes out as it came in.

Engines decode by the type's own levels whatever ``quant_map`` holds, and by ``nested_quant_map`` as it is stored: so does the reader here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from typing_extensions import override

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.formats import DEFAULTS, Format, OutputLayout, Request
from quantcli.formats.bitsandbytes import read, write
from quantcli.tensors import Scheme


class BitsAndBytes(Format):
    """bitsandbytes folders: NF4, FP4 and LLM.int8."""

    usual_scheme = "nf4-b64"
    lists_modules = True
    takes_derived = False

    @override
    def detect(self, path: Path, config: dict[str, Any] | None) -> bool:
        return read.detect(path, config)

    @override
    def read(self, path: Path) -> Checkpoint:
        return read.read(path)

    @override
    def supports(self, scheme: Scheme) -> bool:
        return write.supports(scheme)

    @override
    def stays_dense(self, name: str) -> bool:
        return write.stays_dense(name)

    @override
    def layout(self, source: Checkpoint, schemes: Mapping[str, Scheme], request: Request = DEFAULTS) -> OutputLayout:
        return write.layout(source, schemes, request)


FORMAT = BitsAndBytes()
