"""A Hugging Face folder in GPTQ's layout, which GPTQModel, AutoGPTQ, vLLM, SGLang and transformers read: integers of 2, 3, 4 or 8 bits.

A linear ``<module>.weight`` [out, in] becomes, every 32-bit word little endian and packed from its least significant bit::

    <module>.qweight  I32 [in·bits/32, out]        codes, packed along the inputs
    <module>.qzeros   I32 [n_groups, out·bits/32]  zero points, packed along the outputs; v1 stores zero − 1, v2 stores zero
    <module>.scales   F16 [n_groups, out]
    <module>.g_idx    I32 [in]                     the group of each input: i // group_size unless desc_act

and is decoded as ``scales[g_idx[i], o] · (code[i, o] − zero[g_idx[i], o])``. Everything else stays dense.

v1 (``checkpoint_format: gptq``, and folders that declare none) cannot distinguish a zero point 0 from 16: subtracting one borrows
from the neighbour or wraps, and readers differ. Written is therefore v1 when every tensor is symmetric, which every reader knows, and v2
(``gptq_v2``) as soon as one is not; never an asymmetric v1. Read is both; v1 zero points get their ones back as in GPTQModel, by adding
to the packed word, which undoes its borrow too.

Published folders contradict their own metadata. Bits and group size are therefore taken from the tensors' shapes, and a symmetric
model's zero points, which are known beforehand, show its version. What does not fit is listed in ``Checkpoint.notes``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from typing_extensions import override

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.formats import DEFAULTS, Format, OutputLayout, Request
from quantcli.formats.gptq import read, write
from quantcli.tensors import Scheme


class Gptq(Format):
    """GPTQ folders, v1 and v2."""

    usual_scheme = "int4-g128-sym"
    lists_modules = True

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
    def layout(self, source: Checkpoint, schemes: Mapping[str, Scheme], request: Request = DEFAULTS) -> OutputLayout:
        return write.layout(source, schemes, request)


FORMAT = Gptq()
