"""The only printer: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import math
import os
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quantcli.errors import QuantcliError

if TYPE_CHECKING:
    from rich.progress import Progress

UNITS = (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10))


def size(n_bytes: float) -> str:
    """Bytes for people: 1.9GiB."""
    for unit, factor in UNITS:
        if n_bytes >= factor:
            return f"{n_bytes / factor:.1f}{unit}"
    return f"{n_bytes:.0f}B"


def count(n: float) -> str:
    """Parameters for people: 7.2 B."""
    for unit, factor in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if n >= factor:
            return f"{n / factor:.1f} {unit}"
    return f"{n:.0f}"


@dataclass(frozen=True, slots=True)
class Console:
    """What a verb prints through. ``json``: the result is one JSON object and nothing else goes to stdout."""

    json: bool = False
    quiet: bool = False
    verbose: bool = False

    def out(self, text: str) -> None:
        """To stdout; whoever reads it may have seen enough (``| head``), and that is no error."""
        try:
            sys.stdout.write(text + "\n")
            sys.stdout.flush()
        except BrokenPipeError:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for the interpreter's own flush at its end)

    def result(self, data: Mapping[str, Any], lines: Sequence[str]) -> None:
        """The verb's result: ``data`` with ``--json``, else ``lines``."""
        self.out(json.dumps(_standard(data), sort_keys=True, allow_nan=False) if self.json else "\n".join(lines))

    def table(self, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
        """Columns as wide as their widest cell, numbers to the right."""
        widths = [max(len(row[i]) for row in [headers, *rows]) for i in range(len(headers))]
        right = [all(row[i][:1].isdigit() or row[i] == "-" for row in rows) for i in range(len(headers))]
        lines = []
        for row in [headers, *rows]:
            cells = (cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right, strict=True))
            lines.append("  ".join(cells).rstrip())
        return lines

    def note(self, text: str) -> None:
        """Something the user should know, on stderr; silenced by ``-q``."""
        if not self.quiet:
            sys.stderr.write(f"note: {text}\n")

    def warn(self, text: str) -> None:
        """Something that may be wrong, on stderr, never silenced."""
        sys.stderr.write(f"warning: {text}\n")

    def detail(self, text: str) -> None:
        """What only ``-v`` asks for, on stderr."""
        if self.verbose:
            sys.stderr.write(f"{text}\n")

    @contextmanager
    def progress(self, title: str) -> Iterator[Steps]:
        """Progress of a long walk: a live bar on a terminal, else one line for each step."""
        if self.quiet:
            yield Steps(None, None, title)
        elif sys.stderr.isatty():
            with _bar() as bar:
                yield Steps(bar, None, title)
        else:
            yield Steps(None, sys.stderr, title)

    def failure(self, error: QuantcliError) -> int:
        """One sentence for the user; ``-v`` shows where it came from."""
        if self.verbose:
            traceback.print_exception(error)
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code

    def usage(self, message: str, command: str) -> int:
        """The command line itself was wrong."""
        sys.stderr.write(f"error: {message}\nsee: {command} --help\n")
        return 2

    def interrupted(self) -> None:
        sys.stderr.write(
            "interrupted: nothing was written under a final name; run the same command again to go on behind the last finished layer\n"
        )

    def bug(self, error: Exception) -> int:
        traceback.print_exception(error)
        sys.stderr.write("error: this is a bug in quantcli; please report it with the lines above and the command you ran\n")
        return 1


def _standard(value: Any) -> Any:
    """``value`` without NaN and Inf, which JSON does not have: null in their place."""
    if isinstance(value, Mapping):
        return {key: _standard(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_standard(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Steps:
    """What :meth:`Console.progress` hands out: ``step`` once for each thing done."""

    def __init__(self, bar: Progress | None, stream: Any, title: str) -> None:
        self._bar = bar
        self._stream = stream
        self._task = bar.add_task(title, total=None) if bar else None

    def step(self, index: int, total: int, text: str) -> None:
        """``index`` counts from 0."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=index + 1, total=total, description=text)
        elif self._stream is not None:
            self._stream.write(f"[{index + 1}/{total}] {text}\n")
            self._stream.flush()


def _bar() -> Progress:
    from rich.console import Console as RichConsole
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    return Progress(*columns, console=RichConsole(stderr=True, no_color="NO_COLOR" in os.environ), transient=True)
