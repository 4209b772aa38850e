"""The statistics file of ``calibrate``: statistics of each tap, with the fingerprints of model and text; read tap by tap.

A safetensors file. Of each tap ``.importance``, ``.absmax``, ``.mean``, ``.fourth`` (not in old files) [in], ``.n_tokens`` [1] and, unless
left out, ``.H`` [in, in]; when asked for, ``.histogram`` (:mod:`quantcli.statistics.ranges`); in the header's metadata ``source`` (what the
user named), ``source_fingerprint`` (:meth:`Checkpoint.fingerprint`, which differs between fine-tunes of one model), ``dataset_sha256``,
``dataset_sketch`` (of overlap.py), ``n_samples``, ``seq_len`` and ``n_tokens``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from typing_extensions import override

from quantcli.checkpoint.checkpoint import Checkpoint, fingerprint
from quantcli.checkpoint.json_files import parse_json, shown
from quantcli.checkpoint.locations import Location, read_tensor
from quantcli.checkpoint.shards import read_header, read_header_text
from quantcli.errors import CheckpointError, RecipeError
from quantcli.output.writer import Writer
from quantcli.statistics.ranges import N_BINS
from quantcli.tensors import Stats, TensorSpec
from quantcli.text.overlap import sketch
from quantcli.text.texts import sha256

DIAGONAL_PARTS = ("importance", "absmax", "mean")

MARK = "quantcli.stats"
"""The key of the metadata by which the file is recognized."""


def stats_specs(widths: Mapping[str, int], *, hessian: bool, histograms: bool = False) -> list[TensorSpec]:
    """The tensors of the file. ``widths``: tap → in_features."""
    specs: list[TensorSpec] = []
    for tap, n in widths.items():
        specs += [TensorSpec.dense(f"{tap}.{part}", "F32", (n,)) for part in (*DIAGONAL_PARTS, "fourth")]
        specs.append(TensorSpec.dense(f"{tap}.n_tokens", "I64", (1,)))
        if histograms:
            specs.append(TensorSpec.dense(f"{tap}.histogram", "F32", (N_BINS,)))
        if hessian:
            specs.append(TensorSpec.dense(f"{tap}.H", "F32", (n, n)))
    return specs


def stats_metadata(source: Checkpoint, ids: Tensor) -> dict[str, str]:
    """The file's metadata: the model and the text measured. ``ids``: [n, T] int64, the token windows."""
    return {
        MARK: "1",
        "source": source.source,
        "source_fingerprint": source.fingerprint(),
        "dataset_sha256": sha256(ids),
        "dataset_sketch": sketch(ids),
        "n_samples": str(ids.shape[0]),
        "seq_len": str(ids.shape[1]),
        "n_tokens": str(ids.numel()),
    }


def put_stats(writer: Writer, stats: Mapping[str, Stats]) -> None:
    """Write the statistics of some taps."""
    for tap, s in stats.items():
        for part in (*DIAGONAL_PARTS, "fourth"):
            writer.put(f"{tap}.{part}", getattr(s, part).cpu())
        writer.put(f"{tap}.n_tokens", torch.tensor([s.n_tokens]))
        if s.histogram is not None:
            writer.put(f"{tap}.histogram", s.histogram.cpu())
        if s.H is not None:
            writer.put(f"{tap}.H", s.H.cpu())


class StatsFile(Mapping[str, Stats]):
    """Tap → Stats, each read on access; the header alone gives widths and which statistics there are.

    Raises :class:`CheckpointError` for a file that ``calibrate`` did not write.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path = Path(path)
        self._locations: dict[str, Location] = read_header(path)
        self.metadata: dict[str, str] = parse_json(path, read_header_text(path)[1]).get("__metadata__") or {}
        if not {MARK, "source", "dataset_sha256"} <= self.metadata.keys():
            raise CheckpointError(f"{path}: a safetensors file, but not one that `quantcli calibrate` wrote")
        self._taps = dict.fromkeys(name.removesuffix(".n_tokens") for name in self._locations if name.endswith(".n_tokens"))
        for tap in self._taps:
            self._check_parts(tap)

    @property
    def dataset_sha256(self) -> str:
        return self.metadata["dataset_sha256"]

    @property
    def dataset_sketch(self) -> str | None:
        """The sketch of the text measured on, for overlap with another text; None in an old file."""
        return self.metadata.get("dataset_sketch")

    def locations(self) -> Iterable[Location]:
        """Where the tensors of the file lie."""
        return self._locations.values()

    def fingerprint(self) -> str:
        """sha256 that differs between files of different content; reads a KiB of each tensor."""
        return hashlib.sha256(json.dumps([self.metadata, fingerprint(self.locations())], sort_keys=True).encode()).hexdigest()

    def has_hessian(self, tap: str) -> bool:
        """Whether H of ``tap`` was gathered."""
        return f"{tap}.H" in self._locations

    def has_histogram(self, tap: str) -> bool:
        """Whether the magnitudes of the inputs of ``tap`` were counted."""
        return f"{tap}.histogram" in self._locations

    def in_features(self, tap: str) -> int:
        """The width of the inputs of ``tap``. KeyError for a tap that was not measured."""
        return self._locations[f"{tap}.importance"].spec.n_elements

    def n_tokens(self, tap: str) -> int:
        """How many tokens ``tap`` saw. KeyError for a tap that was not measured."""
        return int(self._read(f"{tap}.n_tokens"))

    def check_tap(self, tap: str, in_features: int, *, needs: frozenset[str]) -> None:
        """Raise :class:`RecipeError` unless ``tap`` was measured, is ``in_features`` wide, and has what ``needs`` names. Reads no data."""
        if tap not in self:
            raise RecipeError(
                f"the statistics have no tap '{tap}'; they belong to another model, or to an older quantcli: calibrate this one, or "
                "exclude the tensor with --skip"
            )
        if self.in_features(tap) != in_features:
            raise RecipeError(
                f"the statistics of tap '{tap}' are {self.in_features(tap)} wide and the weight has {in_features} inputs; they belong to "
                "another model: calibrate this one"
            )
        if "H" in needs and not self.has_hessian(tap):
            raise RecipeError(f"{self.path} has no H of tap '{tap}', which the recipe needs; calibrate without --no-hessian")
        if "fourth" in needs and f"{tap}.fourth" not in self._locations:
            raise RecipeError(f"{self.path} is older than fourth moments, which protect_outliers needs; run `quantcli calibrate` again")
        if "histogram" in needs and not self.has_histogram(tap):
            raise RecipeError(f"{self.path} has no histogram of tap '{tap}', which input_range needs; calibrate with --histograms")

    def check_source(self, source: Checkpoint, *, warn: Callable[[str], None]) -> None:
        """Raise :class:`RecipeError` when other weights than those of ``source`` were measured; ``warn`` when an old file lacks that."""
        measured = shown(self.metadata["source"])
        if "source_fingerprint" not in self.metadata:
            warn(f"{self.path}: has no fingerprint, because it is old, so quantcli cannot check that {measured} had these weights")
        elif self.metadata["source_fingerprint"] != source.fingerprint():
            raise RecipeError(
                f"{self.path}: was measured on {measured}, whose weights are not those of {shown(source.source)}; "
                f"run `quantcli calibrate` on {shown(source.source)}, or quantize {measured} with it"
            )

    def diagonals(self, tap: str) -> Stats:
        """The statistics of ``tap`` without its H, which is not read."""
        if tap not in self:
            raise KeyError(tap)
        importance, absmax, mean = (self._read(f"{tap}.{part}") for part in DIAGONAL_PARTS)
        histogram = self._read(f"{tap}.histogram") if self.has_histogram(tap) else None
        fourth = self._read(f"{tap}.fourth") if f"{tap}.fourth" in self._locations else None
        return Stats(importance, absmax, mean, self.n_tokens(tap), None, histogram, fourth)

    @override
    def __getitem__(self, tap: str) -> Stats:
        stats = self.diagonals(tap)
        return replace(stats, H=self._read(f"{tap}.H")) if self.has_hessian(tap) else stats

    @override
    def __contains__(self, tap: object) -> bool:
        return tap in self._taps  # Mapping's own reads the tap

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self._taps)

    @override
    def __len__(self) -> int:
        return len(self._taps)

    def _check_parts(self, tap: str) -> None:
        """Raise :class:`CheckpointError` unless every part of ``tap`` is there, in the dtype and shape that the others give it."""
        n = self.in_features(tap) if f"{tap}.importance" in self._locations else 0
        expected: dict[str, tuple[str, tuple[int, ...]]] = dict.fromkeys(DIAGONAL_PARTS, ("F32", (n,)))
        expected |= {"n_tokens": ("I64", (1,))}
        if f"{tap}.fourth" in self._locations:
            expected["fourth"] = ("F32", (n,))
        if self.has_histogram(tap):
            expected["histogram"] = ("F32", (N_BINS,))
        if self.has_hessian(tap):
            expected["H"] = ("F32", (n, n))
        for part, (dtype, shape) in expected.items():
            location = self._locations.get(f"{tap}.{part}")
            if location is None or (location.spec.dtype, location.spec.shape) != (dtype, shape):
                got = "missing" if location is None else f"{location.spec.dtype} {list(location.spec.shape)}"
                raise CheckpointError(f"{self.path}: {tap}.{part} is {got}, expected {dtype} {list(shape)}; run `quantcli calibrate` again")

    def _read(self, name: str) -> Tensor:
        return read_tensor(self._locations[name])
