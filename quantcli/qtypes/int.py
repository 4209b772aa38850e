"""Affine integers of 2 to 8 bits: ``w ≈ scale·(code − zero)`` by group, as GPTQ, AWQ and compressed-tensors store them.

Parts of one weight matrix [out, in]::

    codes        U8   [out, in]         0 … 2^bits − 1
    scale        F16  [out, n_groups]   above zero; BF16 or F32 with the option scale_dtype
    zero         U8   [out, n_groups]   an integer code; 2^(bits−1) everywhere when symmetric
    g_idx        I32  [in]              the group of each input; only with the option desc_act
    input_scale  F32  [1]               of the linear's input, when its scale is found beforehand (option act)

Options: ``bits``; ``group_size`` (inputs that share a scale, −1: a whole row); ``sym``; ``search``: "mse", the importance-weighted search
of :mod:`quantcli.ops.affine` and the default, or "minmax"; ``desc_act``: groups run along the order of solving and ``g_idx`` tells which
input is in which; ``scale_dtype``: F16, BF16 or F32, to which the grid's scale is rounded before codes are chosen; ``act``: how the
engine quantizes the linear's input. The grid is ``scale·q + offset``: symmetric codes are signed there and have no offset, asymmetric
ones are unsigned with ``offset = −scale·zero``, exact in float32 (11 bits × 8 bits) but for scales of F32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from quantcli import qtypes
from quantcli.errors import RecipeError
from quantcli.ops.affine import TINY, affine_errors, affine_grid, fit_affine
from quantcli.qtypes import Parts, QType
from quantcli.qtypes.shared.affine import (
    CODES,
    EXACT,
    FLOAT_ZEROS,
    INTEGER_ZEROS,
    NO_ZEROS,
    WIDER,
    Affine,
    AffineCodes,
    divides,
    middle,
    spread,
    stored,
)
from quantcli.tensors import DTYPES, Factors, Grid, QuantizedTensor, Scheme, TensorSpec, check_divisible

BITS = range(2, 9)
SEARCHES = ("mse", "minmax")
SCALE_DTYPES = ("F16", "BF16", "F32")


class Int(QType):
    """Integers with a scale and a zero point for each group of inputs."""

    name = "int"
    options: ClassVar[Mapping[str, Any]] = {
        "bits": 4,
        "group_size": 128,
        "sym": True,
        "desc_act": False,
        "search": "mse",
        "scale_dtype": "F16",
        "act": "",
    }

    @override
    def layout(self, shape: tuple[int, ...], scheme: Scheme) -> dict[str, TensorSpec]:
        """The parts of a matrix of ``shape``; :class:`RecipeError` when the options or the width do not fit."""
        _check_options(scheme)
        if len(shape) != 2:
            raise RecipeError(f"{scheme} codes matrices [out, in], got shape {list(shape)}; exclude this tensor")
        group_size = _group_size(shape, scheme)
        check_divisible(shape, group_size, scheme, _divisors(shape[1]))
        n_groups = shape[1] // group_size
        parts = {
            "codes": ("U8", tuple(shape)),
            "scale": (scheme.option("scale_dtype"), (shape[0], n_groups)),
            "zero": ("U8", (shape[0], n_groups)),
        }
        if scheme.get("desc_act", False):
            parts["g_idx"] = ("I32", (shape[1],))
        if scheme.static_activations:
            parts["input_scale"] = ("F32", (1,))
        return {name: TensorSpec.dense(name, dtype, size) for name, (dtype, size) in parts.items()}

    @override
    def fit(self, W: Tensor, scheme: Scheme, importance: Tensor | None = None, *, fused: Parts | None = None) -> Grid:
        """The grid of ``W`` [out, in] float32; ``importance`` [in] weighs the search, None weighs all inputs alike."""
        self.layout(tuple(W.shape), scheme)
        options = _fit_options(tuple(W.shape), scheme)
        scale, zero = fit_affine(W, importance, **options)
        return affine_grid(scale, zero, bits=options["bits"], group_size=options["group_size"], sym=options["sym"])

    @override
    def errors_in(self, basis: Tensor, Ws: Sequence[Tensor], scheme: Scheme, importance: Tensor) -> list[Tensor]:
        """As :meth:`QType.errors_in`, fused: no copy of a weight in the basis is made."""
        errors = []
        for W in Ws:
            self.layout(tuple(W.shape), scheme)
            errors.append(affine_errors(W, basis, importance, **_fit_options(tuple(W.shape), scheme)))
        return errors

    @override
    def moved(self, grid: Grid, scale: Tensor, offset: Tensor | None, scheme: Scheme) -> Grid:
        """``grid`` with another ``scale`` and ``offset`` [out, n_groups], rounded to what the file holds: the scale to a number of its
        dtype above zero, the offset to a whole number of them."""
        dtype = DTYPES[scheme.option("scale_dtype")]
        scale = scale.to(dtype).float().clamp_min(TINY[dtype])
        if offset is None:
            return replace(grid, scale=scale)
        zero = (-offset / scale).round_().clamp_(grid.lo, grid.hi)
        return replace(grid, scale=scale, offset=-(scale * zero), parts={**grid.parts, "zero": zero.to(torch.uint8)})

    @override
    def factors(self, grid: Grid, scheme: Scheme) -> Factors:
        """w = scale·q − scale·zero; symmetric codes are signed and have no second term."""
        if grid.offset is None:
            return Factors({"scale": grid.scale}, ((1, ("scale",), True),), ("scale",))
        values = {"scale": grid.scale, "zero": grid.parts["zero"].float()}
        return Factors(values, ((1, ("scale",), True), (-1, ("scale", "zero"), False)), ("scale", "zero"))

    @override
    def stored(self, name: str, values: Tensor, scheme: Scheme) -> Tensor:
        if name == "zero":
            return values.round().clamp_(0, 2 ** scheme.option("bits") - 1)
        dtype = DTYPES[scheme.option("scale_dtype")]
        held = values.to(dtype).float()
        return torch.where((held < TINY[dtype]) | held.isinf(), torch.nan, held)

    @override
    def of_factors(self, grid: Grid, values: Mapping[str, Tensor], scheme: Scheme) -> Grid:
        scale = values["scale"]
        if grid.offset is None:
            return replace(grid, scale=scale)
        zero = values["zero"]
        return replace(grid, scale=scale, offset=-(scale * zero), parts={**grid.parts, "zero": zero.to(torch.uint8)})

    @override
    def pack(self, codes: Tensor, grid: Grid, scheme: Scheme) -> QuantizedTensor:
        """``codes`` [out, in] of ``grid`` as parts, inputs in their natural order.

        With ``desc_act`` the grid's part ``g_idx`` [in] names each input's group; a grid without one has its groups side by side.
        """
        parts = {
            "codes": (codes.to(torch.int16) - grid.lo).to(torch.uint8),
            "scale": grid.scale.to(DTYPES[scheme.option("scale_dtype")]),
            "zero": grid.parts["zero"],
        }
        if scheme.get("desc_act", False):
            natural = torch.arange(codes.shape[1], dtype=torch.int32, device=codes.device) // grid.group_size
            parts["g_idx"] = grid.parts.get("g_idx", natural)
        elif "g_idx" in grid.parts:
            raise RecipeError(f"{scheme}: the grid orders its groups by g_idx, which only a scheme with desc_act stores; set desc_act")
        return QuantizedTensor(scheme, tuple(codes.shape), parts)

    @override
    def unpack(self, tensor: QuantizedTensor) -> Tensor:
        """The weights [out, in] float32 that an engine computes: ``scale.float()·(code − zero)``."""
        codes, scale, zero = (tensor.parts[name] for name in ("codes", "scale", "zero"))
        if "g_idx" in tensor.parts:
            index = tensor.parts["g_idx"].long()
            return scale.float()[:, index] * (codes.to(torch.int16) - zero[:, index]).float()
        grouped = codes.view(codes.shape[0], scale.shape[1], -1).to(torch.int16)
        return (scale.float()[:, :, None] * (grouped - zero[:, :, None]).float()).view(codes.shape)

    @override
    def affine(self, scheme: Scheme) -> Affine:
        half, sym = 2 ** (scheme.option("bits") - 1), bool(scheme.option("sym"))
        lo, hi = (-half, half - 1) if sym else (1 - 2 * half, 2 * half - 1)
        zeros = NO_ZEROS if sym else INTEGER_ZEROS
        return Affine(lo, hi, scheme.option("group_size"), scheme.option("scale_dtype"), bool(scheme.option("desc_act")), zeros)

    @override
    def integers(self, tensor: QuantizedTensor) -> AffineCodes:
        parts = tensor.parts
        codes, zero, groups = parts["codes"].to(torch.int16), parts["zero"].to(torch.int16), parts.get("g_idx")
        of_each = spread(zero, codes.shape[1]) if groups is None else zero[:, groups.long()]
        return AffineCodes(codes - of_each, parts["scale"], None if tensor.scheme.option("sym") else zero, groups)

    @override
    def variants(self, scheme: Scheme) -> Iterator[Scheme]:
        """Finer groups are for formats that know no group of a whole row, more bits for those that know few widths."""
        yield scheme
        for bits in [scheme.option("bits"), *(b for b in (4, 8) if b > scheme.option("bits"))]:
            for size in (scheme.option("group_size"), 128, 64, 32):
                variant = scheme.with_options(bits=bits, group_size=size)
                yield variant
                if variant.option("sym"):
                    yield variant.with_options(sym=False)
                if variant.option("scale_dtype") != "F16":
                    yield variant.with_options(scale_dtype="F16")

    @override
    def holds(self, source: Scheme, target: Scheme, in_features: int) -> str | None:
        have, want = qtypes.of(source.qtype).affine(source), self.affine(target)
        if have is None or have.zeros == FLOAT_ZEROS:
            return None
        if want.desc_act != have.desc_act or (have.desc_act and want.group_size != have.group_size):
            return None
        if not divides(want.group_size, have.group_size, in_features):
            return None
        if want.zeros == INTEGER_ZEROS and have.zeros == NO_ZEROS:
            half = 2 ** (target.option("bits") - 1)  # the zero point of a symmetric grid
            want = replace(want, lo=-half, hi=half - 1)
        if have.lo < want.lo or have.hi > want.hi:
            return None
        return EXACT if want.scale_dtype in WIDER[have.scale_dtype] and not have.is_rounded else CODES

    @override
    def take(self, tensor: QuantizedTensor, target: Scheme) -> QuantizedTensor:
        """The zero point of a symmetric source becomes the middle of the codes."""
        have = qtypes.of(tensor.scheme.qtype).integers(tensor)
        (rows, n_in), bits, size = have.k.shape, target.option("bits"), target.option("group_size")
        n_groups = have.scale.shape[1] if have.g_idx is not None else n_in // (n_in if size == -1 else size)
        scale = spread(stored(have.scale, target.option("scale_dtype")), n_groups)
        zeros = middle(rows, n_groups, bits) if have.zero is None or target.option("sym") else spread(have.zero, n_groups)
        of_each = spread(zeros, n_in) if have.g_idx is None else zeros[:, have.g_idx.long()]
        parts = {"codes": (have.k + of_each).to(torch.uint8), "scale": scale, "zero": zeros.to(torch.uint8)}
        return QuantizedTensor(target, (rows, n_in), parts if have.g_idx is None else {**parts, "g_idx": have.g_idx})


QTYPE = Int()


def _fit_options(shape: tuple[int, ...], scheme: Scheme) -> dict[str, Any]:
    """What :func:`fit_affine` is told."""
    return {
        "bits": scheme.option("bits"),
        "group_size": _group_size(shape, scheme),
        "sym": scheme.option("sym"),
        "search": scheme.option("search") == "mse",
        "scale_dtype": DTYPES[scheme.option("scale_dtype")],
    }


def _group_size(shape: tuple[int, ...], scheme: Scheme) -> int:
    group_size = scheme.option("group_size")
    return shape[1] if group_size == -1 else group_size


def _divisors(in_features: int) -> str:
    """What to do about a group size that does not divide ``in_features``."""
    sizes = ", ".join(str(g) for g in (128, 64, 32) if in_features % g == 0)
    return f"use group_size {sizes} or -1 (one group a row)" if sizes else "use group_size -1 (one group a row) or exclude it"


def _check_options(scheme: Scheme) -> None:
    bits, group_size, search = scheme.option("bits"), scheme.option("group_size"), scheme.get("search", "mse")
    if bits not in BITS:
        raise RecipeError(f"{scheme}: bits is {bits}; expected 2 to 8")
    if not isinstance(group_size, int) or group_size == 0 or group_size < -1:
        raise RecipeError(f"{scheme}: group_size is {group_size}; expected a positive number of inputs, or -1 for a whole row")
    if search not in SEARCHES:
        raise RecipeError(f"{scheme}: search is '{search}'; expected mse or minmax")
    if (held := scheme.option("scale_dtype")) not in SCALE_DTYPES:
        raise RecipeError(f"{scheme}: scale_dtype is '{held}'; expected F16, BF16 or F32")
