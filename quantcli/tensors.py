"""The types that everything shares: TensorSpec, Scheme, Grid, QuantizedTensor, Stats, Absorber, KvCache, Layer, Report."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

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
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Safetensors' dtype names and their torch types."""
if hasattr(torch, "float8_e8m0fnu"):  # since torch 2.7
    DTYPES["F8_E8M0"] = torch.float8_e8m0fnu

DTYPE_NAMES: dict[torch.dtype, str] = {v: k for k, v in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor as a header describes it. ``dtype`` is safetensors' name (F32, BF16, I32, …) or ggml's type name (Q4_K, …)."""

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


NAMED: dict[str, tuple[tuple[str, Any], ...]] = {
    "channel": (("group_size", -1), ("strategy", "channel")),
    "tensor": (("strategy", "tensor"),),
    "block": (("strategy", "block"),),
    "sym": (("sym", True),),
    "asym": (("sym", False),),
    "desc": (("desc_act", True),),
    "minmax": (("search", "minmax"),),
    "dq": (("double_quant", True),),
    "scaled": (("scaled", True),),
    "e4m3": (("dtype", "e4m3"),),
    "e5m2": (("dtype", "e5m2"),),
    "sf16": (("scale_dtype", "F16"),),
    "sbf16": (("scale_dtype", "BF16"),),
    "sf32": (("scale_dtype", "F32"),),
}
"""Parts of a scheme's name → the options of which they set the first that the qtype has."""

NUMBERED = {"g": "group_size", "b": "block_size"}
"""Letters before a number in a scheme's name → the option that the number sets."""

ALWAYS_NAMED = ("group_size", "block_size", "strategy", "sym")
"""Options that a scheme's name shows even when they have the qtype's default value."""

KEEP = "keep"
"""Stands in place of a scheme for a tensor that stays as it is."""

ACTIVATIONS = ("int8-token", "fp8-token", "int8-tensor", "fp8-tensor", "fp8-g128", "mxfp4-g32", "mxfp8-g32", "nvfp4-g16")
"""How an engine may quantize what a linear reads: each token for itself, groups of it, or by one scale found beforehand (``-tensor``)."""


HEAD = "lm_head"
"""The tap of the output embedding, whatever its module is called."""

KV_CACHES = ("fp8", "int8", "fp8-head", "int8-head")
"""How an engine may store keys and values: in E4M3 or in 8-bit integers, by one scale for a layer's keys and one for its values, or
(``-head``) by one for each head."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """A qtype and its options: ``Scheme.of("int", bits=4, group_size=128, sym=True)`` prints as ``int4-g128-sym``.

    The parts of a name are those of :data:`NAMED` and :data:`NUMBERED`; ``+int8-token`` after them means that the engine quantizes the
    linear's input too (:data:`ACTIVATIONS`): option ``act``.
    """

    qtype: str
    options: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, qtype: str, **options: Any) -> Scheme:
        return cls(qtype, tuple(sorted(options.items())))

    @classmethod
    def parse(cls, text: str) -> Scheme:
        """The scheme that ``text`` names: ``q4_k``, ``bf16``, ``int4-g128-sym``, ``nf4-b64-dq``, ``int8-channel-sym+int8-token``."""
        name, _, act = text.strip().lower().partition("+")
        head, *parts = name.split("-")
        options: dict[str, Any] = {}
        known = names("qtypes")
        if head not in known:
            match = re.fullmatch(r"([a-z]+)(\d+)", head)
            if not match or match[1] not in known:
                raise RecipeError(f"'{text}' names no number format; known are: {', '.join(known)}")
            head, options["bits"] = match[1], int(match[2])
        defaults = options_of(head)
        for part in parts:
            option, value = option_of(part, defaults, text)
            options[option] = value
        if act:
            check_activations(act, defaults, text)
            options["act"] = act
        return cls.of(head, **{**defaults, **options})

    def get(self, key: str, default: Any = None) -> Any:
        return dict(self.options).get(key, default)

    def option(self, key: str) -> Any:
        """The option ``key``, or the qtype's default for it."""
        return self.get(key, options_of(self.qtype)[key])

    def with_options(self, **options: Any) -> Scheme:
        """The same qtype with ``options`` replaced."""
        return Scheme.of(self.qtype, **{**dict(self.options), **options})

    @property
    def static_activations(self) -> bool:
        """Whether a scale of the input is found beforehand and stored, as the part ``input_scale`` F32 [1]."""
        return str(self.get("act", "")).endswith("-tensor") or self.get("act") == "nvfp4-g16"

    @override
    def __str__(self) -> str:
        options = dict(self.options)
        text = f"{self.qtype}{options.get('bits', '')}"
        defaults = options_of(self.qtype) if self.qtype in names("qtypes") else {}
        shown = {key for key in options if key in ALWAYS_NAMED or options[key] != defaults.get(key)}
        for letter, option in NUMBERED.items():
            if option in shown and options[option] != -1:
                text += f"-{letter}{options[option]}"
        for part, meanings in NAMED.items():
            if any(option in shown and options[option] == value for option, value in meanings):
                text += f"-{part}"
        return text + (f"+{options['act']}" if options.get("act") else "")


def options_of(qtype: str) -> Mapping[str, Any]:
    """The options of ``qtype`` and their defaults. It is looked up by name, because number formats import these nouns."""
    options: Mapping[str, Any] = find("qtypes", qtype).QTYPE.options
    return options


def option_of(part: str, defaults: Mapping[str, Any], text: str) -> tuple[str, Any]:
    """The option that ``part`` of the scheme ``text`` sets, and its value; :class:`RecipeError` where the qtype has no such option."""
    if (match := re.fullmatch(r"([a-z])(\d+)", part)) and NUMBERED.get(match[1]) in defaults:
        return NUMBERED[match[1]], int(match[2])
    for option, value in NAMED.get(part, ()):
        if option in defaults:
            return option, value
    numbered = [f"{letter}<N>" for letter, option in NUMBERED.items() if option in defaults]
    known = numbered + [name for name, meanings in NAMED.items() if any(option in defaults for option, _ in meanings)]
    raise RecipeError(
        f"'{part}' in scheme '{text}' is none of {', '.join(known)}" if known else f"'{text}': this number format has no options"
    )


def check_activations(act: str, defaults: Mapping[str, Any], text: str) -> None:
    """Raise :class:`RecipeError` unless ``act`` names a way to quantize a linear's input and the qtype allows for one."""
    if "act" not in defaults:
        raise RecipeError(f"'{text}': this number format takes unquantized activations only; leave '+{act}' out")
    if act not in ACTIVATIONS:
        raise RecipeError(f"'+{act}' in scheme '{text}' is none of {', '.join('+' + known for known in ACTIVATIONS)}")


@dataclass(frozen=True, slots=True)
class Grid:
    """What a scheme allows one weight matrix: ``w ≈ scale·q + offset``, or ``w ≈ scale·book[q]`` with a code book.

    ``scale``: [out, n_groups] float32, already rounded to what the file can hold; ``offset``: the same shape, or None for zero.
    Group ``j`` covers inputs ``j·group_size … (j+1)·group_size``. Codes are integers ``lo … hi``, or indices into ``book``.
    ``parts`` holds what ``pack`` needs besides the codes (zero points, super-block scales), under the qtype's own names.
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
class Factors:
    """A grid as the numbers that a file stores: ``w = Σ c · Π factors (· q)``, the sum over ``terms``.

    ``values``: of each factor [out, n] float32, each of whose columns serves ``in_features / n`` inputs. ``terms``: (c, names of the
    factors, whether the code is one of them too). ``moves``: the factors that may take other values, in the order in which they are tried.
    """

    values: Mapping[str, Tensor]
    terms: tuple[tuple[float, tuple[str, ...], bool], ...]
    moves: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """One weight matrix in a scheme: ``parts`` by the names that ``qtype.layout`` gives them."""

    scheme: Scheme
    shape: tuple[int, ...]
    parts: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Stats:
    """Statistics of a tap's inputs X [n_tokens, in], all per token and in float32 or better.

    ``H``: [in, in] mean of x·xᵀ, or None when only diagonals were gathered; ``importance``: [in] mean of x²; ``fourth``: [in] mean of
    x⁴, None in an old file; ``absmax``: [in]; ``mean``: [in]; ``histogram``: [ranges.N_BINS] share of all inputs in each bin of |x|,
    gathered only when asked for; ``dXXT``: [in, in] mean of (x₀ − x)·xᵀ, x₀ being what the tap reads of the same token in the model before
    any of it was quantized.
    """

    importance: Tensor
    absmax: Tensor
    mean: Tensor
    n_tokens: int
    H: Tensor | None = None
    histogram: Tensor | None = None
    fourth: Tensor | None = None
    dXXT: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Absorber:
    """The op that makes a tap's inputs, a norm or a linear, and can absorb a scale of them.

    ``names``: its tensors that have a row for each output channel (weight, bias). ``channel``: [in] int64, the row that makes each input;
    grouped-query heads share rows. ``offset``: what the op adds to a norm weight before it multiplies by it (Gemma: 1). ``readers``: where
    it makes the inputs of several taps (all experts', a shared expert's), every matrix that reads them → its tap, including a router;
    they are scaled together or not at all. Empty where all its readers are those of one tap.
    """

    names: tuple[str, ...]
    channel: Tensor
    offset: float = 0.0
    readers: Mapping[str, str] = field(default_factory=dict)

    def taps(self, tap: str) -> tuple[str, ...]:
        """The taps that are scaled with ``tap``, including itself."""
        return tuple(dict.fromkeys(self.readers.values())) or (tap,)


@dataclass(frozen=True, slots=True)
class KvCache:
    """Where a layer keeps keys and values. ``attention``: the module's name on disk; ``heads``: of keys and values; ``k_dim``, ``v_dim``: a
    head's width. Its taps are :attr:`k_tap` and :attr:`v_tap`, [n_tokens, heads · dim]."""

    attention: str
    heads: int
    k_dim: int
    v_dim: int

    @property
    def k_tap(self) -> str:
        return f"{self.attention}.k_cache"

    @property
    def v_tap(self) -> str:
        return f"{self.attention}.v_cache"

    @property
    def widths(self) -> dict[str, int]:
        """Tap → width."""
        return {self.k_tap: self.heads * self.k_dim, self.v_tap: self.heads * self.v_dim}


@dataclass(slots=True)
class Layer:
    """The unit of work, and the one mutable type here: a pass reads ``tensors`` and ``schemes`` and fills ``quantized``.

    ``tensors``: dense weights by their name on disk; ``schemes``: of those to be quantized; ``taps``: tensor name → tap. For a pass that
    changes the basis, ``absorbers``: tap → what can absorb a scale of its inputs; then ``tensors`` holds those ops' tensors too, ``taps``
    has every tensor that reads the tap, quantized or not, and the pass stores in ``scales`` what it multiplied the weights' columns by:
    tap → s [in]. ``importance``: tensor name → mean square of its inputs [in], where that is not taken from its tap's statistics.
    ``deferred``: tensors that follow a change of basis and are quantized after it by other passes, with their schemes.
    """

    name: str
    tensors: dict[str, Tensor]
    schemes: dict[str, Scheme]
    taps: dict[str, str] = field(default_factory=dict)
    quantized: dict[str, QuantizedTensor] = field(default_factory=dict)
    absorbers: dict[str, Absorber] = field(default_factory=dict)
    scales: dict[str, Tensor] = field(default_factory=dict)
    importance: dict[str, Tensor] = field(default_factory=dict)
    deferred: dict[str, Scheme] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TensorReport:
    """The result for one tensor. ``relative_error``: ‖(W−Ŵ)X‖² / ‖WX‖² by H, or ‖W−Ŵ‖² / ‖W‖² without one; ``is_exact``: Ŵ is W;
    ``settings``: what a pass chose for it, for the record; ``held_out_error``: ‖(W−Ŵ)X‖² / ‖WX‖² of inputs X on text that nothing was
    fitted to, None where none was run; ``weight_error``: ‖W−Ŵ‖² / ‖W‖², where ``relative_error`` is by H, which may be of few inputs."""

    name: str
    relative_error: float
    notes: tuple[str, ...] = ()
    is_exact: bool = False
    settings: Mapping[str, float] = field(default_factory=dict)
    held_out_error: float | None = None
    weight_error: float | None = None

    @property
    def loss(self) -> float:
        """The share of the weight that is lost: the larger of its errors; 0 where Ŵ is W."""
        return 0.0 if self.is_exact else max(self.relative_error, self.weight_error or 0.0)


SUMMED_AT_ONCE = 1024
"""Numbers that :func:`ordered_sum` adds in their own dtype; torch gives so few to one thread."""


@dataclass(frozen=True, slots=True)
class Report:
    """The results of a pass on a layer; each tensor's ``notes`` are for the user (dead columns, raised damping)."""

    tensors: tuple[TensorReport, ...]


def output_error(E: Tensor, H: Tensor) -> Tensor:
    """A number, float64: the mean over tokens of ‖E·x‖², tr(E·H·Eᵀ), with E [out, in] and ``H`` [in, in] symmetric, of which the part below
    the blocks on its diagonal is not read: half the work of a product."""
    total, size = torch.zeros((), dtype=torch.float64, device=E.device), 2048 if E.is_cuda else 256
    for start in range(0, len(H), size):
        here = slice(start, start + size)
        product = E[:, here] @ H[here, here]
        if start:
            product.addmm_(E[:, :start], H[:start, here], alpha=2)
        total += ordered_sum(product.mul_(E[:, here]))
    return total


def ordered_sum(x: Tensor) -> Tensor:
    """The sum of all of ``x``, a number in float64. Always added in one order: torch's own sum is cut by the number of threads."""
    x = x.reshape(-1)
    while len(x) > 1:
        whole = len(x) // SUMMED_AT_ONCE * SUMMED_AT_ONCE
        rows, rest = x[:whole].view(-1, SUMMED_AT_ONCE).sum(1), x[whole:].sum()  # a row is added by one thread, and so is the rest
        x = torch.cat([rows, rest[None]]).double() if len(rows) else rest[None].double()
    return x.double().sum()


def relative_error(W: Tensor, W_hat: Tensor, H: Tensor | None = None) -> float:
    """‖(W−Ŵ)X‖² / ‖WX‖² taken from ``H`` [in, in] (mean x·xᵀ); without it ‖W−Ŵ‖² / ‖W‖². Weights [out, in]."""
    E = W - W_hat
    if H is None:
        error, total = ordered_sum(E.square()), ordered_sum(W.square())
    else:
        error, total = output_error(E, H), output_error(W, H)
    return float(error / total) if total > 0 else float(error > 0)


def check_divisible(shape: tuple[int, ...], block: int, scheme: Scheme, hint: str) -> None:
    """Raise :class:`RecipeError` unless the last dimension of ``shape`` is a multiple of ``block``. The caller knows the tensor's name."""
    if not shape or shape[-1] % block:
        got = shape[-1] if shape else "a scalar"
        raise RecipeError(f"in_features {got} is not a multiple of the {scheme} block {block}; {hint}")
