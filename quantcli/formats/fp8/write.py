"""Writing FP8 folders: a weight and its scale under the names that each of the two forms has, and what engines refuse."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from typing_extensions import override

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.errors import RecipeError, UnsupportedError, about
from quantcli.formats import DEFAULTS, Request
from quantcli.formats.fp8.config import quantization_config
from quantcli.formats.shared.folder import (
    QuantizedFolderLayout,
    dense_dtypes,
    is_dense,
    module_of,
    part_specs,
    quantized_only,
    shard_bytes,
    split_block,
)
from quantcli.formats.shared.fused import check_fused
from quantcli.qtypes import fp8
from quantcli.tensors import QuantizedTensor, Scheme, TensorSpec

ACTIVATIONS = {"block": ("fp8-g128",), "tensor": ("fp8-token", "fp8-tensor")}
"""How engines quantize the inputs of each form, the usual way first."""

FILE_PARTS = {"data": "weight", "scale": "weight_scale", "input_scale": "input_scale"}


@dataclass(frozen=True, kw_only=True)
class Fp8Layout(QuantizedFolderLayout):
    """``scheme``: the one of every quantized weight."""

    scheme: Scheme

    @override
    def quantized_outputs(self, spec: TensorSpec, scheme: Scheme) -> list[TensorSpec]:
        if not supports(scheme):
            raise UnsupportedError(f"{spec.name}: {scheme} cannot be stored as FP8, which holds E4M3 by block or by tensor")
        if len(spec.shape) != 2:
            raise RecipeError(f"{spec.name}: the fp8 format is written from matrices, got {list(spec.shape)}; exclude this tensor")
        with about(spec.name):
            found = part_specs(spec, scheme)
        return [TensorSpec.dense(file_name(spec.name, part, scheme), own.dtype, own.shape) for part, own in found.items()]

    @override
    def quantized_parts(self, name: str, tensor: QuantizedTensor) -> dict[str, Tensor]:
        return {file_name(name, part, tensor.scheme): own for part, own in tensor.parts.items()}


def supports(scheme: Scheme) -> bool:
    """E4M3 in blocks of 128 × 128, or with one scale a weight; scales in float32."""
    if is_dense(scheme):
        return True
    if scheme.qtype != "fp8" or scheme.get("dtype", "e4m3") != "e4m3" or scheme.get("scale_dtype", "F32") != "F32" or scheme.get("block"):
        return False
    strategy = scheme.get("strategy", "channel")
    return strategy in ACTIVATIONS and scheme.get("act", "") in ("", *ACTIVATIONS[strategy])


def suited(scheme: Scheme, config: Mapping[str, Any]) -> Scheme:
    """``scheme`` with scales in float32, and inputs quantized as engines do it in any case."""
    if scheme.qtype != "fp8" or scheme.get("strategy", "channel") not in ACTIVATIONS:
        return scheme
    return scheme.with_options(scale_dtype="F32", act=scheme.get("act") or ACTIVATIONS[scheme.get("strategy")][0])


def layout(source: Checkpoint, schemes: Mapping[str, Scheme], request: Request = DEFAULTS) -> Fp8Layout:
    """How ``source`` is written with ``schemes``. config.json has no place for how the model was made: quantcli.json records it."""
    quantized = quantized_only(source, schemes, "FP8")
    for name in quantized:
        if not split_block(name)[0] or not name.endswith(".weight"):
            raise RecipeError(f"{name}: the fp8 format quantizes the linears of decoder layers, named <module>.weight; keep this one")
    (first, scheme), *others = quantized.items()
    if other := [name for name, own in others if own != scheme]:
        raise RecipeError(
            f"{other[0]} is to be {quantized[other[0]]} and {first} {scheme}: the fp8 format has one scheme for all weights; "
            "use --format compressed-tensors"
        )
    check_fused(source.specs, quantized)
    quant_config = quantization_config(
        source, quantized, scheme.get("strategy", "channel"), request.modules, static=scheme.static_activations
    )
    notes = cut_blocks(source, quantized) if scheme.get("strategy", "channel") == "block" else ()
    return Fp8Layout(
        config=source.config,
        quantization=quant_config,
        scheme=scheme,
        dtypes=dense_dtypes(source),
        sidecars=source.sidecars().files,
        max_shard_bytes=shard_bytes(request),
        notes=notes,
    )


def cut_blocks(source: Checkpoint, quantized: Mapping[str, Scheme]) -> tuple[str, ...]:
    """A note on the matrices whose blocks are cut at an edge, which not every reader takes."""
    cut = [name for name in quantized if any(side % block for side, block in zip(source.specs[name].shape, fp8.BLOCK, strict=True))]
    if not cut:
        return ()
    return (
        f"{len(cut)} matrices such as {cut[0]} {list(source.specs[cut[0]].shape)} have sides that are no multiples of 128: vLLM takes such "
        "only where it joins them with no other (not q, k, v; not gate, up), and transformers without a GPU does not read them right; "
        "the recipe fp8-dynamic has no blocks",
    )


def file_name(name: str, part: str, scheme: Scheme) -> str:
    """A qtype's part in the file: transformers and DeepSeek call a block's scale by another name than vLLM the tensor's."""
    ending = "_inv" if part == "scale" and scheme.get("strategy", "channel") == "block" else ""
    return f"{module_of(name)}.{FILE_PARTS[part]}{ending}"
