"""What ggml's block types share as qtypes: sizes, the grid of a matrix, and ggml's own bytes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from typing_extensions import override

from quantcli import qtypes
from quantcli.errors import NumericsError, RecipeError
from quantcli.ops.block_codecs import KINDS
from quantcli.ops.blocks import Params, dequantize_blocks, fit_blocks, pack_blocks, quantize_blocks, unpack_blocks
from quantcli.ops.minifloat import unpack_fp4
from quantcli.ops.runs import UNIT, codec_of, nearest_runs
from quantcli.qtypes import Parts, QType
from quantcli.qtypes.shared.affine import CODES, EXACT, FLOAT_ZEROS, NO_ZEROS, Affine, AffineCodes, divides, spread, stored
from quantcli.tensors import Factors, Grid, QuantizedTensor, Scheme, TensorSpec, check_divisible


def effective(params: Params, kind: str) -> tuple[Tensor, Tensor | None]:
    """Scale and offset of every sub-block, [out, n_sub] float32, as ggml's dequantizer computes them: w = scale·q + offset."""
    sizes = KINDS[kind]
    if sizes.scale_of is not None:
        return sizes.scale_of(params["scale"].int()), None

    def of_block(name: str) -> Tensor:
        return params[name].float().repeat_interleave(sizes.block // sizes.sub, 1)

    scale = of_block("d") * params["scale"].float() if "scale" in params else of_block("d")
    if "min" in params:
        return scale, -(of_block("dmin") * params["min"].float())
    return scale, of_block("m") if "m" in params else None


@dataclass(frozen=True, slots=True)
class BlockType(QType):
    """One of ggml's block types, by its name in ``ops``, with one part ``blocks`` U8 [out, row_bytes]."""

    name: str

    @override
    def layout(self, shape: tuple[int, ...], scheme: Scheme) -> dict[str, TensorSpec]:
        """The part ``blocks`` of a matrix of ``shape``, or of a stack of them [..., out, in]; :class:`RecipeError` unless rows are whole
        blocks."""
        if len(shape) < 2:
            raise RecipeError(f"{scheme} codes matrices [out, in], got shape {list(shape)}; exclude this tensor")
        sizes = KINDS[self.name]
        hint = "use F16 or exclude it" if sizes.block == 32 else "use Q8_0 (block 32) or exclude it"
        check_divisible(shape, sizes.block, scheme, hint)
        return {"blocks": TensorSpec.dense("blocks", "U8", (math.prod(shape[:-1]), shape[-1] // sizes.block * sizes.n_bytes))}

    @override
    def fit(self, W: Tensor, scheme: Scheme, importance: Tensor | None = None, *, fused: Parts | None = None) -> Grid:
        """The grid that ggml's search finds for ``W`` [out, in]; ``importance`` [in] weighs it as llama.cpp's imatrix does."""
        self.layout(tuple(W.shape), scheme)
        sizes = KINDS[self.name]
        params = fit_blocks(W, self.name, importance)
        self._check_finite(W, *(params[name] for name in ("d", "dmin", "m") if name in params))
        self._check_range(W)
        scale, offset = effective(params, self.name)
        if (book := self._book()) is None:
            return Grid(scale, offset, sizes.lo, sizes.hi, sizes.sub, parts=params)
        return Grid(scale, offset, 0, len(book) - 1, sizes.sub, book=torch.tensor(book, device=W.device), parts=params)

    def _book(self) -> list[float] | None:
        """The levels in ascending order, each once; None where codes are integers."""
        levels = KINDS[self.name].levels
        return None if levels is None else sorted(set(levels))

    @override
    def factors(self, grid: Grid, scheme: Scheme) -> Factors | None:
        """w = d·scale·q − dmin·min, or d·q + m: what of it the type stores. A type whose scales are floats of a byte has none."""
        if "d" not in grid.parts:
            return None
        names = [name for name in ("scale", "min", "d", "dmin", "m") if name in grid.parts]
        terms: list[tuple[float, tuple[str, ...], bool]] = [(1, tuple(name for name in ("d", "scale") if name in names), True)]
        terms += [(-1, ("dmin", "min"), False)] if "min" in names else []
        terms += [(1, ("m",), False)] if "m" in names else []
        return Factors({name: grid.parts[name].float() for name in names}, tuple(terms), tuple(names))

    @override
    def stored(self, name: str, values: Tensor, scheme: Scheme) -> Tensor:
        """Halves, but for the integers that scale sub-blocks. A half that would be 0 or infinite is NaN: no such step is taken."""
        if name in ("scale", "min"):
            return values.round().clamp_(*KINDS[self.name].scale_range)
        half = values.to(torch.float16).float()
        return half if name == "m" else torch.where((half == 0) | half.isinf(), torch.nan, half)

    @override
    def of_factors(self, grid: Grid, values: Mapping[str, Tensor], scheme: Scheme) -> Grid:
        parts = {name: part if name not in values else values[name].to(part.dtype) for name, part in grid.parts.items()}
        scale, offset = effective(parts, self.name)
        return replace(grid, scale=scale, offset=offset, parts=parts)

    @override
    def pack(self, codes: Tensor, grid: Grid, scheme: Scheme) -> QuantizedTensor:
        """``codes`` [out, in] of ``grid`` as ggml's blocks."""
        levels, book = KINDS[self.name].levels, self._book()
        if levels is not None and book is not None:
            stored = torch.tensor([levels.index(level) for level in book], dtype=torch.int8, device=codes.device)
            codes = stored[codes.long()]
        blocks = pack_blocks(codes.to(torch.int8), dict(grid.parts), self.name)
        return QuantizedTensor(scheme, tuple(codes.shape), {"blocks": blocks})

    @override
    def unpack(self, tensor: QuantizedTensor) -> Tensor:
        """The weights [..., out, in] float32 that ggml's dequantizer computes."""
        return dequantize_blocks(tensor.parts["blocks"], self.name, tensor.shape[-1]).view(tensor.shape)

    @override
    def encode(self, W: Tensor, scheme: Scheme, importance: Tensor | None = None, *, fused: Parts | None = None) -> QuantizedTensor:
        """``W`` [..., out, in], any float dtype, as the very bytes of ``ggml_quantize_chunk``: not always the grid's nearest codes.

        ``importance``: [in], or [n, in] of a stack of n.
        """
        self.layout(tuple(W.shape), scheme)
        if importance is None and KINDS[self.name].needs_importance:
            raise RecipeError(f"{self.name} needs importance: quantize with statistics of what this tensor reads, or use iq3_xxs")
        if importance is not None and importance.ndim > 1:  # a row for each matrix of a stack
            blocks = torch.cat([quantize_blocks(V, self.name, row) for V, row in zip(W, importance, strict=True)])
        else:
            blocks = quantize_blocks(W.flatten(0, -2), self.name, importance)
        self._check_finite(W, self._halves(blocks))
        self._check_range(W)
        return QuantizedTensor(scheme, tuple(W.shape), {"blocks": blocks})

    def _halves(self, blocks: Tensor) -> Tensor:
        """``d`` of each block, and ``dmin`` or ``m``, which follow it."""
        sizes = KINDS[self.name]
        if sizes.d_at is None:
            return blocks.new_empty(0, dtype=torch.float16)
        first = sizes.d_at // 2
        n_halves = 1 + (sizes.has_min or sizes.has_offset)
        return blocks.view(-1, sizes.n_bytes).view(torch.float16)[:, first : first + n_halves]  # n_bytes is even

    def _check_range(self, W: Tensor) -> None:
        """Of a type without a ``d``, whose largest scale is what its bits can say."""
        sizes = KINDS[self.name]
        if sizes.scale_of is None or sizes.levels is None:
            return
        self._check_weights(W)
        largest = float(W.float().abs().max())
        limit = max(sizes.levels) * float(sizes.scale_of(torch.arange(255)).max())
        if largest > limit:
            raise NumericsError(f"{self.name} holds numbers up to {limit:.4g} (largest |w| is {largest:.3g}); keep this tensor in BF16")

    def _check_weights(self, W: Tensor) -> None:
        """Of weights that are no numbers, a type that holds larger ones would make no better file."""
        if not bool(W.isfinite().all()):
            raise NumericsError("the weights have NaN or Inf; check the source checkpoint, or take another revision of it")

    def _check_finite(self, W: Tensor, *halves: Tensor) -> None:
        if all(bool(half.isfinite().all()) for half in halves):
            return
        self._check_weights(W)
        largest = float(W.float().abs().max())
        raise NumericsError(
            f"a scale or offset of {self.name} does not fit float16 (largest |w| is {largest:.3g}); keep this tensor in F32 or BF16"
        )


class SignedType(BlockType):
    """A block type ``w = d·k``: a float16 scale for each block of signed integers."""

    takes_groups = True

    @override
    def affine(self, scheme: Scheme) -> Affine:
        hi = KINDS[self.name].hi
        return Affine(-hi - 1, hi, KINDS[self.name].block, "F16")

    @override
    def integers(self, tensor: QuantizedTensor) -> AffineCodes:
        codes, params = unpack_blocks(tensor.parts["blocks"], self.name, tensor.shape[-1])
        return AffineCodes(codes.to(torch.int16), params["d"])

    @override
    def holds(self, source: Scheme, target: Scheme, in_features: int) -> str | None:
        have, want = qtypes.of(source.qtype).affine(source), self.affine(target)
        if have is None or have.desc_act or have.zeros == FLOAT_ZEROS or not divides(want.group_size, have.group_size, in_features):
            return None
        if have.lo < want.lo or have.hi > want.hi:
            return None
        return EXACT if have.scale_dtype == "F16" else CODES

    @override
    def take(self, tensor: QuantizedTensor, target: Scheme) -> QuantizedTensor:
        have = qtypes.of(tensor.scheme.qtype).integers(tensor)
        return _blocks(have.k, {"d": have.scale}, target)


class OffsetType(BlockType):
    """A block type ``w = d·q + m`` that stores the scale and the offset of each block as they are."""

    takes_groups = True

    @override
    def holds(self, source: Scheme, target: Scheme, in_features: int) -> str | None:
        have, block = qtypes.of(source.qtype).affine(source), KINDS[self.name].block
        if have is None or have.desc_act or have.zeros == NO_ZEROS or not divides(block, have.group_size, in_features):
            return None
        if have.zeros == FLOAT_ZEROS and in_features % have.group_size:  # groups that run over the end of a row
            return None
        return CODES if have.hi <= KINDS[self.name].hi else None

    @override
    def take(self, tensor: QuantizedTensor, target: Scheme) -> QuantizedTensor:
        """The zero point goes into the minimum: m = −scale·zero."""
        have = qtypes.of(tensor.scheme.qtype).integers(tensor)
        assert have.zero is not None
        codes = have.k if have.zero.is_floating_point() else have.k + spread(have.zero, have.k.shape[1])
        return _blocks(codes, {"d": have.scale, "m": -(have.scale.float() * have.zero.float())}, target)

    @override
    def moved(self, grid: Grid, scale: Tensor, offset: Tensor | None, scheme: Scheme) -> Grid:
        """``grid`` with another ``scale`` and ``offset`` [out, n_sub], rounded to float16."""
        d = scale.to(torch.float16)
        m = torch.zeros_like(d) if offset is None else offset.to(torch.float16)
        self._check_finite(scale, d, m)
        return Grid(d.float(), m.float(), grid.lo, grid.hi, grid.group_size, parts={"d": d, "m": m})


def _blocks(codes: Tensor, params: Mapping[str, Tensor], target: Scheme) -> QuantizedTensor:
    """Blocks of ``codes`` [out, in]; ``params`` [out, n_groups] are repeated in the blocks of a group."""
    n_blocks = codes.shape[1] // KINDS[target.qtype].block
    of_each = {name: spread(stored(param, "F16"), n_blocks) for name, param in params.items()}
    blocks = pack_blocks(codes.to(torch.int8).contiguous(), of_each, target.qtype)
    return QuantizedTensor(target, tuple(codes.shape), {"blocks": blocks})


class Mxfp4Type(BlockType):
    """The numbers of ``mxfp4`` in ggml's blocks: the same 4 bits and the same exponents."""

    @override
    def relatives(self, scheme: Scheme) -> Iterator[Scheme]:
        yield Scheme.parse("mxfp4")

    @override
    def holds(self, source: Scheme, target: Scheme, in_features: int) -> str | None:
        return EXACT if source.qtype == "mxfp4" else None

    @override
    def take(self, tensor: QuantizedTensor, target: Scheme) -> QuantizedTensor:
        codes = unpack_fp4(tensor.parts["packed"]).to(torch.int8)
        blocks = pack_blocks(codes, {"scale": tensor.parts["scale"]}, self.name)
        return QuantizedTensor(target, tensor.shape, {"blocks": blocks})


class BookType(BlockType):
    """A block type whose magnitudes are points of a code book, several weights at once: it has no grid for one weight."""

    @property
    @override
    def no_grid(self) -> str:
        """Why a pass that moves a grid before codes are chosen cannot use this type, and what to do."""
        run = 8 if self.name.startswith("iq2") else 4
        return f"{self.name} takes {run} weights at once from a code book, so scales cannot be moved beforehand; use rtn, gptq or a k-quant"

    @property
    @override
    def needs_importance(self) -> bool:
        """Whether :meth:`encode` refuses to do without."""
        return KINDS[self.name].needs_importance

    @property
    @override
    def run(self) -> int:
        """Weights whose signs, and so whose points, are chosen together."""
        return UNIT

    @override
    def nearest(self, T: Tensor, H: Tensor, scale: Tensor) -> Tensor:
        return nearest_runs(T, H, scale, self.name)

    @override
    def chosen(self, tensor: QuantizedTensor) -> tuple[Tensor, Grid]:
        """A code is a magnitude with its sign, and a scale what a magnitude of 1 is worth."""
        codes, params = unpack_blocks(tensor.parts["blocks"], self.name, tensor.shape[-1])
        return codes, self._grid(params)

    def _grid(self, params: Params) -> Grid:
        sizes = KINDS[self.name]
        d = params["d"].float().repeat_interleave(sizes.block // sizes.sub, 1)
        return Grid(codec_of(self.name).steps(d, params["scale"].float()), None, sizes.lo, sizes.hi, sizes.sub, parts=params)

    @override
    def factors(self, grid: Grid, scheme: Scheme) -> Factors | None:
        """w = d·(a + b·scale)·code."""
        one = torch.ones(())
        a = float(codec_of(self.name).steps(one, one * 0))
        b = float(codec_of(self.name).steps(one, one)) - a
        values = {name: grid.parts[name].float() for name in ("scale", "d")}
        return Factors(values, ((b, ("d", "scale"), True), (a, ("d",), True)), ("scale", "d"))

    @override
    def of_factors(self, grid: Grid, values: Mapping[str, Tensor], scheme: Scheme) -> Grid:
        return self._grid({name: values[name].to(part.dtype) for name, part in grid.parts.items()})

    @override
    def fit(self, W: Tensor, scheme: Scheme, importance: Tensor | None = None, *, fused: Parts | None = None) -> Grid:
        """Raises :class:`RecipeError`: there is no such grid."""
        raise RecipeError(self.no_grid)
