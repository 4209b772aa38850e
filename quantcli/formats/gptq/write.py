"""Writing GPTQ folders: the file tensors of a quantized weight, and the shapes that readers refuse."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantcli.checkpoint import Checkpoint
from quantcli.errors import RecipeError, UnsupportedError, about
from quantcli.formats import _folder
from quantcli.formats._folder import as_json, coded_only, dense_dtypes, is_dense, module_of, sidecar_files, split_block, writer
from quantcli.formats._fused import check_fused
from quantcli.formats._packed_int import BITS, natural_groups
from quantcli.formats.gptq.config import LEGACY_CONFIG, V1, V2, module_settings, quantization_words, surprises
from quantcli.ops.bits import codes_per_run, pack_bits
from quantcli.qtypes import int as int_qtype
from quantcli.shards import MAX_SHARD_BYTES, stored_as
from quantcli.tensors import QuantizedTensor, Scheme, TensorSpec

__all__ = ["USUAL_SCHEME", "context", "outputs", "parts", "supports", "writer"]

USUAL_SCHEME = "int4-g128-sym"
"""What ``export`` codes to where the source's own codes do not fit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Context(_folder.Context):
    """``version``: of the format, the same for all tensors."""

    version: str


def supports(scheme: Scheme) -> bool:
    """Integers of 2, 3, 4 or 8 bits, with float16 scales and activations left alone."""
    if is_dense(scheme):
        return True
    plain = scheme.get("scale_dtype", "F16") == "F16" and not scheme.get("act")
    return scheme.qtype == "int" and scheme.get("bits", 4) in BITS and plain


def context(
    source: Checkpoint, schemes: Mapping[str, Scheme], metadata: Mapping[str, Any], *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> Context:
    """How ``source`` is written with ``schemes``. ``metadata`` (JSON: how the model was made) goes into ``meta.quantcli``."""
    coded = coded_only(source, schemes, "GPTQ")
    for name in coded:
        check_place(name, tied=bool(source.config.get("tie_word_embeddings")))
    check_fused(source.specs, coded, module_settings)
    version = V1 if all(scheme.get("sym", True) for scheme in coded.values()) else V2
    words = quantization_words(source, coded, version, metadata)
    sidecars = sidecar_files(source, words, **{LEGACY_CONFIG: as_json(words)})
    return Context(
        version=version,
        dtypes=dense_dtypes(source),
        sidecars=sidecars,
        max_shard_bytes=max_shard_bytes,
        notes=surprises(coded),
    )


def outputs(spec: TensorSpec, scheme: Scheme | None, context: Context) -> list[TensorSpec]:
    """The file tensors of ``spec``; :class:`RecipeError` when a reader would refuse its shape."""
    if scheme is None or is_dense(scheme):
        return _folder.dense_outputs(spec, scheme, context)
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


def check_place(name: str, *, tied: bool) -> None:
    """Outside of the numbered blocks readers look for codes in one module, lm_head, and there only when it is not the embedding."""
    if split_block(name)[0] or (name == "lm_head.weight" and not tied):
        return
    why = (
        "the model ties it to the embedding, whose weights readers take instead" if name == "lm_head.weight" else "readers expect it dense"
    )
    raise RecipeError(f"{name}: GPTQ quantizes the linears of decoder layers and an untied lm_head; {why}: keep this one")


def check_shape(spec: TensorSpec, scheme: Scheme) -> None:
    """Readers take matrices named ``.weight`` whose two sides fill whole words."""
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


def parts(name: str, tensor: Tensor | QuantizedTensor, context: Context) -> dict[str, Tensor]:
    """``tensor`` as its file tensors. A symmetric one must have its one zero point: v1 has no other, and vLLM's Marlin reads none."""
    if not isinstance(tensor, QuantizedTensor) or is_dense(tensor.scheme):
        return _folder.dense_parts(name, tensor, context)
    bits, sym = tensor.scheme.get("bits", 4), tensor.scheme.get("sym", True)
    codes, scale, zero = (tensor.parts[part] for part in ("codes", "scale", "zero"))
    if sym and bool((zero != 2 ** (bits - 1)).any()):
        raise ValueError(f"{name}: {tensor.scheme} is symmetric, and a zero point is not {2 ** (bits - 1)}")
    if not sym and context.version == V1:
        raise ValueError(f"{name}: {tensor.scheme} in a v1 file; the context was made from other schemes")
    n_in = tensor.shape[1]
    groups = tensor.parts.get("g_idx")
    module = module_of(name)
    return {
        f"{module}.qweight": pack_bits(codes.contiguous(), bits).T.contiguous(),
        f"{module}.qzeros": pack_bits((zero - 1 if context.version == V1 else zero).T.contiguous(), bits),
        f"{module}.scales": stored_as(f"{module}.scales", scale, "F16").T.contiguous(),
        f"{module}.g_idx": natural_groups(n_in, group_size_in(tensor.scheme, n_in)) if groups is None else groups.to(torch.int32),
    }


def group_size_in(scheme: Scheme, n_in: int) -> int:
    group_size = int(scheme.get("group_size", 128))
    return n_in if group_size == -1 else group_size
