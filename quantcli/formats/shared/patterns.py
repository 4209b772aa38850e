"""Regular expressions from a model's files: only those that are safe to run are compiled."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from re import _parser as sre  # type: ignore[attr-defined]
from typing import Any

MAX_CHOICES = 6
"""Alternatives and repetitions that a foreign pattern may have: matching takes time that grows with this power of a name's length."""

MAX_LENGTH = 1000
"""Longer ones are no one's rule."""

REPEATS = (sre.MAX_REPEAT, sre.MIN_REPEAT, sre.POSSESSIVE_REPEAT)


def compiled(pattern: str) -> re.Pattern[str] | None:
    """``pattern``, or None where it is no regular expression or not a safe one."""
    try:
        return re.compile(pattern) if len(pattern) <= MAX_LENGTH and is_tame(pattern) else None
    except (re.error, RecursionError, OverflowError):
        return None


def is_tame(pattern: str) -> bool:
    """Whether ``pattern`` cannot take forever: few alternatives, and none inside of a repetition."""
    try:
        return count_choices(sre.parse(pattern)) <= MAX_CHOICES
    except RecursionError:
        return False


def count_choices(pattern: Any, *, repeated: bool = False) -> float:
    """Where matching the parsed ``pattern`` may go more than one way; infinite when that happens inside of a repetition."""
    total: float = 0
    for operator, argument in pattern:
        repeats = operator in REPEATS and argument[0] != argument[1]  # (least, most, what)
        if repeats or operator is sre.BRANCH:
            total += math.inf if repeated else 1
        again = operator in REPEATS and argument[1] > 1
        total += sum(count_choices(inner, repeated=repeated or again) for inner in patterns_in(argument))
    return total


def patterns_in(argument: Any) -> Iterator[Any]:
    """The patterns inside of an operator's ``argument``."""
    if isinstance(argument, sre.SubPattern):
        yield argument
    elif isinstance(argument, tuple | list):
        for part in argument:
            yield from patterns_in(part)
