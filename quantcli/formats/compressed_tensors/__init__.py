"""A Hugging Face folder in compressed-tensors' layouts, which vLLM, SGLang, llm-compressor and transformers read: integers, FP8, NVFP4, MX.

A linear ``<module>.weight`` [out, in] becomes, by the format of its config group (g: inputs in a group; 32-bit words little endian)::

    pack-quantized        weight_packed I32 [out, ⌈in·bits/32⌉], codes along the inputs from the least significant bit;
                          weight_scale [out, in/g]; weight_shape I64 [2]; asymmetric: weight_zero_point I32 [⌈out·bits/32⌉, in/g],
                          packed along the outputs; act-order of old files: weight_g_idx I32 [in]
    int-quantized         weight I8 [out, in]; weight_scale [out, in/g]
    float-quantized       weight F8_E4M3 [out, in]; weight_scale [1] | [out, 1] | [⌈out/128⌉, ⌈in/128⌉]
    naive-quantized       the same two, where inputs are not quantized
    nvfp4-pack-quantized  weight_packed U8 [out, in/2]; weight_scale F8_E4M3 [out, in/16]; weight_global_scale F32 [1]
    mxfp4-pack-quantized  weight_packed U8 [out, in/2]; weight_scale U8 [out, in/32], an exponent
    mxfp8-quantized       weight F8_E4M3 [out, in]; weight_scale U8 [out, in/32]

and ``input_scale`` [1] where inputs have a scale found beforehand; NVFP4 inputs have ``input_global_scale`` F32 [1], 448·6 / their range.
Codes of 2 … 8 bits are signed; packed ones, and packed zero points, are stored plus 2^(bits−1). ``w = (q − zero)·scale``; NVFP4's is
``level·scale/global_scale``.

Which format a scheme gets is the library's own rule: quantized inputs make int- and float-quantized, without them integers are packed and
FP8 is naive. Scales are written in the model's dtype (:func:`suited`), since that is what loaders make of them: transformers and
vLLM's packed kernels copy ``weight_scale`` into parameters of the model's dtype. A folder whose float16 scales came from GPTQ into a
bfloat16 model is exact here and in an engine run in float16 or float32; in bfloat16 the engine rounds each scale to 8 bits.

Asymmetric zero points are written packed along the outputs, as llm-compressor writes them and vLLM reads them. transformers 5.23 with
compressed-tensors 0.20 refuses such folders by default (a shape check expects ``weight_zero_point`` unpacked, [out, in/g]: the library
packs it on every device but "meta", where the model is built); it reads them with ``CompressedTensorsConfig(dequantize=True)``;
transformers 5.17 with compressed-tensors 0.19, and vLLM by its source, read them as they are.

Three bits and other odd numbers are written dense, as the library packs them since 0.19, and read so and as it once packed them, ⌊32/bits⌋
codes in a 32-bit word with the rest left empty: the shapes show which. For 2, 4 and 8 bits both are the same.

Published folders contradict their own metadata. Shapes are therefore trusted before metadata, and what does not fit is listed in
``Checkpoint.notes``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from typing_extensions import override

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.formats import DEFAULTS, Format, OutputLayout, Request
from quantcli.formats.compressed_tensors import read, write
from quantcli.tensors import Scheme


class CompressedTensors(Format):
    """compressed-tensors folders, as llm-compressor writes them and vLLM reads them."""

    usual_scheme = "int4-g128-sym"
    has_cache_scales = True
    lists_modules = True
    experts_apart = "as llm-compressor writes them"

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


FORMAT = CompressedTensors()
