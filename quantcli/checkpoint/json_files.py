"""Reads a model's untrusted JSON files, each error with the file's name, and shortens values for messages."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from quantcli import strict_json
from quantcli.errors import CheckpointError
from quantcli.strict_json import NotJson

MAX_BYTES = 100_000_000
"""More than any model's JSON files have."""


def read_json(path: Path, *, unique: bool = True) -> Any:
    """An untrusted JSON file; ``unique`` as for :func:`parse_json`."""
    try:
        if path.stat().st_size > MAX_BYTES:
            fail(path, f"{path.stat().st_size} bytes of JSON are more than any model has")
        return parse_json(path, path.read_bytes(), unique=unique)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def parse_json(path: Path, text: bytes, *, unique: bool = True) -> Any:
    """``text`` of the file ``path`` as JSON (:mod:`quantcli.strict_json`).

    ``unique``: of a file that a program wrote for programs, without a key that comes twice and without NaN; else one as transformers
    reads it, where the last of two equal keys wins and NaN and Infinity are numbers.
    """
    try:
        return strict_json.parse(text, unique=unique, special=not unique)
    except NotJson as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error


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


def shown(value: Any) -> str:
    """A value of a hostile file, short and printable."""
    text = ascii(value) if isinstance(value, str | int | float | bool | None) else type(value).__name__
    if isinstance(value, list):
        text = ascii(value[:8])
    return text if len(text) <= 80 else text[:80] + "…"


def fail(path: Path, what: str) -> NoReturn:
    raise CheckpointError(f"{path}: {what}")
