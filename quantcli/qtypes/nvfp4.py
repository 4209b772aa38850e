"""NVFP4: E2M1 with an E4M3 scale for each 16 inputs and one float32 for the matrix, 4.5 bpw: ``w ≈ scale/global_scale·level``.

NVIDIA, "Pretraining Large Language Models with NVFP4", arXiv 2509.25149. Levels are 0 ½ 1 1½ 2 3 4 6 and their negatives.
Parts of one weight matrix [out, in], with the global scale as compressed-tensors means it::

    packed        U8      [out, in/2]    the even input in the low four bits
    scale         F8_E4M3 [out, in/16]
    global_scale  F32     [1]            448 · 6 / absmax of all matrices that an engine joins (:func:`fused`)

Option ``search``: "minmax" is the scale absmax / 6, compressed-tensors' bytes; "mse", the default, tries scales around it (Cook et al.,
"Four Over Six", arXiv 2512.02010, try one more) and takes the one of the least Σ importance·(w − ŵ)². Engines decode either.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from quantcli.ops.minifloat import FLOAT8, FP4_LARGEST, FP4_LEVELS, ZERO_GROUP_BYTE, dequantize_fp4, fit_fp4, group_step, quantize_fp4
from quantcli.qtypes import Parts, QType
from quantcli.qtypes.shared.minifloat import check_matrix, check_search, finite_absmax, fp4_book, fp4_packed
from quantcli.tensors import Factors, Grid, QuantizedTensor, Scheme, TensorSpec, check_divisible

GROUP = 16


class Nvfp4(QType):
    """E2M1 with an E4M3 scale for each 16 inputs and one float32 for the matrix."""

    name = "nvfp4"
    options: ClassVar[Mapping[str, Any]] = {"search": "mse", "act": ""}

    @override
    def layout(self, shape: tuple[int, ...], scheme: Scheme) -> dict[str, TensorSpec]:
        """The parts of a matrix of ``shape``; :class:`RecipeError` unless rows are whole groups."""
        check_matrix(shape, scheme)
        check_search(scheme)
        check_divisible(shape, GROUP, scheme, "use fp8-channel or exclude it")
        return {
            "packed": TensorSpec.dense("packed", "U8", (shape[0], shape[1] // 2)),
            "scale": TensorSpec.dense("scale", "F8_E4M3", (shape[0], shape[1] // GROUP)),
            "global_scale": TensorSpec.dense("global_scale", "F32", (1,)),
        }

    @override
    def fused(self, Ws: Sequence[Tensor], scheme: Scheme) -> dict[str, Tensor]:
        """The global scale that the matrices ``Ws`` share, because an engine joins them: it lets the largest weight of all be 6 · 448."""
        return {"global_scale": _global_scale(torch.stack([finite_absmax(W, (1, GROUP)).amax() for W in Ws]).amax())}

    @override
    def fit(self, W: Tensor, scheme: Scheme, importance: Tensor | None = None, *, fused: Parts | None = None) -> Grid:
        """The grid of ``W`` [out, in] float32; ``importance`` [in] weighs the search, None weighs all inputs alike."""
        parts, step = _scales(W, scheme, importance, fused)
        return Grid(step, None, 0, 2 * len(FP4_LEVELS) - 2, GROUP, book=fp4_book(W.device), parts=parts)

    @override
    def factors(self, grid: Grid, scheme: Scheme) -> Factors:
        """w = (scale/global_scale)·level; the scales of groups move, the matrix's own is shared with others."""
        values = {"scale": grid.parts["scale"].float(), "step": (1 / grid.parts["global_scale"]).expand(len(grid.scale), 1)}
        return Factors(values, ((1, ("scale", "step"), True),), ("scale",))

    @override
    def stored(self, name: str, values: Tensor, scheme: Scheme) -> Tensor:
        held = values.clamp(max=FLOAT8["e4m3"].largest).to(torch.float8_e4m3fn).float()
        return torch.where(held > 0, held, torch.nan)

    @override
    def of_factors(self, grid: Grid, values: Mapping[str, Tensor], scheme: Scheme) -> Grid:
        parts = {**grid.parts, "scale": values["scale"].to(torch.float8_e4m3fn)}
        return replace(grid, scale=_step(parts["scale"], parts["global_scale"]), parts=parts)

    @override
    def pack(self, codes: Tensor, grid: Grid, scheme: Scheme) -> QuantizedTensor:
        """``codes`` [out, in] of ``grid`` as parts."""
        return QuantizedTensor(scheme, tuple(codes.shape), {"packed": fp4_packed(codes), **grid.parts})

    @override
    def unpack(self, tensor: QuantizedTensor) -> Tensor:
        """The weights [out, in] float32 that an engine computes: ``level·(scale/global_scale)``."""
        return dequantize_fp4(tensor.parts["packed"], _step(tensor.parts["scale"], tensor.parts["global_scale"]))

    @override
    def encode(self, W: Tensor, scheme: Scheme, importance: Tensor | None = None, *, fused: Parts | None = None) -> QuantizedTensor:
        """``W`` [out, in] in any float dtype: ties go to even, which a :class:`Grid` does not know."""
        parts, step = _scales(W, scheme, importance, fused)
        return QuantizedTensor(scheme, tuple(W.shape), {"packed": quantize_fp4(W, step), **parts})

    @override
    def relatives(self, scheme: Scheme) -> Iterator[Scheme]:
        yield Scheme.of("ggml_nvfp4", scaled=True)


QTYPE = Nvfp4()


def _scales(W: Tensor, scheme: Scheme, importance: Tensor | None, fused: Parts | None) -> tuple[dict[str, Tensor], Tensor]:
    """The parts ``scale`` and ``global_scale``, and what a level of 1 is worth in each group: [out, in/16] float32."""
    QTYPE.layout(tuple(W.shape), scheme)
    absmax = finite_absmax(W, (1, GROUP))
    global_scale = fused["global_scale"].to(W.device) if fused else _global_scale(absmax.amax())
    # In this order, as in compressed-tensors.
    scale = (global_scale * (absmax / FP4_LARGEST)).clamp_(max=FLOAT8["e4m3"].largest).to(torch.float8_e4m3fn).view(torch.uint8)
    scale = torch.where(scale == 0, ZERO_GROUP_BYTE, scale)
    if check_search(scheme):
        scale = fit_fp4(W, scale, "nvfp4", float(global_scale), importance)
    parts = {"scale": scale.view(torch.float8_e4m3fn), "global_scale": global_scale}
    return parts, _step(parts["scale"], global_scale)


def _step(scale: Tensor, global_scale: Tensor) -> Tensor:
    return group_step(scale.view(torch.uint8), "nvfp4", float(global_scale))


def _global_scale(absmax: Tensor) -> Tensor:
    """448 · 6 / ``absmax`` of a matrix, or 1 where that is beyond float32: F32 [1]."""
    scale = FLOAT8["e4m3"].largest * FP4_LARGEST / absmax.clamp(min=torch.finfo(torch.float32).tiny)
    return torch.where(scale.isfinite(), scale, 1.0).view(1)
