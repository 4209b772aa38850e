"""The nouns: TensorSpec, Scheme, Grid, QuantizedTensor, Stats, Layer, Report."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from quantcli.errors import RecipeError
from quantcli.registry import find, names

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Safetensors' dtype words and their torch types."""

DTYPE_NAMES: dict[torch.dtype, str] = {v: k for k, v in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor as a header describes it. ``dtype`` is safetensors' word (F32, BF16, I32, …) or ggml's type name (Q4_K, …)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @classmethod
    def dense(cls, name: str, dtype: str, shape: tuple[int, ...]) -> TensorSpec:
        """A spec of a plain dtype, its size following from its shape."""
        return cls(name, dtype, tuple(shape), math.prod(shape) * DTYPES[dtype].itemsize)

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Scheme:
    """A qtype and its options: ``Scheme.of("int", bits=4, group_size=128, sym=True)`` prints as ``int4-g128-sym``.

    Further words: ``channel`` (one group a row), ``desc`` (groups along the solving order, GPTQ's desc_act), ``minmax`` (no scale search).
    """

    qtype: str
    options: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, qtype: str, **options: Any) -> Scheme:
        return cls(qtype, tuple(sorted(options.items())))

    @classmethod
    def parse(cls, text: str) -> Scheme:
        """The scheme that ``text`` names: ``q4_k``, ``bf16``, ``int4-g128-sym``, ``int8-channel-asym``."""
        head, *words = text.strip().lower().split("-")
        options: dict[str, Any] = {}
        known = names("qtypes")
        if head not in known:
            match = re.fullmatch(r"([a-z]+)(\d+)", head)
            if not match or match[1] not in known:
                raise RecipeError(f"'{text}' names no number format; there are: {', '.join(known)}")
            head, options["bits"] = match[1], int(match[2])
        for word in words:
            if word in ("sym", "asym"):
                options["sym"] = word == "sym"
            elif word == "channel":
                options["group_size"] = -1
            elif word == "desc":
                options["desc_act"] = True
            elif word == "minmax":
                options["search"] = "minmax"
            elif match := re.fullmatch(r"g(\d+)", word):
                options["group_size"] = int(match[1])
            else:
                raise RecipeError(f"'{word}' in scheme '{text}' is none of g<N>, channel, sym, asym, desc, minmax")
        return cls.of(head, **{**find("qtypes", head).OPTIONS, **options})

    def get(self, key: str, default: Any = None) -> Any:
        return dict(self.options).get(key, default)

    def with_options(self, **options: Any) -> Scheme:
        """The same qtype with ``options`` replaced."""
        return Scheme.of(self.qtype, **{**dict(self.options), **options})

    def __str__(self) -> str:
        text = f"{self.qtype}{self.get('bits', '')}"
        if (group_size := self.get("group_size")) is not None:
            text += "-channel" if group_size == -1 else f"-g{group_size}"
        if (sym := self.get("sym")) is not None:
            text += "-sym" if sym else "-asym"
        if self.get("desc_act"):
            text += "-desc"
        return text + ("-minmax" if self.get("search") == "minmax" else "")


@dataclass(frozen=True, slots=True)
class Grid:
    """What a scheme allows one weight matrix: ``w ≈ scale·q + offset``, or ``w ≈ scale·book[q]`` with a code book.

    ``scale``: [out, n_groups] float32, already rounded to what the file can hold; ``offset``: the same shape, or None for zero.
    Group ``j`` covers inputs ``j·group_size … (j+1)·group_size``. Codes are integers ``lo … hi``, or indices into ``book``.
    ``parts`` carries what ``pack`` needs beside the codes (zero points, super-block scales), under the qtype's own names.
    """

    scale: Tensor
    offset: Tensor | None
    lo: int
    hi: int
    group_size: int
    book: Tensor | None = None
    parts: Mapping[str, Tensor] = field(default_factory=dict)

    def columns(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale and offset of the inputs in ``index`` [k]: two [out, k] float32."""
        group = index.to(self.scale.device) // self.group_size
        return self.scale[:, group], None if self.offset is None else self.offset[:, group]

    def encode(self, W: Tensor) -> Tensor:
        """Nearest codes of ``W``: [out, in] float32. Returns [out, in] int8 (uint8 where ``hi`` > 127)."""
        V = W.view(W.shape[0], -1, self.group_size)
        scale = self.scale[:, :, None]
        V = V if self.offset is None else V - self.offset[:, :, None]
        V = torch.where(scale == 0, 0.0, V / scale)
        codes = V.round_().clamp_(self.lo, self.hi) if self.book is None else torch.bucketize(V, (self.book[1:] + self.book[:-1]) / 2)
        return codes.to(torch.uint8 if self.hi > 127 else torch.int8).view(W.shape)

    def decode(self, codes: Tensor) -> Tensor:
        """Weights of ``codes`` [out, in] as float32 of the same shape."""
        values = codes.float() if self.book is None else self.book[codes.long()]
        W = values.view(codes.shape[0], -1, self.group_size) * self.scale[:, :, None]
        return (W if self.offset is None else W + self.offset[:, :, None]).view(codes.shape)


@dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """One weight matrix in a scheme: ``parts`` by the names that ``qtype.layout`` gives them."""

    scheme: Scheme
    shape: tuple[int, ...]
    parts: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Stats:
    """What a tap's inputs X [n_tokens, in] were like, all per token and in float32 or better.

    ``H``: [in, in] mean of x·xᵀ, or None when only diagonals were gathered; ``importance``: [in] mean of x²;
    ``absmax``: [in]; ``mean``: [in].
    """

    importance: Tensor
    absmax: Tensor
    mean: Tensor
    n_tokens: int
    H: Tensor | None = None


@dataclass(slots=True)
class Layer:
    """The unit of work, and the one mutable noun: a pass reads ``tensors`` and ``schemes`` and fills ``quantized``.

    ``tensors``: dense weights by their name on disk; ``schemes``: the ones to be coded; ``taps``: tensor name → tap.
    """

    name: str
    tensors: dict[str, Tensor]
    schemes: dict[str, Scheme]
    taps: dict[str, str] = field(default_factory=dict)
    quantized: dict[str, QuantizedTensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TensorReport:
    """What a pass did to one tensor. ``relative_error``: ‖(W−Ŵ)X‖² / ‖WX‖² by H, or ‖W−Ŵ‖² / ‖W‖² without one."""

    name: str
    relative_error: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Report:
    """What a pass did to a layer; ``notes`` are for the user (dead columns, raised damping)."""

    tensors: tuple[TensorReport, ...]


def relative_error(W: Tensor, W_hat: Tensor, H: Tensor | None = None) -> float:
    """‖(W−Ŵ)X‖² / ‖WX‖² taken from ``H`` [in, in] (mean x·xᵀ); without it ‖W−Ŵ‖² / ‖W‖². Weights [out, in]."""
    E = W - W_hat
    if H is None:
        error, total = E.square().sum(), W.square().sum()
    else:
        error, total = ((E @ H) * E).sum(), ((W @ H) * W).sum()
    return float(error / total) if total > 0 else float(error > 0)


def check_divisible(shape: tuple[int, ...], block: int, scheme: Scheme, hint: str) -> None:
    """Raise :class:`RecipeError` unless the last dimension of ``shape`` is a multiple of ``block``. The caller knows the tensor's name."""
    if not shape or shape[-1] % block:
        got = shape[-1] if shape else "a scalar"
        raise RecipeError(f"in_features {got} is not a multiple of the {scheme} block {block}; {hint}")
