"""Codes carried from one number format to another whose grid holds them: no rounding anew, or of the scales alone.

An affine integer grid is ``w = scale·k``, k = code − zero point, a scale for each group of inputs. It lies inside another one when the
range of k does, when the other's groups divide its own, and when the other's dtype holds its scales. So symmetric 4 bits in groups of 128
are Q4_0 with every scale repeated four times, and GPTQ, AWQ and compressed-tensors are one grid in three packings. Two degrees:

``EXACT``   every weight decodes to the same float32, bit for bit
``CODES``   every code stays; a scale or minimum is rounded to the target's dtype: far less than rounding the weights again

Formats without a table here pass on to themselves alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantcli import qtypes
from quantcli.errors import NumericsError, UnsupportedError
from quantcli.ops.blocks import KINDS, pack_blocks, unpack_blocks
from quantcli.ops.minifloat import pack_fp4, unpack_fp4
from quantcli.qtypes.shared.float4 import scales_of
from quantcli.tensors import DTYPES, QuantizedTensor, Scheme

EXACT, CODES = "exact", "codes"

SIGNED_BLOCKS = {"q4_0": (-8, 7), "q5_0": (-16, 15), "q8_0": (-128, 127)}
"""ggml's types ``w = d·k`` in blocks of 32 with a float16 scale, and the range of their k."""

MINIMUM_BLOCKS = {"q4_1": 15, "q5_1": 31}
"""ggml's types ``w = d·q + m`` in blocks of 32, and their largest code."""

BLOCK = 32

WIDER = {"F16": ("F16", "F32"), "BF16": ("BF16", "F32"), "F32": ("F32",)}
"""A dtype of scales → those that hold all its numbers."""

MXFP4 = {"mxfp4", "ggml_mxfp4"}
"""The same numbers in two packings."""

LARGEST_E4M3 = 126
"""The byte of 448; those after it are no number, or have a sign."""

COARSE_TO_FINE = ("tensor", "block", "channel")
FP8_HOLDS = {("tensor", "block"), ("tensor", "channel")}
"""Pairs of fp8's strategies of which the second can repeat the first one's scales."""


@dataclass(frozen=True, slots=True)
class Affine:
    """An affine integer grid as its scheme describes it. ``lo … hi``: the range of k; ``group_size`` −1 is a whole row."""

    lo: int
    hi: int
    group_size: int
    scale_dtype: str
    desc_act: bool = False


def exactness(source: Scheme, target: Scheme, in_features: int) -> str | None:
    """How well ``target`` holds what ``source`` codes in rows of ``in_features``: :data:`EXACT`, :data:`CODES` or None for not at all."""
    if target.static_activations and source.get("act") != target.get("act"):
        return None
    if grid_of(source) == grid_of(target) or {source.qtype, target.qtype} == MXFP4:
        return EXACT
    if (source.qtype, target.qtype) == ("nvfp4", "ggml_nvfp4"):  # which stores the reciprocal of the matrix's scale
        return CODES if target.option("scaled") and in_features % KINDS["ggml_nvfp4"].block == 0 else None
    if source.qtype == target.qtype == "fp8":
        return fp8_exactness(source, target)
    if source.qtype == target.qtype == "nf4" or source.qtype == target.qtype == "fp4":
        same_blocks = source.option("block_size") == target.option("block_size")
        return EXACT if same_blocks and not target.option("double_quant") else None
    if source.qtype == "hqq":
        return hqq_exactness(source, target, in_features)
    have = affine_of(source)
    if have is None:
        return None
    if target.qtype == "int":
        return integer_exactness(source, have, target, in_features)
    return block_exactness(source, have, target, in_features)


def candidates(source: Scheme) -> Iterator[Scheme]:
    """Schemes that may hold the codes of ``source``, in the order in which a format that supports them should take one."""
    yield from variants(source)
    if source.get("act"):
        yield from variants(source.with_options(act=""))
    if source.qtype in MXFP4:
        yield Scheme.parse(*(MXFP4 - {source.qtype}))
    if source.qtype == "nvfp4":
        yield Scheme.of("ggml_nvfp4", scaled=True)
    yield from (Scheme.of(name) for name in ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0"))


def variants(source: Scheme) -> Iterator[Scheme]:
    """``source`` and its like in the same number format: with zero points, other scales, finer groups, more bits."""
    yield source
    if source.qtype == "int":
        # Finer groups are for formats that know no group of a whole row, more bits for those that know few widths.
        for bits in [source.option("bits"), *(b for b in (4, 8) if b > source.option("bits"))]:
            for size in (source.option("group_size"), 128, 64, 32):
                scheme = source.with_options(bits=bits, group_size=size)
                yield scheme
                if scheme.option("sym"):
                    yield scheme.with_options(sym=False)
                if scheme.option("scale_dtype") != "F16":
                    yield scheme.with_options(scale_dtype="F16")
    elif source.qtype == "fp8":
        for strategy in COARSE_TO_FINE:
            yield from (source.with_options(strategy=strategy, scale_dtype=dtype) for dtype in ("F32", "BF16"))
    elif source.qtype in ("nf4", "fp4"):
        yield source.with_options(double_quant=False)
    elif source.qtype == "llm_int8":
        yield Scheme.parse("int8-channel-sym-sf32")


def regrid(tensor: QuantizedTensor, target: Scheme) -> tuple[QuantizedTensor, bool]:
    """``tensor`` on the grid of ``target``, and whether every weight still decodes to the same float32.

    Raises :class:`UnsupportedError` where :func:`exactness` finds no way, :class:`NumericsError` when a scale does not fit its dtype.
    """
    source = tensor.scheme
    if exactness(source, target, tensor.shape[-1]) is None:
        raise UnsupportedError(f"the grid of {target} does not hold that of {source}")
    if grid_of(source) == grid_of(target):
        kept = {name: part for name, part in tensor.parts.items() if name != "input_scale" or target.static_activations}
        return QuantizedTensor(target, tensor.shape, kept), True
    if source.qtype == "fp8":
        out = spread_fp8(tensor, target)
    elif source.qtype in MXFP4:
        out = repacked_mxfp4(tensor, target)
    elif source.qtype == "nvfp4":
        out = repacked_nvfp4(tensor, target)
    elif source.qtype in ("nf4", "fp4"):
        out = QuantizedTensor(target, tensor.shape, {"packed": tensor.parts["packed"], "absmax": scales_of(tensor.parts)})
    elif source.qtype == "hqq":
        scale, zeros = (tensor.parts[name].view(tensor.shape[0], -1) for name in ("scale", "zero"))
        out = packed(tensor.parts["codes"], scale, -(scale.float() * zeros.float()), target)
    else:
        k, scale, zero, g_idx = integers_of(tensor)
        out = as_integers(k, scale, zero, g_idx, target) if target.qtype == "int" else as_blocks(k, scale, zero, target)
    same = torch.equal(decode(out), decode(tensor))
    if not same and exactness(source, target, tensor.shape[-1]) == EXACT:
        raise NumericsError(f"{source} as {target} does not decode to the same weights; the source breaks its own format's rules")
    return out, same


def decode(tensor: QuantizedTensor) -> Tensor:
    return qtypes.of(tensor.scheme.qtype).unpack(tensor)


def grid_of(scheme: Scheme) -> tuple[str, tuple[tuple[str, Any], ...]]:
    """What of ``scheme`` says which numbers can be stored: not how they were searched, nor how inputs are quantized."""
    defaults = qtypes.of(scheme.qtype).options
    options = {**defaults, **dict(scheme.options)}
    return scheme.qtype, tuple(sorted((key, value) for key, value in options.items() if key not in ("act", "search")))


def affine_of(scheme: Scheme) -> Affine | None:
    """The integer grid of ``scheme``; None when it has none."""
    if scheme.qtype in SIGNED_BLOCKS:
        return Affine(*SIGNED_BLOCKS[scheme.qtype], BLOCK, "F16")
    if scheme.qtype == "llm_int8":
        return Affine(-128, 127, -1, "F32")
    if scheme.qtype != "int":
        return None
    half = 2 ** (scheme.option("bits") - 1)
    lo, hi = (-half, half - 1) if scheme.option("sym") else (1 - 2 * half, 2 * half - 1)
    return Affine(lo, hi, scheme.option("group_size"), scheme.option("scale_dtype"), bool(scheme.option("desc_act")))


def integer_exactness(source: Scheme, have: Affine, target: Scheme, in_features: int) -> str | None:
    """``have``, the grid of ``source``, in the qtype int."""
    want = affine_of(target)
    assert want is not None
    if want.desc_act != have.desc_act or (have.desc_act and want.group_size != have.group_size):
        return None
    if not divides(want.group_size, have.group_size, in_features):
        return None
    if not target.option("sym") and (source.qtype != "int" or source.option("sym")):
        half = 2 ** (target.option("bits") - 1)  # the zero point of a symmetric grid
        want = Affine(-half, half - 1, want.group_size, want.scale_dtype)
    if have.lo < want.lo or have.hi > want.hi:
        return None
    rounded = source.qtype == "llm_int8"  # stores 127 times its scale
    return EXACT if want.scale_dtype in WIDER[have.scale_dtype] and not rounded else CODES


def block_exactness(source: Scheme, have: Affine, target: Scheme, in_features: int) -> str | None:
    """``have``, the grid of ``source``, in one of ggml's types of 32 weights."""
    if have.desc_act or in_features % BLOCK or not divides(BLOCK, have.group_size, in_features):
        return None
    if target.qtype in MINIMUM_BLOCKS:
        fits = source.qtype == "int" and not source.option("sym") and 2 ** source.option("bits") - 1 <= MINIMUM_BLOCKS[target.qtype]
        return CODES if fits else None
    if target.qtype not in SIGNED_BLOCKS:
        return None
    lo, hi = SIGNED_BLOCKS[target.qtype]
    if have.lo < lo or have.hi > hi:
        return None
    return EXACT if have.scale_dtype == "F16" else CODES


def hqq_exactness(source: Scheme, target: Scheme, in_features: int) -> str | None:
    """HQQ's zero points are no integers: of all formats here ggml's types with a minimum alone have a place for them."""
    group_size = source.option("group_size")
    along_inputs = source.option("axis") == 1 and in_features % group_size == 0 and group_size % BLOCK == 0
    fits = target.qtype in MINIMUM_BLOCKS and math.ceil(2 ** source.option("bits")) - 1 <= MINIMUM_BLOCKS[target.qtype]
    return CODES if along_inputs and fits else None


def fp8_exactness(source: Scheme, target: Scheme) -> str | None:
    have, want = source.option("strategy"), target.option("strategy")
    if source.option("dtype") != target.option("dtype") or (have != want and (have, want) not in FP8_HOLDS):
        return None
    return EXACT if target.option("scale_dtype") in WIDER[source.option("scale_dtype")] else CODES


def divides(group_size: int, whole: int, in_features: int) -> bool:
    """Whether groups of ``group_size`` inputs cut those of ``whole`` without crossing one."""
    group_size, whole = (in_features if size == -1 else size for size in (group_size, whole))
    return whole % group_size == 0 and in_features % group_size == 0


def integers_of(tensor: QuantizedTensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """k [out, in] int16, scale [out, n_groups] as it is stored, zero points [out, n_groups] int16 or None, g_idx [in] or None."""
    parts, qtype = tensor.parts, tensor.scheme.qtype
    if qtype in SIGNED_BLOCKS:
        codes, params = unpack_blocks(parts["blocks"], qtype, tensor.shape[-1])
        return codes.to(torch.int16), params["d"], None, None
    if qtype == "llm_int8":
        return parts["codes"].to(torch.int16), (parts["scb"] / 127)[:, None], None, None
    codes, zero, groups = parts["codes"].to(torch.int16), parts["zero"].to(torch.int16), parts.get("g_idx")
    cut = codes.shape[1] // zero.shape[1]
    spread = zero.repeat_interleave(cut, 1) if groups is None else zero[:, groups.long()]
    return codes - spread, parts["scale"], None if tensor.scheme.option("sym") else zero, groups


def as_integers(k: Tensor, scale: Tensor, zero: Tensor | None, g_idx: Tensor | None, target: Scheme) -> QuantizedTensor:
    """The qtype int. ``zero`` None: the source is symmetric, and its zero point becomes the middle of the codes."""
    bits, size = target.option("bits"), target.option("group_size")
    n_groups = scale.shape[1] if g_idx is not None else k.shape[1] // (k.shape[1] if size == -1 else size)
    scale = stored(scale, target.option("scale_dtype")).repeat_interleave(n_groups // scale.shape[1], 1)
    middle = torch.full((k.shape[0], n_groups), 2 ** (bits - 1), dtype=torch.int16)
    zeros = middle if zero is None or target.option("sym") else zero.repeat_interleave(n_groups // zero.shape[1], 1)
    spread = zeros[:, g_idx.long()] if g_idx is not None else zeros.repeat_interleave(k.shape[1] // n_groups, 1)
    parts = {"codes": (k + spread).to(torch.uint8), "scale": scale, "zero": zeros.to(torch.uint8)}
    return QuantizedTensor(target, tuple(k.shape), parts if g_idx is None else {**parts, "g_idx": g_idx})


def as_blocks(k: Tensor, scale: Tensor, zero: Tensor | None, target: Scheme) -> QuantizedTensor:
    """One of ggml's types of 32 weights; ``zero`` goes into the minimum of those that have one: m = −scale·zero."""
    if target.qtype not in MINIMUM_BLOCKS:
        return packed(k, scale, None, target)
    assert zero is not None
    codes = k + zero.repeat_interleave(k.shape[1] // zero.shape[1], 1)
    return packed(codes, scale, -(scale.float() * zero), target)


def packed(codes: Tensor, scale: Tensor, minimum: Tensor | None, target: Scheme) -> QuantizedTensor:
    """Blocks of 32 weights of ``codes`` [out, in]; ``scale`` and ``minimum`` [out, n_groups] are repeated in the blocks of a group."""
    spread = codes.shape[1] // BLOCK // scale.shape[1]
    params = {"d": stored(scale, "F16").repeat_interleave(spread, 1)}
    if minimum is not None:
        params["m"] = stored(minimum, "F16").repeat_interleave(spread, 1)
    blocks = pack_blocks(codes.to(torch.int8).contiguous(), params, target.qtype)
    return QuantizedTensor(target, tuple(codes.shape), {"blocks": blocks})


def repacked_mxfp4(tensor: QuantizedTensor, target: Scheme) -> QuantizedTensor:
    """MXFP4 in the other packing: the same 4 bits and the same exponents."""
    if target.qtype == "ggml_mxfp4":
        codes = unpack_fp4(tensor.parts["packed"]).to(torch.int8)
        parts = {"blocks": pack_blocks(codes, {"scale": tensor.parts["scale"]}, target.qtype)}
    else:
        codes, params = unpack_blocks(tensor.parts["blocks"], tensor.scheme.qtype, tensor.shape[-1])
        parts = {"packed": pack_fp4(codes.to(torch.uint8)), "scale": params["scale"]}
    return QuantizedTensor(target, tensor.shape, parts)


def repacked_nvfp4(tensor: QuantizedTensor, target: Scheme) -> QuantizedTensor:
    """NVFP4 in GGUF's packing: the same 4 bits and the same bytes of scale, and for the matrix 1 / global_scale."""
    scale = tensor.parts["scale"].view(torch.uint8)
    if int(scale.max()) > LARGEST_E4M3:
        raise NumericsError("a scale of the source is negative or no number, which GGUF's NVFP4 cannot hold; the file is damaged")
    blocks = pack_blocks(unpack_fp4(tensor.parts["packed"]).to(torch.int8), {"scale": scale}, target.qtype)
    return QuantizedTensor(target, tensor.shape, {"blocks": blocks, "scale": 1 / tensor.parts["global_scale"].float()})


def spread_fp8(tensor: QuantizedTensor, target: Scheme) -> QuantizedTensor:
    """fp8 with the scales of a coarser strategy repeated, or in another dtype."""
    shape = qtypes.of("fp8").layout(tensor.shape, target)["scale"].shape
    scale = stored(tensor.parts["scale"], target.option("scale_dtype")).expand(shape).contiguous()
    parts = {"data": tensor.parts["data"], "scale": scale}
    if target.static_activations:
        parts["input_scale"] = tensor.parts["input_scale"]
    return QuantizedTensor(target, tensor.shape, parts)


def stored(scale: Tensor, dtype: str) -> Tensor:
    """``scale`` in ``dtype``; :class:`NumericsError` when one becomes infinite or zero."""
    out = scale.to(DTYPES[dtype])
    if not bool(out.isfinite().all()) or bool(((out == 0) & (scale != 0)).any()):
        raise NumericsError(f"a scale of the source does not fit {dtype}; export to a format with wider scales, or quantize anew")
    return out.contiguous()
