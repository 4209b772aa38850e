"""Key-value caches in compressed-tensors: ``kv_cache_scheme`` in config.json, and two scales for each attention.

    <attention>.k_scale, <attention>.v_scale   [1], or [kv_heads, 1, 1] with a scale for each head, in the model's dtype

as llm-compressor writes them. ``k̂ = scale·clamp(round(k/scale))``. The library's readers and vLLM take them into parameters of the model's
dtype and of float32; in the model's dtype both have the same number.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantcli.checkpoint.shards import Shards
from quantcli.errors import CheckpointError
from quantcli.formats.compressed_tensors.config import Arguments, argument_config, parse_arguments
from quantcli.tensors import DTYPES, KvCache, TensorSpec

SCHEMES: dict[str, Arguments] = {
    "fp8": Arguments(8, "float", True, "tensor", None, False),
    "int8": Arguments(8, "int", True, "tensor", None, False),
    "fp8-head": Arguments(8, "float", True, "attn_head", None, False),
    "int8-head": Arguments(8, "int", True, "attn_head", None, False),
}
"""Name in ``tensors.KV_CACHES`` → the library's arguments for it."""

PARTS = ("k_scale", "v_scale")


def kv_cache_scheme(kv_cache: str) -> dict[str, Any]:
    """``kv_cache_scheme`` for a name in ``tensors.KV_CACHES``."""
    return argument_config(SCHEMES[kv_cache], None)


def file_specs(cache: KvCache, kv_cache: str, dtype: str) -> list[TensorSpec]:
    """The file tensors of the scales of ``cache``."""
    shape = (cache.heads, 1, 1) if kv_cache.endswith("-head") else (1,)
    return [TensorSpec.dense(f"{cache.attention}.{part}", dtype, shape) for part in PARTS]


def encode(cache: KvCache, scales: tuple[Tensor, Tensor], kv_cache: str, dtype: str) -> dict[str, Tensor]:
    """Scales of keys and values, each float32 [1] or [heads], as their file tensors."""
    specs = file_specs(cache, kv_cache, dtype)
    return {spec.name: scale.cpu().to(DTYPES[dtype]).view(spec.shape) for spec, scale in zip(specs, scales, strict=True)}


def found(path: Path, given: Any, specs: Mapping[str, TensorSpec]) -> tuple[dict[str, str], list[str]]:
    """Attention → the name of its cache's format, by what config.json declares (``given``) where both scales are there; and notes."""
    arguments = parse_arguments(path, "kv_cache_scheme", given)
    if arguments is None:
        return {}, []
    kv_cache = next((name for name, known in SCHEMES.items() if known == arguments), None)
    if kv_cache is None:
        return {}, ["its key-value cache is quantized in a way that quantcli has no name for; keys and values are taken as they are"]
    attentions = [name.removesuffix(".k_scale") for name in specs if name.endswith(".k_scale")]
    whole = [attention for attention in attentions if f"{attention}.v_scale" in specs]
    notes = [] if whole else ["config.json has a kv_cache_scheme, and no scales are there; keys and values are taken as they are"]
    return dict.fromkeys(whole, kv_cache), notes


def load(shards: Shards, attention: str) -> tuple[Tensor, Tensor]:
    """The scales of keys and values: float32 [1] or [heads]. Raises :class:`CheckpointError` for one that is no positive number."""
    scales = [shards.read(f"{attention}.{part}").float().flatten() for part in PARTS]
    for part, scale in zip(PARTS, scales, strict=True):
        if not scale.numel() or not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise CheckpointError(f"{attention}.{part}: {scale.tolist()[:4]}; expected numbers above zero")
    return scales[0], scales[1]
