"""The work folder of an output, ``<target>.part``: locked while a process writes, taken over by the next run of the same identity."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from quantcli.errors import RecipeError
from quantcli.output import disk
from quantcli.output.journal import Journal, Run, Step
from quantcli.output.layouts import FileLayout


class WorkFolder:
    """The folder ``path`` beside ``target``, with ``output`` in it, the journal, and ``replaced``, which a moment of the commit may need.

    A folder without a journal is not quantcli's, and is never touched. ``run``: None for work that nobody goes on with.
    """

    def __init__(self, target: Path, run: Run | None) -> None:
        self.target = target
        self.run = run
        self.path = target.with_name(target.name + ".part")
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

    def clear_interrupted_commit(self) -> None:
        """Clear up behind a process that was killed while it moved its output: the output has its name, or the older one gets it back."""
        found = Journal.read(self.path)
        if found is None or found.committed is None:
            return
        self._take_lock()
        try:
            if not self.target.exists() and self.replaced.exists():
                os.rename(self.replaced, self.target)
            elif os.path.lexists(self.target) and disk.inode(self.target) == found.committed:
                disk.remove(self.path)
        finally:
            self._drop_lock()

    def take_over(self, files: Sequence[FileLayout]) -> bool:
        """Go on with the work of a process that ended, where it is this run's; remove it where nothing of it can serve (False).

        Raises :class:`RecipeError` where it is in use, another run's, or not quantcli's.
        """
        if not os.path.lexists(self.path):
            return False
        if self.path.is_symlink() or (found := Journal.read(self.path)) is None:
            raise RecipeError(f"{self.path}: is in the way, and no work folder of quantcli; move it or choose another -o")
        self._take_lock()
        with self._kept_on_error():
            if self.run is None or self.run.fresh or not found.steps:
                disk.remove(self.path)
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
        """Strike all but ``steps`` from the journal."""
        if len(steps) < len(self.steps) or self.journal.committed is not None:
            self.journal.rewrite(steps)

    def create(self, files: Sequence[FileLayout]) -> None:
        """Make the folder, locked, with an empty journal."""
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self.path.mkdir()
        self._take_lock()
        self._journal = Journal.create(self.path, {} if self.run is None else self._identity(files))
        disk.fsync(self.path.parent)

    def close(self, *, keep: bool) -> None:
        """Remove the folder, or leave it to a later process."""
        if self._lock is None:
            return
        if not keep:
            disk.remove(self.path)
        self._drop_lock()

    def _identity(self, files: Sequence[FileLayout]) -> dict[str, Any]:
        assert self.run is not None
        digest = sha256()
        for layout in files:
            digest.update(b"%s %d %s" % (layout.name.encode(), layout.size, sha256(layout.header).digest()))
        return {**self.run.identity, "files": digest.hexdigest()}

    @contextmanager
    def _kept_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._drop_lock()  # the folder is not this run's to remove
            raise

    def _take_lock(self) -> None:
        fd = os.open(self.path, os.O_RDONLY)
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
