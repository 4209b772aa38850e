"""Writing GPTQ folders: the file tensors of a quantized weight, and the shapes that readers refuse."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from quantcli import archs
from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.shards import stored_as
from quantcli.errors import RecipeError, UnsupportedError, about
from quantcli.formats import DEFAULTS, Request
from quantcli.formats.gptq.config import LEGACY_CONFIG, V1, V2, module_settings, quantization_config, surprises
from quantcli.formats.shared.folder import (
    QuantizedFolderLayout,
    as_json,
    dense_dtypes,
    is_dense,
    module_of,
    quantized_only,
    shard_bytes,
    split_block,
)
from quantcli.formats.shared.fused import check_fused
from quantcli.formats.shared.packed_int import BITS, natural_groups
from quantcli.ops.bits import codes_per_run, pack_bits
from quantcli.qtypes import int as int_qtype
from quantcli.tensors import QuantizedTensor, Scheme, TensorSpec


@dataclass(frozen=True, kw_only=True)
class GptqLayout(QuantizedFolderLayout):
    """``version``: of the format, the same for all tensors."""

    version: str

    @override
    def config_files(self, record: Mapping[str, Any]) -> dict[str, bytes | Path]:
        return {**super().config_files(record), LEGACY_CONFIG: as_json(self.recorded(record))}

    @override
    def quantized_outputs(self, spec: TensorSpec, scheme: Scheme) -> list[TensorSpec]:
        if not supports(scheme):
            raise UnsupportedError(f"{spec.name}: {scheme} cannot be stored as GPTQ, which holds integers of 2, 3, 4 and 8 bits")
        check_shape(spec, scheme)
        out, n_in = spec.shape
        bits, n_groups, module = scheme.get("bits", 4), n_in // group_size_in(scheme, n_in), module_of(spec.name)
        return [
            TensorSpec.dense(f"{module}.qweight", "I32", (n_in * bits // 32, out)),
            TensorSpec.dense(f"{module}.qzeros", "I32", (n_groups, out * bits // 32)),
            TensorSpec.dense(f"{module}.scales", "F16", (n_groups, out)),
            TensorSpec.dense(f"{module}.g_idx", "I32", (n_in,)),
        ]

    @override
    def quantized_parts(self, name: str, tensor: QuantizedTensor) -> dict[str, Tensor]:
        """A symmetric tensor must have its one zero point: v1 has no other, and vLLM's Marlin reads none."""
        bits, sym = tensor.scheme.get("bits", 4), tensor.scheme.get("sym", True)
        codes, scale, zero = (tensor.parts[part] for part in ("codes", "scale", "zero"))
        if sym and bool((zero != 2 ** (bits - 1)).any()):
            raise ValueError(f"{name}: {tensor.scheme} is symmetric, and a zero point is not {2 ** (bits - 1)}")
        if not sym and self.version == V1:
            raise ValueError(f"{name}: {tensor.scheme} in a v1 file; the layout was made from other schemes")
        n_in = tensor.shape[1]
        groups = tensor.parts.get("g_idx")
        module = module_of(name)
        return {
            f"{module}.qweight": pack_bits(codes.contiguous(), bits).T.contiguous(),
            f"{module}.qzeros": pack_bits((zero - 1 if self.version == V1 else zero).T.contiguous(), bits),
            f"{module}.scales": stored_as(f"{module}.scales", scale, "F16").T.contiguous(),
            f"{module}.g_idx": natural_groups(n_in, group_size_in(tensor.scheme, n_in)) if groups is None else groups.to(torch.int32),
        }


def supports(scheme: Scheme) -> bool:
    """Integers of 2, 3, 4 or 8 bits, with float16 scales and activations left alone."""
    if is_dense(scheme):
        return True
    plain = scheme.get("scale_dtype", "F16") == "F16" and not scheme.get("act")
    return scheme.qtype == "int" and scheme.get("bits", 4) in BITS and plain


def layout(source: Checkpoint, schemes: Mapping[str, Scheme], request: Request = DEFAULTS) -> GptqLayout:
    """How ``source`` is written with ``schemes``. How the model was made goes into ``meta.quantcli``."""
    quantized = quantized_only(source, schemes, "GPTQ")
    for name in quantized:
        check_place(name, tied=bool(source.config.get("tie_word_embeddings")))
    check_fused(source.specs, quantized, module_settings)
    arch = archs.of(source.config)
    version = V1 if all(scheme.get("sym", True) for scheme in quantized.values()) else V2
    return GptqLayout(
        version=version,
        config=source.config,
        quantization=quantization_config(source, quantized, version, request.modules),
        dtypes=dense_dtypes(source),
        sidecars=source.sidecars().files,
        max_shard_bytes=shard_bytes(request),
        notes=surprises(quantized, request.modules, derived=arch is not None and arch.derived),
    )


def check_place(name: str, *, tied: bool) -> None:
    """Outside of the numbered blocks readers look for codes in one module, lm_head, and there only when it is not the embedding."""
    if split_block(name)[0] or (name == "lm_head.weight" and not tied):
        return
    why = (
        "the model ties it to the embedding, whose weights readers take instead" if name == "lm_head.weight" else "readers expect it dense"
    )
    raise RecipeError(f"{name}: GPTQ quantizes the linears of decoder layers and an untied lm_head; {why}: keep this one")


def check_shape(spec: TensorSpec, scheme: Scheme) -> None:
    """Readers take matrices named ``.weight`` whose two sides fill whole 32-bit words."""
    if not spec.name.endswith(".weight"):
        raise RecipeError(f"{spec.name}: GPTQ stores linears, whose tensor is named <module>.weight; exclude this one")
    with about(spec.name):
        int_qtype.QTYPE.layout(spec.shape, scheme)
    run = codes_per_run(scheme.get("bits", 4))
    for side, size in zip(("out_features", "in_features"), spec.shape, strict=True):
        if size % run:
            raise RecipeError(
                f"{spec.name}: {side} {size} is not a multiple of {run}, which {scheme} needs to fill 32-bit words; exclude it"
            )


def group_size_in(scheme: Scheme, n_in: int) -> int:
    group_size = int(scheme.get("group_size", 128))
    return n_in if group_size == -1 else group_size
