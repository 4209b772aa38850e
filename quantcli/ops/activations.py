"""Rounds a linear's input as engines do that quantize activations at run time.

In float32, for the names of ``tensors.ACTIVATIONS`` (compressed-tensors' arithmetic, which its own inference runs and the kernels
of vLLM and SGLang follow), ``A`` being the largest magnitude of a token or of a group of its inputs::

    int8-token   s = A / 127.5, x̂ = s·clamp(round(x/s), −128, 127)      int8-tensor  the same with the file's s for all tokens
    fp8-token    s = A / 448,   x̂ = s·E4M3(clamp(x/s, ±448))            fp8-tensor   the same with the file's s for all tokens
    fp8-g128     as fp8-token for each 128 inputs, the last group may be short
    mxfp4-g32, mxfp8-g32   s = 2^e by :func:`~quantcli.ops.minifloat.mx_scale`, x̂ = s·E2M1(x/s) or s·E4M3(x/s)
    nvfp4-g16    s = E4M3(G·(A/6)) / G with the file's global scale G, x̂ = s·E2M1(x/s)

All round to nearest, ties to even. vLLM's int8 kernel divides by 127 instead of 127.5: a step 0.4 % wider.

``llm-int8`` is the engine of bitsandbytes (Dettmers et al., "LLM.int8()", arXiv 2208.07339, section 3): X is taken in float16; a column in
which any |x| reaches the threshold stays as it is, for all tokens of the call; each row is rounded over its largest magnitude below the
threshold, s = A / 127. Its columns depend on which tokens come together: here these are the rows of one matrix.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quantcli.errors import KernelError
from quantcli.ops.minifloat import (
    FLOAT8,
    FP4_LARGEST,
    ZERO_GROUP_BYTE,
    Tile,
    dequantize_fp4,
    dequantize_fp8,
    group_step,
    mx_scale,
    quantize_fp4,
    quantize_fp8,
    tile_absmax,
)

E4M3_LARGEST = FLOAT8["e4m3"].largest
EPSILON = torch.finfo(torch.float32).eps
"""The scale of inputs that are all zero."""

OUTLIER = 6.0
"""From this magnitude on LLM.int8 keeps an input in 16 bits, with the rest of its column."""

STATIC = ("int8-tensor", "fp8-tensor", "nvfp4-g16")
"""Those with a static scale, which is stored in the file."""


def round_inputs(X: Tensor, act: str, scale: Tensor | None = None, *, threshold: float = OUTLIER) -> Tensor:
    """``X``: [..., in] in any float dtype, rounded as the engine of ``act`` does, in the same dtype.

    ``scale``: float32 [1], the file's, for ``int8-tensor``, ``fp8-tensor`` and ``nvfp4-g16``. ``threshold`` is LLM.int8's (0: no outliers);
    the tokens of each matrix X[..., :, :] are one call of its engine.
    """
    if act == "llm-int8":
        matrices = X.reshape(-1, *X.shape[-2:]) if X.ndim > 1 else X.view(1, 1, -1)
        return torch.stack([_llm_int8(matrix, threshold) for matrix in matrices]).view(X.shape)
    if act not in _ROUNDERS:
        raise KernelError(f"no engine quantizes inputs as '{act}'; known are: llm-int8, {', '.join(_ROUNDERS)}")
    if (act in STATIC) != (scale is not None):
        raise KernelError(f"{act}: {'needs the scale of the file' if scale is None else 'computes its own scale; leave it out'}")
    rows = X.reshape(-1, X.shape[-1]).float()
    scale = None if scale is None else scale.to(rows.device, torch.float32)
    return _ROUNDERS[act](rows, scale).to(X.dtype).view(X.shape)


def round_cache(states: Tensor, kind: str, scale: Tensor) -> Tensor:
    """Keys or values [B, heads, T, dim] as read from a cache of ``kind`` (``tensors.KV_CACHES``); ``scale``: [1], or [heads] by head."""
    act = f"{kind.removesuffix('-head')}-tensor"
    if not kind.endswith("-head"):
        return round_inputs(states, act, scale)
    return torch.stack([round_inputs(states[:, h], act, scale[h : h + 1]) for h in range(states.shape[1])], 1)


def _int8_token(X: Tensor, _scale: Tensor | None) -> Tensor:
    return _int8(X, _nonzero(X.abs().amax(1, keepdim=True) / 127.5))


def _int8(X: Tensor, scale: Tensor | None) -> Tensor:
    assert scale is not None
    return (X / scale).round_().clamp_(-128, 127).mul_(scale)


def _fp8_token(X: Tensor, _scale: Tensor | None) -> Tensor:
    return _fp8(X, (1, X.shape[1]))


def _fp8_groups(X: Tensor, _scale: Tensor | None) -> Tensor:
    return _fp8(X, (1, 128))


def _fp8(X: Tensor, tile: Tile) -> Tensor:
    scale = _nonzero(tile_absmax(X, tile) / E4M3_LARGEST)
    return dequantize_fp8(quantize_fp8(X, scale, tile), scale, tile)


def _fp8_tensor(X: Tensor, scale: Tensor | None) -> Tensor:
    assert scale is not None
    whole, scale = (X.shape[0], X.shape[1]), scale.view(1, 1)
    return dequantize_fp8(quantize_fp8(X, scale, whole), scale, whole)


def _mxfp8(X: Tensor, _scale: Tensor | None) -> Tensor:
    tile = (1, 32)
    step = group_step(mx_scale(tile_absmax(X, tile), largest_exponent=8), "mxfp4")  # E8M0 all the same
    return dequantize_fp8(quantize_fp8(X, step, tile), step, tile)


def _mxfp4(X: Tensor, _scale: Tensor | None) -> Tensor:
    X, n = _whole_groups(X, 32)
    return _fp4(X, group_step(mx_scale(tile_absmax(X, (1, 32)), largest_exponent=2), "mxfp4"))[:, :n]


def _nvfp4(X: Tensor, scale: Tensor | None) -> Tensor:
    assert scale is not None
    X, n = _whole_groups(X, 16)
    byte = (scale * (tile_absmax(X, (1, 16)) / FP4_LARGEST)).clamp_(max=E4M3_LARGEST).to(torch.float8_e4m3fn).view(torch.uint8)
    return _fp4(X, group_step(torch.where(byte == 0, ZERO_GROUP_BYTE, byte), "nvfp4", float(scale)))[:, :n]


def _fp4(X: Tensor, step: Tensor) -> Tensor:
    return dequantize_fp4(quantize_fp4(X, step), step)


def _llm_int8(X: Tensor, threshold: float) -> Tensor:
    """One call of LLM.int8's engine: ``X`` [tokens, in]."""
    H = X.half()
    outliers = H.abs() >= threshold if threshold > 0 else torch.zeros_like(H, dtype=torch.bool)
    H = H.masked_fill(outliers, 0)
    peaks = H.abs().amax(1, keepdim=True).float()  # [tokens, 1], the outliers' neighbours in their columns still counted
    rounded = (H * (127.0 / peaks)).nan_to_num_(0.0).round_().mul_(peaks / 127.0)
    return torch.where(outliers.any(0), X, rounded.to(X.dtype))


def _nonzero(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, EPSILON, scale)


def _whole_groups(X: Tensor, size: int) -> tuple[Tensor, int]:
    """``X`` padded with zeros to whole groups, and its own width."""
    return torch.nn.functional.pad(X, (0, -X.shape[1] % size)), X.shape[1]


_ROUNDERS: dict[str, Callable[[Tensor, Tensor | None], Tensor]] = {
    "int8-token": _int8_token,
    "int8-tensor": _int8,
    "fp8-token": _fp8_token,
    "fp8-tensor": _fp8_tensor,
    "fp8-g128": _fp8_groups,
    "mxfp8-g32": _mxfp8,
    "mxfp4-g32": _mxfp4,
    "nvfp4-g16": _nvfp4,
}
