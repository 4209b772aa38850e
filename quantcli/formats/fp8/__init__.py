"""A Hugging Face folder with ``quant_method: fp8``: DeepSeek's and transformers' blocks, and vLLM's one scale a weight.

A linear ``<module>.weight`` [out, in] is stored as E4M3, with its scales and ``w = weight · scale`` (in spite of the name)::

    <module>.weight             F8_E4M3 [out, in]
    <module>.weight_scale_inv   F32 [⌈out/128⌉, ⌈in/128⌉]   a scale for each block: ``weight_block_size`` [128, 128]
    <module>.weight_scale       F32 [1]                     or one for the weight: ``weight_block_size`` null
    <module>.input_scale        F32 [1]                     its input's, where ``activation_scheme`` is static

Written is the first of E4M3 with blocks, whose engines quantize inputs in groups of 128, or with one scale a weight; the linears left
dense are listed twice, as transformers' ``modules_to_not_convert`` and vLLM's ``ignored_layers``. Blocks at the edges may be cut, as in
DeepSeek-V3 (576 rows). Its own loader takes that, vLLM where it does not join the matrix with others; transformers without a GPU takes
all blocks of a matrix for equally large, and refuses it (320 rows) or reads it wrong (192 rows): the plan has a note on it.

Read are also other block sizes, a scale a row (fbgemm_fp8), E8M0 scales (DeepSeek-V3.1 and later), stacks of experts [n, out, in] with
``…_scale_inv`` or ``…_scales_inv``, DeepSeek-V4's E2M1 experts, the names that Mistral gave (``qscale_weight``, ``qscale_act``), and
E5M2. Shapes decide; where ``quantization_config`` differs, ``Checkpoint.notes`` has a note.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from typing_extensions import override

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.formats import DEFAULTS, Format, OutputLayout, Request
from quantcli.formats.fp8 import read, write
from quantcli.tensors import Scheme


class Fp8(Format):
    """FP8 folders: blocks of 128 x 128, or one scale a weight."""

    usual_scheme = "fp8-block"
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
    def suited(self, scheme: Scheme, config: Mapping[str, Any]) -> Scheme:
        return write.suited(scheme, config)

    @override
    def layout(self, source: Checkpoint, schemes: Mapping[str, Scheme], request: Request = DEFAULTS) -> OutputLayout:
        return write.layout(source, schemes, request)


FORMAT = Fp8()
