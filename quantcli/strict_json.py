"""One parser for all JSON that is read: bounded in size, depth and digits, whole Unicode, and no error but its own."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any, NoReturn

MAX_OBJECTS, MAX_ITEMS = 1_000_000, 6_000_000
"""JSON costs Python some hundred bytes for each object and eight for each list item: half a million tensors in one file are enough."""

MAX_DEPTH = 100
"""Objects and lists within one another; whoever walks a value later needs as many calls."""

MAX_DIGITS = 300
"""Of an integer: any that is larger is no float either. A tokenizer's model_max_length has 31."""

HALF_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")
"""The beginning of a surrogate, written as an escape: alone it is half a character, which no file and no tokenizer takes."""


class NotJson(ValueError):
    """What is wrong with a text, in a few words without its place."""


def parse(text: bytes, *, unique: bool = True, special: bool = True, max_objects: int = MAX_OBJECTS, max_items: int = MAX_ITEMS) -> Any:
    """``text`` as JSON; :class:`NotJson` for any that is not, or is more than a file of its kind has.

    ``unique``: a key that comes twice in one object is an error; else the last one wins, as for Python and every other reader of a model.
    ``special``: whether ``NaN`` and ``Infinity``, which Python writes though JSON lacks them, are numbers.
    """
    text = text.removeprefix(b"\xef\xbb\xbf")
    n_objects, n_items = text.count(b"{"), max(text.count(b","), text.count(b"["))
    if n_objects > max_objects or n_items > max_items:
        raise NotJson(f"{max(n_objects, n_items)} items of JSON are more than any such file has")
    try:
        value = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_unique_keys if unique else None,
            parse_int=_integer,
            parse_constant=None if special else _no_number,
        )
    except RecursionError as error:
        raise NotJson("nested too deeply") from error
    except UnicodeDecodeError as error:
        raise NotJson(f"not UTF-8 text: {error.reason} at byte {error.start}") from error
    except ValueError as error:
        raise NotJson(str(error)[:200]) from error
    _check_depth(value)
    if HALF_PAIR.search(text) is not None:
        _check_pairs(value)
    return value


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number of JSON")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        duplicate, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"duplicate key {ascii(duplicate)[:80]}")
    return out


def _check_depth(value: Any) -> None:
    """Raise :class:`NotJson` where more than :data:`MAX_DEPTH` objects and lists lie within one another."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for outer in level for inner in _inside(outer) if isinstance(inner, dict | list)]
        if not level:
            return
    raise NotJson(f"nested too deeply: more than {MAX_DEPTH} levels")


def _check_pairs(value: Any) -> None:
    """Raise :class:`NotJson` where a text, or a key, has half of a surrogate pair."""
    rest = [value]
    while rest:
        one = rest.pop()
        texts = [one] if isinstance(one, str) else list(one) if isinstance(one, dict) else []
        for text in texts:
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise NotJson(f"half of a surrogate pair ({text[error.start]!a}) in {ascii(text)[:60]}") from error
        rest += _inside(one)


def _inside(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
