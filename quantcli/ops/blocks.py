"""Ops of ggml's block types: quantize, dequantize, search, pack and unpack, byte for byte as ggml does."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from quantcli.errors import KernelError
from quantcli.ops import block_reference as reference
from quantcli.ops.block_codecs import KINDS
from quantcli.ops.block_search import Kind
from quantcli.ops.dispatch import kernel, stream

__all__ = ["KINDS", "Params", "dequantize_blocks", "fit_blocks", "pack_blocks", "quantize_blocks", "unpack_blocks"]

Params = dict[str, Tensor]
"""``d`` F16 [out, n_super]; types of sub-blocks also ``scale`` [out, n_sub], U8 or I8, and q2_k, q4_k, q5_k ``dmin`` F16 and ``min`` U8;
q4_1 and q5_1 ``m`` F16 [out, n_super]."""


def _kind(name: str, in_features: int) -> Kind:
    if name not in KINDS:
        raise KernelError(f"no block type '{name}'; there are: {', '.join(KINDS)}")
    kind = KINDS[name]
    if in_features <= 0 or in_features % kind.block:
        raise KernelError(f"in_features {in_features} is not a positive multiple of the {name} block {kind.block}")
    return kind


def _empty_params(kind: Kind, rows: int, in_features: int, device: torch.device) -> Params:
    n_super, n_sub = in_features // kind.block, in_features // kind.sub
    params = {} if kind.d_at is None else {"d": torch.empty(rows, n_super, dtype=torch.float16, device=device)}
    if kind.scale is not None:
        params["scale"] = torch.empty(rows, n_sub, dtype=kind.scale, device=device)
    if kind.has_min:
        params["dmin"] = torch.empty(rows, n_super, dtype=torch.float16, device=device)
        params["min"] = torch.empty(rows, n_sub, dtype=torch.uint8, device=device)
    if kind.has_offset:
        params["m"] = torch.empty(rows, n_super, dtype=torch.float16, device=device)
    return params


def _ready(W: Tensor) -> tuple[Tensor, ModuleType | None]:
    """``W`` contiguous, and the kernels for it."""
    W = W.detach().contiguous()
    return W, kernel(W)


def _importance(W: Tensor, kind: str, importance: Tensor | None) -> Tensor | None:
    """``importance`` where ``W`` is; :class:`KernelError` where the type needs it and there is none."""
    if importance is None and KINDS[kind].needs_importance:
        raise KernelError(f"{kind} needs importance, got none")
    return None if importance is None else importance.to(W.device, torch.float32).contiguous()


def quantize_blocks(W: Tensor, kind: str, importance: Tensor | None = None) -> Tensor:
    """ggml's own bytes of ``W``.

    ``W``: [out, in] float32, bfloat16 or float16; ``kind``: "q4_k", …; ``importance``: [in], llama.cpp's imatrix row, or None.
    Returns [out, row_bytes] uint8, the bytes of ``ggml_quantize_chunk``.
    """
    sizes = _kind(kind, W.shape[-1])
    W, kernels = _ready(W)
    importance = _importance(W, kind, importance)
    if kernels is None:
        return reference.quantize(W, kind, importance)
    blocks = torch.empty(W.shape[0], W.shape[1] // sizes.block * sizes.n_bytes, dtype=torch.uint8, device=W.device)
    kernels.quantize_blocks(kind, W, importance, blocks, stream=stream(W))
    return blocks


def dequantize_blocks(blocks: Tensor, kind: str, in_features: int) -> Tensor:
    """The weights in ``blocks`` [out, row_bytes] uint8: [out, in] float32, as ggml's dequantizer computes them."""
    _kind(kind, in_features)
    blocks, kernels = _ready(blocks)
    if kernels is None:
        return reference.dequantize(blocks, kind, in_features)
    W = torch.empty(blocks.shape[0], in_features, dtype=torch.float32, device=blocks.device)
    kernels.dequantize_blocks(kind, blocks, W, stream=stream(W))
    return W


def fit_blocks(W: Tensor, kind: str, importance: Tensor | None = None) -> Params:
    """ggml's search alone: the parameters it stores for ``W`` (arguments as :func:`quantize_blocks`)."""
    sizes = _kind(kind, W.shape[-1])
    W, kernels = _ready(W)
    importance = _importance(W, kind, importance)
    if kernels is None:
        return reference.fit(W, kind, importance)
    params = _empty_params(sizes, W.shape[0], W.shape[1], W.device)
    kernels.fit_blocks(kind, W, importance, params, stream=stream(W))
    return params


def pack_blocks(codes: Tensor, params: Params, kind: str) -> Tensor:
    """The blocks [out, row_bytes] uint8 that store ``codes`` [out, in] int8 and ``params``."""
    sizes = _kind(kind, codes.shape[-1])
    codes, kernels = _ready(codes)
    if kernels is None:
        return reference.pack(codes, params, kind)
    params = {name: part.contiguous() for name, part in params.items()}
    blocks = torch.empty(codes.shape[0], codes.shape[1] // sizes.block * sizes.n_bytes, dtype=torch.uint8, device=codes.device)
    kernels.pack_blocks(kind, codes, params, blocks, stream=stream(codes))
    return blocks


def unpack_blocks(blocks: Tensor, kind: str, in_features: int) -> tuple[Tensor, Params]:
    """The inverse of :func:`pack_blocks`: codes [out, in] int8 (signed types centred on zero) and parameters."""
    sizes = _kind(kind, in_features)
    blocks, kernels = _ready(blocks)
    if kernels is None:
        return reference.unpack(blocks, kind, in_features)
    codes = torch.empty(blocks.shape[0], in_features, dtype=torch.int8, device=blocks.device)
    params = _empty_params(sizes, blocks.shape[0], in_features, blocks.device)
    kernels.unpack_blocks(kind, blocks, codes, params, stream=stream(blocks))
    return codes, params
