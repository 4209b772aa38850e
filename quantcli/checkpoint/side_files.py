"""The files beside a model's weights that any copy of it needs: all that is small, no weight and no pickle, in the folder and below it."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from quantcli.checkpoint.hub import blobs_of
from quantcli.checkpoint.json_files import read_json
from quantcli.errors import CheckpointError

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz", ".pdparams", ".dill")
"""Endings of files that run code when they are read, or may: copied to no output."""

WEIGHTS = (
    *(".safetensors", ".gguf", ".ggml", ".onnx", ".onnx_data", ".msgpack", ".h5", ".hdf5", ".keras", ".tflite", ".mlmodel", ".pb", ".ot"),
    *(".safetensors.index.json", ".bin.index.json", ".msgpack.index.json", ".h5.index.json"),
)
"""Endings of files of weights, in whatever format, and of lists of them."""

ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".zst", ".parquet", ".arrow")
CACHES = ("__pycache__", ".pyc", ".part", ".lock", ".incomplete")
SHOWN_HIDDEN = (".gitattributes",)
"""What is copied of the files whose name begins with a dot."""

MAX_FILE_BYTES, MAX_TOTAL_BYTES, MAX_FILES = 200_000_000, 500_000_000, 2_000

MODULES = "modules.json"
"""sentence-transformers' list of the steps of an embedding model, each in a subfolder that may have weights of its own."""


@dataclass
class SideFiles:
    """``files``: name in the folder → path; ``left``: what stays behind → the reason."""

    files: dict[str, Path] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    n_bytes: int = 0

    def add(self, name: str, path: Path) -> None:
        """Take a file, as long as there is room."""
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            self.left[name] = f"more than {MAX_FILE_BYTES // 1_000_000} MB"
        elif len(self.files) >= MAX_FILES or self.n_bytes + size > MAX_TOTAL_BYTES:
            self.left[name] = f"beyond {MAX_FILES} files or {MAX_TOTAL_BYTES // 1_000_000} MB of such files"
        else:
            self.files[name] = path
            self.n_bytes += size

    def note(self) -> str | None:
        """What a user should know of the files that stay behind, in one line; None where there are none."""
        if not self.left:
            return None
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left.items():
            reasons.setdefault(reason, []).append(name)
        told = (
            f"{', '.join(names[:2])}{f' and {len(names) - 2} more' if len(names) > 2 else ''} ({why})" for why, names in reasons.items()
        )
        return f"files of the source that are not copied: {'; '.join(told)}"


def side_files(folder: Path, written: Collection[str], own: Collection[Path] = ()) -> SideFiles:
    """The side files of the model in ``folder``.

    ``written``: names in the folder that an output has of its own, which are passed over; ``own``: the model's own files of weights.
    """
    found, modules = SideFiles(), module_folders(folder)
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    for entry in entries:
        if entry.name not in written and not entry.is_dir():
            take(found, folder, PurePosixPath(entry.name), own)
    for entry in entries:
        if not entry.is_dir() or entry.name.startswith(".") or entry.name in CACHES:
            continue
        below = [] if entry.is_symlink() else [file for file in files_below(folder, entry.name) if folder / file not in own]
        if entry.is_symlink():
            found.left[f"{entry.name}/"] = "a link"
        elif entry.name not in modules and (weights := next((file for file in below if why_left(file.name)), None)) is not None:
            found.left[f"{entry.name}/"] = f"a folder with weights or data of its own, such as {weights.name}"
        else:
            for file in below:
                take(found, folder, file, own, of_module=entry.name in modules)
    return found


def files_below(folder: Path, name: str) -> Iterator[PurePosixPath]:
    """The files in the subfolder ``name`` of ``folder``, in order, hidden folders and caches left out; no more than could be copied."""
    n_files = 0
    for parent, folders, files in os.walk(folder / name):
        place = PurePosixPath(Path(parent).relative_to(folder).as_posix())
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f not in CACHES)
        for file in sorted(files):
            yield place / file
            if (n_files := n_files + 1) > MAX_FILES:
                return


def take(found: SideFiles, folder: Path, name: PurePosixPath, own: Collection[Path], *, of_module: bool = False) -> None:
    """Add one file of ``folder`` to ``found``, or the reason why not. ``of_module``: weights there are part of the model."""
    path, text = folder / name, str(name)
    if (name.name.startswith(".") and name.name not in SHOWN_HIDDEN) or name.name.endswith(CACHES) or path in own or not path.is_file():
        return
    reason = why_left(name.name)
    if of_module and reason is not None and name.name.endswith(".safetensors"):
        reason = None
    if not text.isprintable():
        found.left[ascii(text)] = "its name"
    elif reason is not None:
        if not name.name.endswith(".index.json"):  # of files that are told themselves
            found.left[text] = reason
    elif not is_inside(folder, path):
        found.left[text] = "a link out of the folder"
    else:
        found.add(text, path)


def why_left(name: str) -> str | None:
    """Why a file of this name is copied to no output; None where it may be."""
    name = name.lower()
    kinds = {"weights": WEIGHTS, "pickle": PICKLES, "archive or data": ARCHIVES}
    return next((kind for kind, endings in kinds.items() if name.endswith(endings)), None)


def is_inside(folder: Path, path: Path) -> bool:
    """Whether a file of ``folder`` lies there, or in the blobs of the Hub's cache that the folder is part of."""
    real = Path(os.path.realpath(path))
    places = [Path(os.path.realpath(folder)), *([Path(os.path.realpath(blobs))] if (blobs := blobs_of(folder)) is not None else [])]
    return any(place in real.parents for place in places)


def module_folders(folder: Path) -> set[str]:
    """The subfolders that modules.json names."""
    path = folder / MODULES
    try:
        modules = read_json(path, unique=False) if path.is_file() else []
    except CheckpointError:
        return set()
    places = [module.get("path") for module in modules if isinstance(module, dict)] if isinstance(modules, list) else []
    return {place.strip("/") for place in places if isinstance(place, str) and re.fullmatch(r"[\w.-]+/?", place)} - {".", ".."}
