"""Writing compressed-tensors folders: the config group of each scheme, the file tensors of a weight, and what engines would refuse."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from typing_extensions import override

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.modules import Modules
from quantcli.errors import RecipeError, UnsupportedError, about
from quantcli.formats import DEFAULTS, Request
from quantcli.formats.compressed_tensors import cache as caches
from quantcli.formats.compressed_tensors import floats, ints
from quantcli.formats.compressed_tensors.config import LIBRARY_VERSION, METHOD, MIXED, format_of, group_config, input_scale_file
from quantcli.formats.compressed_tensors.match import targets_of
from quantcli.formats.shared.dense import dense_modules
from quantcli.formats.shared.folder import (
    QuantizedFolderLayout,
    dense_dtypes,
    is_dense,
    model_dtype,
    module_of,
    quantized_only,
    shard_bytes,
    split_block,
)
from quantcli.formats.shared.fused import check_fused
from quantcli.ops.bits import codes_per_run
from quantcli.qtypes import int as int_qtype
from quantcli.tensors import KvCache, QuantizedTensor, Scheme, TensorSpec

INT8_CACHE = "kv_cache int8: transformers runs it, and engines on other hardware do; vLLM's kernels for GPUs store FP8 alone"

RUN_ON = (3, 5, 6, 7)
"""Bits of integers whose codes run on from one 32-bit word to the next, which old readers unpack otherwise."""

ACTIVATIONS = {
    "int": ("", "int8-token", "int8-tensor"),
    "fp8": ("", "fp8-token", "fp8-tensor", "fp8-g128"),
    "mxfp4": ("", "mxfp4-g32"),
    "mxfp8": ("", "mxfp8-g32"),
    "nvfp4": ("", "nvfp4-g16"),
}
"""qtype → how its engines may quantize inputs."""


def supports(scheme: Scheme) -> bool:
    """Integers of 2 to 8 bits, FP8 (E4M3), MXFP4, MXFP8, NVFP4, with the activations that engines run them with.

    No act-order: the library has removed ``weight_g_idx``, and vLLM is about to.
    """
    if is_dense(scheme):
        return True
    if scheme.qtype not in ACTIVATIONS or scheme.get("act", "") not in ACTIVATIONS[scheme.qtype]:
        return False
    if scheme.qtype == "int":
        return not scheme.option("desc_act")
    return scheme.qtype != "fp8" or (scheme.option("dtype") == "e4m3" and "block" not in dict(scheme.options))


def suited(scheme: Scheme, config: Mapping[str, Any]) -> Scheme:
    """``scheme`` with its scales in the model's dtype, which is what loaders turn them into."""
    if scheme.qtype not in ("int", "fp8"):
        return scheme
    dtype = model_dtype(config)
    return scheme.with_options(scale_dtype=dtype if dtype in ints.SCALE_DTYPES else "F32")


@dataclass(frozen=True, kw_only=True)
class CompressedLayout(QuantizedFolderLayout):
    """``kv_cache``: the name of the format of caches that get scales, or ""; ``scale_dtype``: that of these scales."""

    kv_cache: str
    scale_dtype: str

    @override
    def quantized_outputs(self, spec: TensorSpec, scheme: Scheme) -> list[TensorSpec]:
        check_shape(spec, scheme)
        module = module_of(spec.name)
        found = ints.file_specs(spec.shape, scheme) if scheme.qtype == "int" else floats.file_specs(spec.shape, scheme)
        if scheme.static_activations:
            found[input_scale_file(scheme.get("act"))] = TensorSpec.dense("input_scale", "F32", (1,))
        return [TensorSpec.dense(f"{module}.{local}", file.dtype, file.shape) for local, file in found.items()]

    @override
    def quantized_parts(self, name: str, tensor: QuantizedTensor) -> dict[str, Tensor]:
        found = ints.encode(name, tensor) if tensor.scheme.qtype == "int" else floats.encode(tensor)
        if tensor.scheme.static_activations:
            found[input_scale_file(tensor.scheme.get("act"))] = tensor.parts["input_scale"]
        return {f"{module_of(name)}.{local}": file for local, file in found.items()}

    @override
    def cache_outputs(self, cache: KvCache) -> list[TensorSpec]:
        return caches.file_specs(cache, self.kv_cache, self.scale_dtype)

    @override
    def cache_parts(self, cache: KvCache, scales: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        return caches.encode(cache, scales, self.kv_cache, self.scale_dtype)


def layout(source: Checkpoint, schemes: Mapping[str, Scheme], request: Request = DEFAULTS) -> CompressedLayout:
    """How ``source`` is written with ``schemes``, and caches with scales for ``request.kv_cache``.

    A scheme object of the library forbids keys that it does not know, so how the model was made has no place in config.json; it is in
    quantcli.json.
    """
    kv_cache = request.kv_cache
    quantized = {name: scheme for name, scheme in schemes.items() if not is_dense(scheme)}
    quantized = quantized if kv_cache else quantized_only(source, schemes, "compressed-tensors")
    for name, scheme in quantized.items():
        check_place(name, tied=bool(source.config.get("tie_word_embeddings")))
        check_scheme(name, scheme)
    check_fused(source.specs, quantized, config_key)
    return CompressedLayout(
        config=source.config,
        quantization=quantization_config(source, quantized, request.modules)
        | ({"kv_cache_scheme": caches.kv_cache_scheme(kv_cache)} if kv_cache else {}),
        dtypes=dense_dtypes(source),
        sidecars=source.sidecars().files,
        max_shard_bytes=shard_bytes(request),
        notes=surprises(quantized, kv_cache),
        kv_cache=kv_cache,
        scale_dtype=dtype if (dtype := model_dtype(source.config)) in ints.SCALE_DTYPES else "F32",
    )


def surprises(quantized: Mapping[str, Scheme], kv_cache: str) -> tuple[str, ...]:
    """What readers make of such a folder that a user might not expect."""
    packed = [scheme for scheme in quantized.values() if scheme.qtype == "int" and not scheme.get("act")]
    odd = sorted({scheme.option("bits") for scheme in packed} & set(RUN_ON))
    notes = (
        [f"codes of {odd[0]} bits run on from word to word: compressed-tensors unpacks them so since 0.19, vLLM since 0.33"] if odd else []
    )
    return (*notes, *((INT8_CACHE,) if kv_cache.startswith("int8") else ()))


def config_key(scheme: Scheme) -> str:
    """What the folder states about ``scheme``, as one string; schemes that differ only in how their codes were chosen have the same."""
    return json.dumps(group_config(scheme, []))


def quantization_config(source: Checkpoint, quantized: Mapping[str, Scheme], modules: Modules) -> dict[str, Any]:
    """``quantization_config``: a config group for each scheme, and every other linear in ``ignore``."""
    dense = dense_modules(source, quantized, modules)
    alike: dict[str, dict[str, Scheme]] = {}
    for name, scheme in quantized.items():
        alike.setdefault(config_key(scheme), {})[name] = scheme
    spelt = {key: {own for name in members for own in modules.spellings(name)} for key, members in alike.items()}
    groups = {}
    for i, (key, members) in enumerate(alike.items()):
        others = {*dense, *(name for other in spelt if other != key for name in spelt[other])}
        targets = ["Linear"] if len(alike) == 1 else targets_of(spelt[key], others)
        groups[f"group_{i}"] = group_config(next(iter(members.values())), targets)
    formats = {format_of(scheme) for scheme in quantized.values()}
    return {
        "quant_method": METHOD,
        "format": formats.pop() if len(formats) == 1 else MIXED if formats else "dense",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted(dense),
        "kv_cache_scheme": source_cache_scheme(source),
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
        "version": LIBRARY_VERSION,
    }


def source_cache_scheme(source: Checkpoint) -> Any:
    """How a source of this dialect quantizes its key-value cache; the scales (k_scale, v_scale) are copied like any dense tensor."""
    quant_config = source.quantization if source.kind == "compressed-tensors" else None
    return (quant_config or {}).get("kv_cache_scheme")


def check_place(name: str, *, tied: bool) -> None:
    """Loaders look for codes in linears: those of decoder layers, and an lm_head that is not the embedding."""
    if split_block(name)[0] or (name == "lm_head.weight" and not tied):
        return
    why = "the model ties it to the embedding" if name == "lm_head.weight" else "it is none of these"
    raise RecipeError(f"{name}: compressed-tensors quantizes the linears of decoder layers and an untied lm_head; {why}: keep this one")


def check_scheme(name: str, scheme: Scheme) -> None:
    """Raise :class:`RecipeError` for what engines refuse whatever the shape."""
    if not supports(scheme):
        raise UnsupportedError(f"{name}: {scheme} cannot be stored as compressed-tensors")
    act = scheme.get("act", "")
    if scheme.qtype == "int" and act:
        check_int_with_inputs(name, scheme)
    if scheme.qtype == "fp8" and act and (scheme.option("strategy") == "block") != (act == "fp8-g128"):
        raise RecipeError(
            f"{name}: {scheme}: engines run blocks of FP8 with inputs in groups of 128 (fp8-block+fp8-g128), and nothing else so"
        )


def check_int_with_inputs(name: str, scheme: Scheme) -> None:
    """vLLM runs 8-bit inputs on symmetric weights alone: of 8 bits with one scale a row, or of 4 bits with inputs by token."""
    bits, channel = scheme.option("bits"), scheme.option("group_size") == -1
    if scheme.option("sym") and ((bits == 8 and channel) or (bits == 4 and scheme.get("act") == "int8-token")):
        return
    raise RecipeError(
        f"{name}: {scheme}: vLLM runs quantized inputs on int8-channel-sym weights, or on symmetric int4 ones with +int8-token; use these"
    )


def check_shape(spec: TensorSpec, scheme: Scheme) -> None:
    """Readers take matrices named ``.weight``; packed codes, and packed zero points, fill whole 32-bit words."""
    if not spec.name.endswith(".weight") or len(spec.shape) != 2:
        raise RecipeError(f"{spec.name}: compressed-tensors stores linears, matrices named <module>.weight; exclude this one")
    if scheme.qtype == "fp8" and scheme.option("strategy") == "block" and spec.shape[1] % 128:
        raise RecipeError(f"{spec.name}: in_features {spec.shape[1]} is not a multiple of 128, which engines need for {scheme}; exclude it")
    if scheme.qtype != "int":
        return
    with about(spec.name):
        int_qtype.QTYPE.layout(spec.shape, scheme)
    if scheme.get("act"):
        return
    run = codes_per_run(scheme.option("bits"))
    sides = {"in_features": spec.shape[1]} | ({} if scheme.option("sym") else {"out_features": spec.shape[0]})
    for side, size in sides.items():
        if size % run:
            raise RecipeError(
                f"{spec.name}: {side} {size} is not a multiple of {run}, which {scheme} needs to fill 32-bit words; exclude it"
            )
