"""The journal of an unfinished output: which steps of the run are safely on the disk, so that the same command can go on behind them.

A line for each step, behind its own crc32: a line that a crash cut short, and what follows it, counts as not written. The first line is
the run's identity, by name: what must be the same for another process to go on with the work.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantcli import strict_json
from quantcli.output import disk, system
from quantcli.strict_json import NotJson

NAME = "journal.jsonl"
"""The journal's file in a work folder; a folder without one is not quantcli's to remove."""

NEW = NAME + ".new"
"""A journal that is being written anew."""

Inode = tuple[int, int]
"""(device, inode)."""


@dataclass(frozen=True, slots=True)
class Run:
    """A run that can be continued. ``identity``: name → what must be the same (JSON values); ``fresh``: drop unfinished work and start
    over."""

    identity: Mapping[str, Any]
    fresh: bool = False


@dataclass(frozen=True, slots=True)
class Step:
    """A finished step. ``sums``: each tensor that it put → crc32 of its bytes; ``told``: what the run wants to know again (JSON values)."""

    name: str
    sums: Mapping[str, int]
    told: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Journal:
    """The journal in the work folder ``folder``. ``moved``: file name → inode of what began to be moved to its final name."""

    folder: Path
    identity: Mapping[str, Any]
    steps: list[Step] = field(default_factory=list)
    moved: dict[str, Inode] = field(default_factory=dict)

    @classmethod
    def create(cls, folder: Path, identity: Mapping[str, Any]) -> Journal:
        """A journal without a step."""
        journal = cls(folder, dict(identity))
        journal.rewrite(())
        return journal

    @classmethod
    def read(cls, folder: Path) -> Journal | None:
        """The journal in ``folder`` as far as it is whole; None where there is none."""
        path = folder / NAME
        if not path.is_file() or path.is_symlink():
            return None
        entries = whole_lines(disk.read_file(path))
        if not entries or not isinstance(entries[0].get("identity"), dict):
            return cls(folder, {})
        journal = cls(folder, entries[0]["identity"])
        for entry in entries[1:]:
            if "moved" in entry:
                journal.moved = {name: (device, inode) for name, (device, inode) in entry["moved"].items()}
            else:
                journal.steps.append(Step(entry["step"], entry["sums"], entry["told"]))
        return journal

    def append(self, step: Step) -> None:
        """Add ``step``, whose data is on the disk already."""
        self.steps.append(step)
        self._add({"step": step.name, "sums": dict(step.sums), "told": dict(step.told)})

    def begin_commit(self, outputs: Mapping[str, Path]) -> None:
        """Tell that ``outputs``, by their final names, are about to get them."""
        self.moved = {name: disk.inode(path) for name, path in outputs.items()}
        self._add({"moved": self.moved})

    def rewrite(self, steps: Sequence[Step]) -> None:
        """Leave nothing but ``steps``."""
        path, new = self.folder / NAME, self.folder / NEW
        lines = [line({"identity": dict(self.identity)})]
        lines += [line({"step": s.name, "sums": dict(s.sums), "told": dict(s.told)}) for s in steps]
        disk.write_file(new, b"".join(lines), flush=True)
        system.rename(new, path)
        disk.fsync(self.folder)
        self.steps, self.moved = list(steps), {}

    def differences(self, identity: Mapping[str, Any]) -> list[str]:
        """In words, each part of ``identity`` that is another here; values are shown where they are short."""
        return [told for key in identity for told in different(key, self.identity.get(key), identity[key])]

    def _add(self, entry: Mapping[str, Any]) -> None:
        with disk.opened(self.folder / NAME, os.O_WRONLY | os.O_APPEND) as fd:
            disk.write_all(fd, memoryview(line(entry)))
            system.fsync(fd)


def line(entry: Mapping[str, Any]) -> bytes:
    body = json.dumps(entry).encode()
    return b"%08x %s\n" % (zlib.crc32(body), body)


def whole_lines(data: bytes) -> list[dict[str, Any]]:
    """The entries of a journal before the first line that is not whole."""
    entries: list[dict[str, Any]] = []
    for text in data.split(b"\n")[:-1]:
        crc, _, body = text.partition(b" ")
        if crc != b"%08x" % zlib.crc32(body):
            break
        try:
            entry = strict_json.parse(body, unique=False)
        except NotJson:
            break
        if not isinstance(entry, dict):
            break
        entries.append(entry)
    return entries


def different(key: str, old: Any, new: Any) -> list[str]:
    """What of ``key`` differs: the keys of a mapping one by one."""
    if old == new:
        return []
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return [told for name in {**old, **new} for told in different(f"{key} {name}", old.get(name), new.get(name))]
    shown = [json.dumps(value) for value in (old, new)]
    return [f"{key} ({shown[0]} → {shown[1]})" if max(map(len, shown)) <= 40 else key]
