"""Writes output files: declared up front, filled in any order, verified by reading back, and only then renamed to their target.

Everything is written under ``<target>.part`` (a folder or a file, like the target; for several files side by side a folder). ``commit``
flushes it to the disk, reads every byte back and compares it with the checksum taken while it was put, and moves it to the target with one
rename. A failure before that rename leaves the target unchanged; an exception also removes the ``.part``. A killed process leaves its
``.part`` behind, which the next run replaces; the ``.part`` of a running process is locked, and a second run refuses to touch it. Files
side by side are moved one by one, and the first, which an engine is given, last.

Memory: one tensor at a time, and 16 MiB while checking.
"""

from __future__ import annotations

import os
import threading
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType

import torch
from torch import Tensor

from quantcli.errors import CheckpointError
from quantcli.output import disk
from quantcli.tensors import DTYPE_NAMES, DTYPES, TensorSpec

N_CHECKERS = 2
"""Threads that read an output back."""


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one tensor lies: ``offset`` counts from the start of its file."""

    spec: TensorSpec
    offset: int


@dataclass(frozen=True, slots=True)
class FileLayout:
    """The layout of a file before any weight is read: its header, its size and the place of each tensor (padding is zeros)."""

    name: str
    header: bytes
    size: int
    slots: Mapping[str, Slot]


class Writer:
    """Writes a folder of files (``folder=True``: several layouts and sidecars), a single file, or files side by side to ``target``.

    A context manager: leaving it without ``commit`` removes what was written. Raises :class:`RecipeError` at once when ``target`` exists
    and ``overwrite`` is not given (with it the old output is replaced at ``commit``), and also when ``target`` is nothing that
    ``overwrite`` may replace: another kind of file, or a folder that holds no model.
    """

    def __init__(self, target: Path, *, overwrite: bool = False, folder: bool = True) -> None:
        # Links are resolved, so that the rename happens in the real folder and never crosses a file system.
        self.target = Path(os.path.realpath(target))
        self.folder = folder
        self._overwrite = overwrite
        self._beside: tuple[Path, ...] = ()  # the other files of a target that is several
        self.part = self.target.with_name(self.target.name + ".part")
        self._old = self.target.with_name(self.target.name + ".part-old")
        self._layouts: dict[str, FileLayout] = {}
        self._files: dict[str, str] = {}  # tensor → its file
        self._sums: dict[str, int] = {}  # tensor → crc32, once it is put
        self._claimed: set[str] = set()
        self._sidecars: dict[str, tuple[int, int]] = {}  # name → (size, crc32)
        self._claim_lock = threading.Lock()
        self._part_lock: int | None = None
        self._done = False
        disk.restore_interrupted_commit(self.target, self._old)
        disk.check_replaceable(self.target, overwrite=overwrite, folder=folder)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of a target that is not a folder: one, or several, known once they are declared."""
        return () if self.folder else (self.target, *self._beside)

    def declare(self, files: Sequence[FileLayout], sidecars: Mapping[str, bytes | Path] | None = None) -> None:
        """Create ``files`` with their headers, and ``sidecars`` (small files: their bytes, or a path to copy). Once.

        Raises :class:`ResourceError` when the disk cannot hold it all, before anything is written.
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
        self._replace_stale_part()
        n_bytes = sum(f.size for f in files) + sum(len(s) if isinstance(s, bytes) else s.stat().st_size for s in sidecars.values())
        disk.check_space(self.target, n_bytes)
        try:
            with disk.wording_errors(self.target):
                self._create(files)
            for name, data in sidecars.items():
                self.add_sidecar(name, data)
        except BaseException:
            self.abort()  # the context may not have been entered yet
            raise

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
        with disk.wording_errors(self.target), self._path(self._files[name]).open("r+b", buffering=0) as file:
            file.seek(slot.offset)
            disk.write_all(file.fileno(), data)
            disk.start_flushing(file.fileno(), slot.offset, len(data))
        self._sums[name] = zlib.crc32(data)

    def add_sidecar(self, name: str, data: bytes | Path) -> None:
        """Add a small file to a folder target: its bytes, or a path to copy. A later one of the same name replaces the earlier."""
        if self._done or not self._layouts or not self.folder:
            raise ValueError(f"{name}: sidecars go into a declared folder, before commit")
        if name in self._layouts:
            raise ValueError(f"{name}: a file of tensors has this name")
        path = self.part / relative(name)
        content = data if isinstance(data, bytes) else data.read_bytes()
        with disk.wording_errors(self.target):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        self._sidecars[name] = (len(content), zlib.crc32(content))

    def commit(self, check: Callable[[Path], None] | None = None) -> None:
        """Flush, read back, compare, and move everything to ``target``. ``check``: called before that with where the finished output lies:
        the folder, or the first file; what it raises leaves nothing.

        Raises ValueError when a declared tensor was never put, :class:`CheckpointError` when the bytes read back differ from those that
        were written. Nothing has the final name in either case.
        """
        if self._done or not self._layouts:
            raise ValueError(f"{self.target}: commit needs a declared, open writer")
        if missing := sorted(self._files.keys() - self._sums.keys()):
            raise ValueError(f"{self.target}: {len(missing)} tensors were declared and never put, the first is {missing[0]}")
        with disk.wording_errors(self.target):
            self._flush()
            self._verify()
            if check is not None:
                check(self.part if self.folder else self._path(self.target.name))
            if self._beside:
                self._move_beside()
            else:
                disk.replace(self.part, self.target, self._old)
            disk.fsync(self.target.parent)
        self._done = True
        self._unlock()

    def abort(self) -> None:
        """Remove everything that was written; the target stays as it was. Harmless when called twice or after commit."""
        if self._done:
            return
        self._done = True
        if self._part_lock is not None:
            disk.remove(self.part)
        self._unlock()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.abort()

    def _path(self, file: str) -> Path:
        return self.part / file if self.folder or self._beside else self.part

    def _move_beside(self) -> None:
        """Move several files to their names. An earlier output's first file goes at the start, so that no mixture of both has one."""
        self.target.unlink(missing_ok=True)
        for path in (*self._beside, self.target):
            os.rename(self.part / path.name, path)
        self.part.rmdir()

    def _replace_stale_part(self) -> None:
        """Remove the ``.part`` of a killed process, whose lock is gone; that of a running process is locked, which is an error."""
        if not os.path.lexists(self.part):
            return
        fd = os.open(self.part, os.O_RDONLY)
        try:
            disk.lock(fd, self.part)
            disk.remove(self.part)
        finally:
            os.close(fd)

    def _create(self, files: Sequence[FileLayout]) -> None:
        self.target.parent.mkdir(parents=True, exist_ok=True)
        if self.folder or self._beside:
            self.part.mkdir()
        else:
            self.part.touch(exist_ok=False)
        self._part_lock = os.open(self.part, os.O_RDONLY)
        disk.lock(self._part_lock, self.part)
        for layout in files:
            path = self._path(layout.name)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb", buffering=0) as file:
                disk.write_all(file.fileno(), memoryview(layout.header))
                file.truncate(layout.size)
            self._layouts[layout.name] = layout
            self._files.update(dict.fromkeys(layout.slots, layout.name))

    def _flush(self) -> None:
        paths = [self._path(name) for name in self._layouts] + [self.part / name for name in self._sidecars]
        folders = {parent for path in paths for parent in path.parents if parent == self.part or self.part in parent.parents}
        for path in [*paths, *folders]:
            disk.fsync(path)

    def _verify(self) -> None:
        """Read every byte back and compare: headers as they are, tensors and sidecars by the checksum taken while writing."""
        parts: list[tuple[str, str, int, int, int]] = []  # file, name, offset, size, checksum
        for layout in self._layouts.values():
            with self._path(layout.name).open("rb", buffering=0) as file:
                if os.fstat(file.fileno()).st_size != layout.size or file.read(len(layout.header)) != layout.header:
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

    def _unlock(self) -> None:
        if self._part_lock is not None:
            os.close(self._part_lock)
            self._part_lock = None


def check_layouts(files: Sequence[FileLayout]) -> None:
    """Raise ValueError for inconsistent layouts: a duplicate name, tensors that overlap or exceed their file."""
    seen: set[str] = set()
    for layout in files:
        relative(layout.name)
        end = len(layout.header)
        for name, slot in sorted(layout.slots.items(), key=lambda item: (item[1].offset, item[1].spec.nbytes)):
            if name != slot.spec.name or name in seen:
                raise ValueError(f"{layout.name}: {name} is declared twice or under another name")
            if slot.offset < end:
                raise ValueError(f"{layout.name}: {name} at {slot.offset} overlaps what ends at {end}")
            end = slot.offset + slot.spec.nbytes
            seen.add(name)
        if end > layout.size:
            raise ValueError(f"{layout.name}: tensors end at {end}, the file at {layout.size}")
    if len({layout.name for layout in files}) != len(files):
        raise ValueError("two files have one name")


def check_tensor(spec: TensorSpec, tensor: Tensor) -> None:
    """Raise ValueError unless ``tensor`` has the dtype and shape of ``spec``."""
    if spec.dtype not in DTYPES:
        if tensor.dtype != torch.uint8 or tensor.nbytes != spec.nbytes:
            raise ValueError(f"{spec.name}: {spec.dtype} needs {spec.nbytes} bytes of uint8, got {tensor.nbytes} of {tensor.dtype}")
        return
    if tensor.dtype != DTYPES[spec.dtype] or tuple(tensor.shape) != spec.shape:
        got = DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype))
        raise ValueError(f"{spec.name}: expected {spec.dtype} {list(spec.shape)}, got {got} {list(tensor.shape)}")


def relative(name: str) -> PurePosixPath:
    """``name`` as a path inside the output; ValueError when it leaves it."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise ValueError(f"'{name}' is not a path inside the output")
    return path


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The tensor's bytes in row order; a copy only when it is on a device or not contiguous."""
    data = tensor.detach().cpu().contiguous().reshape(-1)
    return data.view(torch.uint8).numpy().data
