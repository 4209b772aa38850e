"""The work folder of an output, ``<target>.part``: locked while a process writes, taken over by the next run of the same identity.

It has this name only while it holds a journal, by which it is known to be quantcli's: it is made and emptied under another,
``.<target>.part``, so that a process that is killed at any moment leaves nothing that the next one would not know.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from quantcli.errors import RecipeError
from quantcli.output import disk, system
from quantcli.output.journal import NAME, NEW, Journal, Run, Step
from quantcli.output.layouts import FileLayout

JOURNALS = (NAME, NEW)


class WorkFolder:
    """The folder ``path`` beside ``target``, with ``output`` in it, the journal, and ``replaced``, which a moment of the commit may need.

    A folder without a journal is not quantcli's, and is never touched. ``run``: None for work that nobody goes on with.
    """

    def __init__(self, target: Path, run: Run | None) -> None:
        self.target = target
        self.run = run
        self.path = target.with_name(target.name + ".part")
        self.unnamed = target.with_name(f".{target.name}.part")
        self.output = self.path / "output"
        self.replaced = self.path / "replaced"
        self._journal: Journal | None = None
        self._lock: int | None = None

    @property
    def steps(self) -> tuple[Step, ...]:
        """The finished steps, those of an earlier process first."""
        return () if self._journal is None else tuple(self._journal.steps)

    @property
    def journal(self) -> Journal:
        """Of a folder that was created or taken over."""
        assert self._journal is not None
        return self._journal

    def clear_interrupted(self) -> None:
        """Clear up behind a process that was killed while it made or removed its folder, or moved its output: either the output has its
        name, or the older one gets it back."""
        if is_remnant(self.unnamed):
            with self._locked(self.unnamed):
                disk.remove(self.unnamed)
        found = Journal.read(self.path)
        if found is None or not found.moved:
            return
        with self._locked(self.path):
            if os.path.lexists(self.target) and disk.inode(self.target) == found.moved.get(self.target.name):
                self._remove()
            else:
                self.undo_moves(found)

    def undo_moves(self, journal: Journal) -> None:
        """Take back what was moved to its final name, and give the names to what had them before."""
        for name, inode in journal.moved.items():
            path = self.target.with_name(name)
            if os.path.lexists(path) and disk.inode(path) == inode:
                taken = self.output if len(journal.moved) == 1 else self.output / name
                if not os.path.lexists(taken):
                    system.rename(path, taken)
                else:
                    system.renameat2(path, taken, system.RENAME_EXCHANGE)
        if self.replaced.exists() and not os.path.lexists(self.target):
            system.rename(self.replaced, self.target)

    def take_over(self, files: Sequence[FileLayout]) -> bool:
        """Go on with the work of a process that ended, where it is this run's; remove it where nothing of it can serve (False).

        Raises :class:`RecipeError` where it is in use, another run's, or not quantcli's.
        """
        if not os.path.lexists(self.path):
            return False
        if self.path.is_symlink() or (found := Journal.read(self.path)) is None:
            raise RecipeError(f"{self.path}: is in the way, and no work folder of quantcli; move it or choose another -o")
        self._take_lock(self.path)
        with self._kept_on_error():
            if self.run is None or self.run.fresh or not found.steps:
                self._remove()
                self._drop_lock()
                return False
            if changed := found.differences(self._identity(files)):
                raise RecipeError(
                    f"{self.path}: holds the unfinished work of a run that differs in {', '.join(changed[:4])}; repeat that command to go "
                    "on with it, or give --fresh to drop it and start over"
                )
        self._journal = found
        return True

    def keep_only(self, steps: Sequence[Step]) -> None:
        """Strike all but ``steps`` from the journal, and what a crash left of a line."""
        self.journal.rewrite(steps)

    def create(self, files: Sequence[FileLayout]) -> None:
        """Make the folder, locked, with an empty journal."""
        disk.make_folders(self.target.parent)
        system.mkdir(self.unnamed)
        try:
            self._take_lock(self.unnamed)
            journal = Journal.create(self.unnamed, {} if self.run is None else self._identity(files))
            disk.move_new(self.unnamed, self.path)
        except BaseException:
            with contextlib.suppress(OSError):
                disk.remove(self.unnamed)
            self._drop_lock()
            raise
        journal.folder, self._journal = self.path, journal
        disk.fsync(self.path.parent)

    def close(self, *, keep: bool) -> None:
        """Remove the folder, or leave it to a later process."""
        if self._lock is None:
            return
        try:
            if not keep:
                self._remove()
        finally:
            self._drop_lock()

    def _remove(self) -> None:
        """Remove the folder; while it has its name it has its journal."""
        for path in self.path.iterdir():
            if path.name not in JOURNALS:
                disk.remove(path)
        system.rename(self.path, self.unnamed)
        disk.remove(self.unnamed)

    def _identity(self, files: Sequence[FileLayout]) -> dict[str, Any]:
        assert self.run is not None
        digest = sha256()
        for layout in files:
            digest.update(b"%s %d %s" % (layout.name.encode(), layout.size, sha256(layout.header).digest()))
        return {**self.run.identity, "files": digest.hexdigest()}

    @contextlib.contextmanager
    def _kept_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._drop_lock()  # the folder is not this run's to remove
            raise

    def _take_lock(self, path: Path) -> None:
        fd = system.open(path, os.O_RDONLY)
        try:
            disk.lock(fd, self.path)
        except BaseException:
            os.close(fd)
            raise
        self._lock = fd

    def _drop_lock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @contextlib.contextmanager
    def _locked(self, path: Path) -> Iterator[None]:
        self._take_lock(path)
        try:
            yield
        finally:
            self._drop_lock()


def is_remnant(path: Path) -> bool:
    """Whether ``path`` is a folder that has nothing but the journals of a process that made or removed it."""
    return path.is_dir() and not path.is_symlink() and all(child.name in JOURNALS for child in path.iterdir())
