"""The QuantState of a 4-bit tensor: the JSON stored with its codes, checked on the way in, laid out on the way out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantcli.checkpoint.json_files import shown
from quantcli.errors import CheckpointError
from quantcli.qtypes import fp4, nf4

PREFIX = "quant_state.bitsandbytes__"

LEVELS = {"nf4": nf4.LEVELS, "fp4": fp4.LEVELS}
"""The sixteen levels of each kind, in the order of their codes."""

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""torch's names of the dtypes that a weight had and is decoded to → safetensors' names."""

NAMES = {dtype: name for name, dtype in DTYPES.items()}

KEYS = ("quant_type", "blocksize", "dtype", "shape")
NESTED_KEYS = ("nested_blocksize", "nested_dtype", "nested_offset")

LONGEST_OFFSET = 22
"""Characters of the longest float32 as Python writes it: 1.1754943508222875e-38."""

ROUND_TRIP_DIGITS = 9
"""Enough to name any float32."""

MAX_STATE_BYTES = 1 << 16

LARGEST = 3.4028234663852886e38
"""The largest float32."""


@dataclass(frozen=True, slots=True)
class Nested:
    """How the scales are coded: in blocks of ``block_size``, less ``offset``."""

    block_size: int
    offset: float


@dataclass(frozen=True, slots=True)
class State:
    """A tensor's type, block size, dtype (safetensors' name) and shape; ``nested`` with double quantization."""

    kind: str
    block_size: int
    dtype: str
    shape: tuple[int, int]
    nested: Nested | None = None

    def to_json(self, size: int | None = None) -> bytes:
        """Bitsandbytes' text, keys in its order; with ``size`` filled up with spaces to that many bytes, or with the offset in as few
        digits as name it where that is what it takes."""
        text = self._text()
        if size is not None and len(text) > size and self.nested is not None:
            text = self._text(f"{self.nested.offset:.{ROUND_TRIP_DIGITS}g}")
        if size is not None and len(text) > size:
            raise ValueError(f"{text.decode()} does not fit the {size} bytes that were announced")
        return text if size is None else text.ljust(size)

    def longest(self) -> int:
        """Bytes that suffice whatever the offset will be."""
        return len(self._text("0" * LONGEST_OFFSET))

    def shortest_safe(self) -> int:
        """Bytes that suffice for any offset in :data:`ROUND_TRIP_DIGITS` digits."""
        return len(self._text("1.23456789e-38"))

    def _text(self, offset: str | None = None) -> bytes:
        """``offset``: the characters of that number, None for its usual ones."""
        state = {"quant_type": self.kind, "blocksize": self.block_size, "dtype": NAMES[self.dtype], "shape": list(self.shape)}
        text = json.dumps(state)
        if self.nested is not None:
            nested = {"nested_blocksize": self.nested.block_size, "nested_dtype": "float32"}
            text = f'{text[:-1]}, {json.dumps(nested)[1:-1]}, "nested_offset": {offset or repr(self.nested.offset)}}}'
        return text.encode()


def parse(name: str, state: Any) -> tuple[State, list[str]]:
    """The state of tensor ``name`` from its JSON, and what of it is odd; :class:`CheckpointError` for what no engine could decode."""
    if not isinstance(state, dict):
        raise damaged(name, "is no object")
    nested_keys = NESTED_KEYS if any(key in state for key in NESTED_KEYS) else ()
    if missing := [key for key in (*KEYS, *nested_keys) if key not in state]:
        raise damaged(name, f"lacks {missing[0]}")
    kind, block, dtype, shape = (state[key] for key in KEYS)
    if type(kind) is not str or kind not in LEVELS:
        raise damaged(name, f"has quant_type {shown(kind)}; expected nf4 or fp4")
    if not is_size(block) or block % 32:
        raise damaged(name, f"has blocksize {shown(block)}; expected a multiple of 32")
    if type(dtype) is not str or dtype not in DTYPES:
        raise damaged(name, f"has dtype {shown(dtype)}; expected {', '.join(DTYPES)}")
    if not isinstance(shape, list) or len(shape) != 2 or not all(is_size(side) for side in shape):
        raise damaged(name, f"has shape {shown(shape)}; expected [out_features, in_features]")
    nested = parse_nested(name, state) if nested_keys else None
    unknown = sorted(state.keys() - {*KEYS, *NESTED_KEYS})
    notes = [f"the quant_state of {name} has the key {shown(unknown[0])}, which bitsandbytes refuses"] if unknown else []
    return State(kind, block, DTYPES[dtype], (shape[0], shape[1]), nested), notes


def parse_nested(name: str, state: Mapping[str, Any]) -> Nested:
    block, dtype, offset = (state[key] for key in NESTED_KEYS)
    if not is_size(block):
        raise damaged(name, f"has nested_blocksize {shown(block)}; expected a number of scales")
    if dtype != "float32":
        raise damaged(name, f"has nested_dtype {shown(dtype)}; expected float32")
    if type(offset) not in (int, float) or not abs(offset) <= LARGEST:
        raise damaged(name, f"has nested_offset {shown(offset)}; expected a float32")
    return Nested(block, float(offset))


def is_size(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**48


def damaged(name: str, what: str) -> CheckpointError:
    return CheckpointError(f"{name}: its quant_state {what}")
