"""LLM.int8 rows: eight bits and one scale for each output, as bitsandbytes stores them.

Dettmers, Lewis, Belkada, Zettlemoyer: "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", arXiv 2208.07339, section 2.
The outliers of that paper are the activations': the engine finds them as it runs, and the stored weights know nothing of them. Parts::

    codes  I8  [out, in]   −127 … 127
    scb    F32 [out]       the row's largest magnitude in float16

Weights go through float16 first, whatever their type: with h = float16(w), s = max |h|, code = round(h · (1/s · 127)), to even. The engine
decodes (code · s) · 0.007874015748698502.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from typing_extensions import override

from quantcli.errors import NumericsError, RecipeError
from quantcli.qtypes import Parts, QType
from quantcli.qtypes.shared.affine import Affine, AffineCodes
from quantcli.tensors import Grid, QuantizedTensor, Scheme, TensorSpec

STEP = 7.874015748698502e-3
"""1/127 as bitsandbytes rounds it."""

ELEMENTS_AT_ONCE = 1 << 18
"""What stays near the core on its way from one step to the next."""


class LlmInt8(QType):
    """Signed bytes with one scale for each output."""

    name = "llm_int8"
    engine_act = "llm-int8"

    @override
    def layout(self, shape: tuple[int, ...], scheme: Scheme) -> dict[str, TensorSpec]:
        """The parts of a matrix of ``shape``; any width will do."""
        if len(shape) != 2:
            raise RecipeError(f"{scheme} codes matrices [out, in], got shape {list(shape)}; exclude this tensor")
        return {"codes": TensorSpec.dense("codes", "I8", tuple(shape)), "scb": TensorSpec.dense("scb", "F32", tuple(shape[:1]))}

    @override
    def encode(self, W: Tensor, scheme: Scheme, importance: Tensor | None = None, *, fused: Parts | None = None) -> QuantizedTensor:
        """Bitsandbytes' bytes of ``W`` [out, in] in any float dtype. ``importance`` has no say in them."""
        self.layout(tuple(W.shape), scheme)
        codes = torch.empty(W.shape, dtype=torch.int8, device=W.device)
        scb = torch.empty(W.shape[0], dtype=torch.float32, device=W.device)
        n_rows = max(1, ELEMENTS_AT_ONCE // max(1, W.shape[1]))
        for start in range(0, W.shape[0], n_rows):
            now = slice(start, start + n_rows)
            H = W[now].half()
            scb[now] = row_peaks(H)
            scale = (scb[now].reciprocal() * 127.0).masked_fill_(scb[now] == 0, 0.0)
            codes[now] = H.float().mul_(scale[:, None]).round_()
        return QuantizedTensor(scheme, tuple(W.shape), {"codes": codes, "scb": scb})

    @override
    def fit(self, W: Tensor, scheme: Scheme, importance: Tensor | None = None, *, fused: Parts | None = None) -> Grid:
        """The grid of ``W`` [out, in] float32, one scale a row; a row of zeros has the scale 0."""
        self.layout(tuple(W.shape), scheme)
        scb = row_peaks(W.half())
        return Grid((scb * STEP)[:, None], None, -127, 127, W.shape[1], parts={"scb": scb})

    @override
    def pack(self, codes: Tensor, grid: Grid, scheme: Scheme) -> QuantizedTensor:
        """``codes`` [out, in] of ``grid`` as parts."""
        return QuantizedTensor(scheme, tuple(codes.shape), {"codes": codes.to(torch.int8), "scb": grid.parts["scb"]})

    @override
    def unpack(self, tensor: QuantizedTensor) -> Tensor:
        """The weights [out, in] float32 that an engine computes. Within an ulp of the grid's: bitsandbytes multiplies in another order."""
        return tensor.parts["codes"] * tensor.parts["scb"][:, None] * STEP

    @override
    def affine(self, scheme: Scheme) -> Affine:
        """127 times its scale is stored."""
        return Affine(-128, 127, -1, "F32", is_rounded=True)

    @override
    def integers(self, tensor: QuantizedTensor) -> AffineCodes:
        return AffineCodes(tensor.parts["codes"].to(torch.int16), (tensor.parts["scb"] / 127)[:, None])

    @override
    def variants(self, scheme: Scheme) -> Iterator[Scheme]:
        yield scheme
        yield Scheme.parse("int8-channel-sym-sf32")


QTYPE = LlmInt8()


def row_peaks(H: Tensor) -> Tensor:
    """Each row's largest magnitude [rows] float32 of ``H`` [rows, in] float16; :class:`NumericsError` when that is not finite."""
    peaks = H.abs().amax(1).float()
    if not bool(peaks.isfinite().all()):
        raise NumericsError("a weight is NaN, Inf or beyond 65504, and LLM.int8 goes through float16; keep this tensor in its own dtype")
    return peaks
