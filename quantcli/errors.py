"""QuantcliError and its children: one exit code each, one sentence for the user."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class QuantcliError(Exception):
    """An error that the user can act on. Its sentence states what, where, what was expected and found, and the next step."""

    exit_code = 1


class CheckpointError(QuantcliError):
    """A checkpoint is missing, damaged, contradictory or hostile."""

    exit_code = 3


class RecipeError(QuantcliError):
    """A recipe or an option does not fit this model."""

    exit_code = 4


class UnsupportedError(QuantcliError):
    """An architecture, or a pair of qtype and format, that quantcli does not handle."""

    exit_code = 5


class NumericsError(QuantcliError):
    """NaN, Inf or a singular matrix, named by tensor."""

    exit_code = 6


class KernelError(QuantcliError):
    """A compiled kernel or a device refused its arguments or failed."""

    exit_code = 7


class ResourceError(QuantcliError):
    """Not enough disk or memory."""

    exit_code = 8


class OptionError(QuantcliError):
    """An option or an argument has a value that fits no model. ``option``: its name in a call, such as ``seq_len``; the command line
    spells it ``--seq-len``."""

    exit_code = 2

    def __init__(self, option: str, message: str) -> None:
        super().__init__(message)
        self.option = option


class GateError(QuantcliError):
    """A quality gate (``--max-perplexity``, ``--max-kld``) was missed."""

    exit_code = 9


@contextmanager
def about(what: str) -> Iterator[None]:
    """Put ``what`` (a tensor, a file) in front of an error raised by code that sees only numbers."""
    try:
        yield
    except QuantcliError as error:
        raise type(error)(f"{what}: {error}") from error
