"""Writes output files: declared up front, filled in any order, verified by reading back, and only then renamed to their target.

Everything is made in a work folder, ``<target>.part``: ``output`` (a folder, a file, or a folder of files that will lie side by side), the
journal of finished steps, and what the run keeps between them. ``commit`` flushes it to the disk, reads every byte back and compares it
with the checksum taken while it was put, and moves the output to its name with one rename, or one exchange where it replaces an older one.
A failure before leaves the target unchanged. Files side by side are moved one by one, and the first, which an engine is given, last.

A run that has an identity can be continued: :meth:`Writer.finish_step` flushes what was put and tells the journal, an interruption leaves
the work folder, and the next writer of the same target and identity takes it over with all finished steps, their bytes checked. Otherwise
the folder goes when the run fails. That of a running process is locked; one without a journal is not quantcli's, and is never touched.

Memory: one tensor at a time, and 16 MiB while checking.
"""

from __future__ import annotations

import contextlib
import os
import threading
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from quantcli.errors import CheckpointError, NumericsError, QuantcliError, RecipeError, UnsupportedError
from quantcli.output import disk, system
from quantcli.output.journal import Run, Step
from quantcli.output.layouts import FileLayout, check_layouts, check_tensor, has_header, relative, tensor_bytes, write_header
from quantcli.output.work_folder import WorkFolder

N_CHECKERS = 2
"""Threads that read an output back."""

HOPELESS = (NumericsError, RecipeError, UnsupportedError)
"""Errors of a run that the same command would meet again: its work is not kept."""


class Writer:
    """Writes a folder of files (``folder=True``: several layouts and sidecars), a single file, or files side by side to ``target``.

    A context manager: leaving it without ``commit`` removes what was written, unless ``run`` is given and a step is finished. Raises
    :class:`RecipeError` at once when ``target`` exists and ``overwrite`` is not given (with it the old output is replaced at ``commit``),
    and also when ``target`` is nothing that ``overwrite`` may replace: another kind of file, or a folder that holds no model.
    """

    def __init__(self, target: Path, *, overwrite: bool = False, folder: bool = True, run: Run | None = None) -> None:
        # Links are resolved, so that the rename happens in the real folder and never crosses a file system.
        self.target = Path(os.path.realpath(target))
        self.folder = folder
        self._overwrite = overwrite
        self._beside: tuple[Path, ...] = ()  # the other files of a target that is several
        self.work = WorkFolder(self.target, run)
        self._layouts: dict[str, FileLayout] = {}
        self._files: dict[str, str] = {}  # tensor → its file
        self._sums: dict[str, int] = {}  # tensor → crc32, once it is put
        self._claimed: set[str] = set()
        self._recorded: set[str] = set()  # in the journal
        self._sidecars: dict[str, tuple[int, int]] = {}  # name → (size, crc32)
        self._claim_lock = threading.Lock()
        self._is_committing = self._done = False
        self.notes: list[str] = []
        with disk.wording_errors(self.target):
            self.work.clear_interrupted()
            disk.check_replaceable(self.target, overwrite=overwrite, folder=folder)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of a target that is not a folder: one, or several, known once they are declared."""
        return () if self.folder else (self.target, *self._beside)

    def declare(self, files: Sequence[FileLayout], sidecars: Mapping[str, bytes | Path] | None = None) -> None:
        """Create ``files`` with their headers, and ``sidecars`` (small files: their bytes, or a path to copy), or take over those of an
        unfinished run. Once.

        Raises :class:`ResourceError` when the disk cannot hold it all, before anything is written, :class:`RecipeError` when a work folder
        is in use, belongs to another run, or is not quantcli's.
        """
        if self._layouts or self._done:
            raise ValueError("declare may be called once")
        if not files or (not self.folder and (sidecars or (len(files) > 1 and files[0].name != self.target.name))):
            raise ValueError(f"{self.target}: a target that is a file takes no sidecars, and the first of several files has its name")
        check_layouts(files)
        self._beside = () if self.folder else tuple(self.target.with_name(relative(layout.name).name) for layout in files[1:])
        for path in self._beside:
            disk.check_replaceable(path, overwrite=self._overwrite, folder=False)
        sidecars = sidecars or {}
        try:
            with disk.wording_errors(self.target):
                if not self._take_over(files):
                    n_bytes = sum(f.size for f in files)
                    n_bytes += sum(len(s) if isinstance(s, bytes) else s.stat().st_size for s in sidecars.values())
                    disk.check_space(self.target, n_bytes)
                    self._create(files)
            for name, data in sidecars.items():
                self.add_sidecar(name, data)
        except BaseException:
            self.abort(keep=bool(self.steps))  # the context may not have been entered yet
            raise

    @property
    def steps(self) -> tuple[Step, ...]:
        """The finished steps, those of an earlier process first."""
        return self.work.steps

    @property
    def is_resumable(self) -> bool:
        """Whether finished steps serve a later process."""
        return self.work.run is not None

    def finish_step(self, name: str, told: Mapping[str, Any], *, tensors: Collection[str] | None = None) -> None:
        """Flush what was put since the last step, or of that only ``tensors``, and add the step to the journal. ``told``: JSON values that
        a later process is given in :attr:`steps`. Does nothing for a run without an identity."""
        if not self.is_resumable:
            return
        with self._claim_lock:
            new = self._sums.keys() - self._recorded
            sums = {tensor: self._sums[tensor] for tensor in (new if tensors is None else new & set(tensors))}
        with disk.wording_errors(self.target):
            for file in sorted({self._files[tensor] for tensor in sums}):
                disk.fsync(self._path(file))
            self.work.journal.append(Step(name, sums, told))
        self._recorded |= sums.keys()

    def put(self, name: str, tensor: Tensor) -> None:
        """Write one tensor. ``tensor``: dtype and shape of its spec; uint8 of the same byte count where the spec has a ggml type.

        Thread-safe. Raises ValueError for a name that was not declared or is put twice, and for another dtype or shape.
        """
        with self._claim_lock:
            if self._done or name not in self._files:
                raise ValueError(f"{name}: {'the writer is closed' if self._done else 'not declared'}")
            if name in self._claimed:
                raise ValueError(f"{name}: put twice")
            slot = self._layouts[self._files[name]].slots[name]
            check_tensor(slot.spec, tensor)
            self._claimed.add(name)
        data = tensor_bytes(tensor)
        with disk.wording_errors(self.target), disk.opened(self._path(self._files[name]), os.O_RDWR) as fd:
            disk.write_at(fd, data, slot.offset)
            disk.start_flushing(fd, slot.offset, len(data))
        with self._claim_lock:
            self._sums[name] = zlib.crc32(data)

    def has(self, name: str) -> bool:
        """Whether the tensor ``name`` was put, by this process or by the one whose work it goes on with."""
        return name in self._sums

    def add_sidecar(self, name: str, data: bytes | Path) -> None:
        """Add a small file to a folder target: its bytes, or a path to copy. A later one of the same name replaces the earlier."""
        if self._done or not self._layouts or not self.folder:
            raise ValueError(f"{name}: sidecars go into a declared folder, before commit")
        if name in self._layouts:
            raise ValueError(f"{name}: a file of tensors has this name")
        path = self.work.output / relative(name)
        content = data if isinstance(data, bytes) else data.read_bytes()
        with disk.wording_errors(self.target):
            disk.make_folders(path.parent)
            disk.write_file(path, content)
        self._sidecars[name] = (len(content), zlib.crc32(content))

    def commit(self, check: Callable[[Path], None] | None = None) -> None:
        """Flush, read back, compare, and move everything to ``target``. ``check``: called before that with where the finished output lies:
        the folder, or the first file; what it raises leaves nothing.

        Raises ValueError when a declared tensor was never put, :class:`CheckpointError` when the bytes read back differ from those that
        were written. Nothing has the final name in either case. What fails behind the last move is told in ``notes``: the output stands.
        """
        if self._done or not self._layouts:
            raise ValueError(f"{self.target}: commit needs a declared, open writer")
        if missing := sorted(self._files.keys() - self._sums.keys()):
            raise ValueError(f"{self.target}: {len(missing)} tensors were declared and never put, the first is {missing[0]}")
        self._is_committing = True
        with disk.wording_errors(self.target):
            self._flush()
            self._verify()
            if check is not None:
                self._checked(check)
            self._move_beside() if self._beside else self._move()
        self._done = True
        try:
            disk.fsync(self.target.parent)
        except OSError as error:
            self.notes.append(f"{self.target}: is whole, but {error.strerror} while its name was flushed: a loss of power might undo it")
        try:
            self.work.close(keep=False)
        except OSError as error:
            self.notes.append(f"{self.work.path}: {error.strerror} while it was removed; the output stands, remove this folder")

    def _checked(self, check: Callable[[Path], None]) -> None:
        """Call ``check`` with the finished output; what it refuses, the same command would write again."""
        try:
            check(self._path(self.target.name) if self._beside else self.work.output)
        except QuantcliError:
            self.abort()
            raise

    def abort(self, *, keep: bool = False) -> None:
        """Remove everything that was written, or (``keep``) leave it to a later process; the target stays as it was. Harmless when called
        twice or after commit."""
        if self._done:
            return
        self._done = True
        with contextlib.suppress(OSError):  # the error that led here is the one to tell; the next run clears up
            self.work.close(keep=keep)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        is_hopeless = isinstance(error, HOPELESS) and not self._is_committing
        self.abort(keep=bool(self.steps) and error is not None and not is_hopeless)

    def _path(self, file: str) -> Path:
        return self.work.output / file if self.folder or self._beside else self.work.output

    def _move(self) -> None:
        """Move the output to its name."""
        self.work.journal.begin_commit({self.target.name: self.work.output})
        disk.check_replaceable(self.target, overwrite=self._overwrite, folder=self.folder)
        is_free = not os.path.lexists(self.target) or (self.folder and not any(self.target.iterdir()))
        if is_free:
            disk.move_new(self.work.output, self.target)
        else:
            disk.replace(self.work.output, self.target, self.work.replaced)

    def _move_beside(self) -> None:
        """Move several files to their names. An earlier output's first file goes at the start, so that no mixture of both has one."""
        files = (*self._beside, self.target)
        self.work.journal.begin_commit({path.name: self.work.output / path.name for path in files})
        try:
            for path in files:
                disk.check_replaceable(path, overwrite=self._overwrite, folder=False)
            if os.path.lexists(self.target):
                system.rename(self.target, self.work.replaced)
            for path in files:
                if os.path.lexists(path):
                    disk.replace(self.work.output / path.name, path, self.work.replaced)
                else:
                    disk.move_new(self.work.output / path.name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                self.work.undo_moves(self.work.journal)
            raise

    def _good_steps(self) -> list[Step]:
        """The steps whose bytes are on the disk, up to the first that is damaged. A file without its header or size has none."""
        for layout in self._layouts.values():
            if not has_header(self._path(layout.name), layout):
                write_header(self._path(layout.name), layout)
        for i, step in enumerate(self.steps):
            parts = [self._slot(name) for name in step.sums]
            if any(disk.checksum(*part) != crc for part, crc in zip(parts, step.sums.values(), strict=True)):
                return list(self.steps[:i])
        return list(self.steps)

    def _slot(self, name: str) -> tuple[Path, int, int]:
        """File, offset and size of a tensor."""
        slot = self._layouts[self._files[name]].slots[name]
        return self._path(self._files[name]), slot.offset, slot.spec.nbytes

    def _create(self, files: Sequence[FileLayout]) -> None:
        self.work.create(files)
        if self.folder or self._beside:
            system.mkdir(self.work.output)
        self._know(files)
        for layout in files:
            disk.make_folders(self._path(layout.name).parent)
            write_header(self._path(layout.name), layout)
        if self.is_resumable:
            disk.fsync(self.work.output if self.folder or self._beside else self.work.path)
            disk.fsync(self.work.path)

    def _take_over(self, files: Sequence[FileLayout]) -> bool:
        """Go on with the work of an earlier process, as far as its bytes are what it wrote; False where there is none."""
        if not self.work.take_over(files):
            return False
        self._know(files)
        self.work.keep_only(self._good_steps())
        for step in self.steps:
            self._sums.update(step.sums)
            self._claimed.update(step.sums)
            self._recorded.update(step.sums)
        return True

    def _know(self, files: Sequence[FileLayout]) -> None:
        for layout in files:
            self._layouts[layout.name] = layout
            self._files.update(dict.fromkeys(layout.slots, layout.name))

    def _flush(self) -> None:
        paths = [self._path(name) for name in self._layouts] + [self.work.output / name for name in self._sidecars]
        folders = {parent for path in paths for parent in path.parents if parent == self.work.path or self.work.path in parent.parents}
        for path in [*paths, *folders]:
            disk.fsync(path)

    def _verify(self) -> None:
        """Read every byte back and compare: headers as they are, tensors and sidecars by the checksum taken while writing."""
        parts: list[tuple[str, str, int, int, int]] = []  # file, name, offset, size, checksum
        for layout in self._layouts.values():
            if not has_header(self._path(layout.name), layout):
                raise CheckpointError(
                    f"{self._path(layout.name)}: the header or size read back differs from what was written; the disk may be failing"
                )
            slots = sorted(layout.slots.values(), key=lambda s: s.offset)
            parts += [(layout.name, s.spec.name, s.offset, s.spec.nbytes, self._sums[s.spec.name]) for s in slots]
        parts += [(name, name, 0, size, crc) for name, (size, crc) in self._sidecars.items()]
        with ThreadPoolExecutor(N_CHECKERS) as pool:
            found = pool.map(lambda part: disk.checksum(self._path(part[0]), *part[2:4]), parts)
            for part, got in zip(parts, found, strict=True):
                self._compare(part[0], part[1], got, part[4])

    def _compare(self, file: str, name: str, got: int | None, expected: int) -> None:
        if got != expected:
            raise CheckpointError(f"{self._path(file)}: {name} reads back differently from what was written; the disk may be failing")
