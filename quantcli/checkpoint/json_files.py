"""Reads untrusted JSON: size limits before parsing, no duplicate keys, and values shortened for messages."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from quantcli.errors import CheckpointError

MAX_BYTES = 100_000_000
"""More than any model's JSON files have."""

MAX_BRACES, MAX_COMMAS = 1_000_000, 6_000_000
"""JSON costs Python some hundred bytes for each object and eight for each list item: half a million tensors in one file are enough."""


def read_json(path: Path, *, unique: bool = True) -> Any:
    """An untrusted JSON file; with ``unique=False`` the last of two equal keys wins."""
    try:
        if path.stat().st_size > MAX_BYTES:
            fail(path, f"{path.stat().st_size} bytes of JSON are more than any model has")
        return parse_json(path, path.read_bytes(), unique=unique)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def parse_json(path: Path, text: bytes, *, unique: bool = True) -> Any:
    """``text`` of the file ``path`` as JSON, its size bounded before it becomes objects."""
    if text.count(b"{") > MAX_BRACES or text.count(b",") > MAX_COMMAS:
        fail(path, f"{text.count(b',')} items of JSON are more than any model has")
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=unique_keys if unique else None)
    except RecursionError as error:
        raise CheckpointError(f"{path}: not valid JSON: nested too deeply") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON: {str(error)[:200]}") from error


FLOAT_TAG = "__float__"
"""The only key of an object in which transformers 5 writes a number that JSON does not have."""

SPECIAL_FLOATS = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


def with_special_floats(value: Any) -> Any:
    """``value`` with the numbers that ``{"__float__": "Infinity"}`` and its like stand for: for use, where a config is written as read."""
    if isinstance(value, Mapping):
        tag = value.get(FLOAT_TAG) if value.keys() == {FLOAT_TAG} else None
        if isinstance(tag, str) and tag in SPECIAL_FLOATS:
            return SPECIAL_FLOATS[tag]
        return {key: with_special_floats(item) for key, item in value.items()}
    return [with_special_floats(item) for item in value] if isinstance(value, list) else value


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        duplicate, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"duplicate key {shown(duplicate)}")
    return out


def shown(value: Any) -> str:
    """A value of a hostile file, short and printable."""
    text = ascii(value) if isinstance(value, str | int | float | bool | None) else type(value).__name__
    if isinstance(value, list):
        text = ascii(value[:8])
    return text if len(text) <= 80 else text[:80] + "…"


def fail(path: Path, what: str) -> NoReturn:
    raise CheckpointError(f"{path}: {what}")
