"""Token windows → Stats for each tap, measured layer by layer and streamed to a stats file.

Memory: one layer, the H of its taps, and the hidden states of all windows in float32 (n_tokens · hidden · 4 bytes).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from quantcli.checkpoint import Checkpoint
from quantcli.errors import CheckpointError, NumericsError
from quantcli.forward import Forward, LoadedLayer
from quantcli.json_files import parse_json
from quantcli.locations import Location, read_tensor
from quantcli.shards import file_layout, read_header, read_header_text
from quantcli.tensors import Stats, TensorSpec
from quantcli.texts import default_text, sha256, windows, windows_of
from quantcli.writer import Writer

__all__ = [
    "Activations",
    "LayerMeasured",
    "StatsFile",
    "StatsMeter",
    "calibrate",
    "default_text",
    "load_stats",
    "sha256",
    "windows",
    "windows_of",
]

BATCH_TOKENS = 2048
"""Tokens that a layer runs at once (at least one window): enough to keep a GEMM busy, few enough for the activations to stay small."""

BLOCK = 256
"""Rows of H that one GEMM adds to: only the blocks on and above the diagonal are computed, H being symmetric."""

DIAGONAL_PARTS = ("importance", "absmax", "mean")
DIAGONALS = frozenset(DIAGONAL_PARTS)
EVERYTHING = DIAGONALS | {"H"}

HEAD = "lm_head"
"""The tap of the output embedding, whatever its module is called."""


class StatsMeter:
    """Gathers :class:`Stats` of one tap over batches of its input.

    X is taken in float32; H is summed in float32 (each batch's product, then their sum), the rest in float64. Cost: n_tokens · in²
    multiplications.
    """

    def __init__(self, in_features: int, hessian: bool, device: torch.device | str = "cpu") -> None:
        self._n_tokens = 0
        self._H = torch.zeros(in_features, in_features, device=device) if hessian else None
        self._squares = torch.zeros(in_features, dtype=torch.float64, device=device)
        self._sum = torch.zeros(in_features, dtype=torch.float64, device=device)
        self._absmax = torch.zeros(in_features, device=device)

    def add(self, X: Tensor) -> None:
        """X: [n_tokens, in], any float dtype."""
        X = X.float()
        self._n_tokens += len(X)
        self._sum += X.sum(0)
        self._absmax = torch.maximum(self._absmax, torch.maximum(X.amax(0), -X.amin(0)))
        if self._H is None:
            self._squares += X.square().sum(0)
            return
        for a in range(0, len(self._H), BLOCK):
            # Not addmm_: its kernel would add every product to the large running sum and lose the small ones.
            self._H[a : a + BLOCK, a:] += X[:, a : a + BLOCK].T @ X[:, a:]

    def stats(self) -> Stats:
        """The means so far. The meter's H is handed over: it cannot gather more."""
        n = max(1, self._n_tokens)
        H, self._H = self._H, None
        if H is not None:
            for a in range(0, len(H), BLOCK):
                H[a : a + BLOCK, a : a + BLOCK].triu_()
                H[a:, a : a + BLOCK] += H[a : a + BLOCK, a:].T.tril(-1)
            H /= n
        importance = (self._squares / n).float() if H is None else H.diagonal().clone()
        return Stats(importance=importance, absmax=self._absmax, mean=(self._sum / n).float(), n_tokens=self._n_tokens, H=H)


class Activations:
    """The hidden states that all windows bring to the next layer.

    ``ids``: [n, T] int64; ``hidden``: [n, T, hidden] float32, replaced in place as the layers advance.
    """

    def __init__(self, ids: Tensor, hidden: Tensor) -> None:
        self.ids = ids
        self.hidden = hidden
        self._step = max(1, BATCH_TOKENS // ids.shape[1])

    @classmethod
    def embed(cls, forward: Forward, ids: Tensor) -> Activations:
        """What the first layer is given for ``ids``: [n, T] int64."""
        hidden: Tensor | None = None
        step = max(1, BATCH_TOKENS // ids.shape[1])
        for i in range(0, len(ids), step):
            batch = forward.embed(ids[i : i + step])
            hidden = torch.empty(*ids.shape, batch.shape[-1]) if hidden is None else hidden
            hidden[i : i + step] = batch
        assert hidden is not None
        return cls(ids, hidden)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Hidden states [b, T, hidden], a view, and ids [b, T]."""
        for i in range(0, len(self.ids), self._step):
            yield self.hidden[i : i + self._step], self.ids[i : i + self._step]

    def advance(self, layer: LoadedLayer) -> None:
        """Go through ``layer``."""
        for hidden, ids in self.batches():
            hidden.copy_(layer(hidden, ids))

    def measure(self, layer: LoadedLayer, taps: Sequence[str] | None = None, needs: frozenset[str] = EVERYTHING) -> dict[str, Stats]:
        """Stats of ``taps`` (None: all of the layer's) for the windows as they stand; H only where ``needs`` has it."""
        meters: dict[str, StatsMeter] = {}
        for hidden, ids in self.batches():
            layer.inputs(hidden, ids, partial(_gather, meters, needs), taps)
        return _finished(meters)

    def measure_and_advance(self, layer: LoadedLayer, needs: frozenset[str] = EVERYTHING) -> dict[str, Stats]:
        """Stats of all taps of ``layer`` while going through it: one run instead of two."""
        meters: dict[str, StatsMeter] = {}
        for hidden, ids in self.batches():
            hidden.copy_(layer.observe(hidden, ids, partial(_gather, meters, needs)))
        return _finished(meters)


def _finished(meters: Mapping[str, StatsMeter]) -> dict[str, Stats]:
    """Stats of every meter. Raises :class:`NumericsError` where one is not finite."""
    result: dict[str, Stats] = {}
    for tap, meter in meters.items():
        stats = meter.stats()
        total = stats.importance.sum() if stats.H is None else stats.H.sum()
        if not torch.isfinite(total) or not torch.isfinite(stats.mean).all():
            raise NumericsError(
                f"{tap}: its inputs have NaN or Inf, or squares beyond float32; the calibration text or a weight is at fault"
            )
        result[tap] = stats
    return result


@dataclass(frozen=True, slots=True)
class LayerMeasured:
    """One layer's taps are in the stats file."""

    name: str
    index: int
    n_layers: int
    n_taps: int
    seconds: float


def calibrate(
    checkpoint: Checkpoint,
    ids: Tensor,
    target: Path,
    *,
    hessian: bool = True,
    head: bool = False,
    device: str = "cpu",
    overwrite: bool = False,
) -> Iterator[LayerMeasured]:
    """Measure every tap of ``checkpoint`` on token windows ``ids`` [n, T] and write the statistics to ``target``.

    With ``head`` also what the output embedding reads. The file stands under its name only after the last event.
    """
    needs = EVERYTHING if hessian else DIAGONALS
    forward = Forward(checkpoint, device=device)
    with Writer(target, overwrite=overwrite, folder=False) as writer:
        writer.declare([file_layout(target.name, stats_specs(forward, hessian=hessian, head=head), _metadata(checkpoint, ids))])
        activations = Activations.embed(forward, ids)
        n_layers = len(forward.layers) + head
        for i, name in enumerate(forward.layers):
            started = time.perf_counter()
            with forward.layer(i) as layer:
                stats = activations.measure_and_advance(layer, needs)
            _put(writer, stats)
            yield LayerMeasured(name, i, n_layers, len(stats), time.perf_counter() - started)
        if head:
            started = time.perf_counter()
            _put(writer, measure_head(forward, activations, needs))
            yield LayerMeasured(HEAD, n_layers - 1, n_layers, 1, time.perf_counter() - started)
        writer.commit()


def measure_head(forward: Forward, activations: Activations, needs: frozenset[str] = EVERYTHING) -> dict[str, Stats]:
    """Stats of what the output embedding reads, for windows that have gone through all layers."""
    meters: dict[str, StatsMeter] = {}
    for hidden, _ in activations.batches():
        forward.observe_head(hidden, partial(_gather, meters, needs, HEAD))
    return _finished(meters)


def _gather(meters: dict[str, StatsMeter], needs: frozenset[str], tap: str, X: Tensor) -> None:
    """Add X [n_tokens, in] to the meter of ``tap``."""
    if tap not in meters:
        meters[tap] = StatsMeter(X.shape[-1], "H" in needs, X.device)
    meters[tap].add(X)


def stats_specs(forward: Forward, *, hessian: bool, head: bool) -> list[TensorSpec]:
    """The tensors of a stats file: of each tap ``.importance``, ``.absmax``, ``.mean`` [in], ``.n_tokens`` [1] and ``.H`` [in, in]."""
    widths = {tap: forward.checkpoint.specs[name].shape[-1] for name, tap in forward.taps.items()}
    if head:
        widths[HEAD] = forward.head_in_features
    specs: list[TensorSpec] = []
    for tap, n in widths.items():
        specs += [TensorSpec.dense(f"{tap}.{part}", "F32", (n,)) for part in DIAGONAL_PARTS]
        specs.append(TensorSpec.dense(f"{tap}.n_tokens", "I64", (1,)))
        if hessian:
            specs.append(TensorSpec.dense(f"{tap}.H", "F32", (n, n)))
    return specs


def _put(writer: Writer, stats: Mapping[str, Stats]) -> None:
    for tap, s in stats.items():
        for part in DIAGONAL_PARTS:
            writer.put(f"{tap}.{part}", getattr(s, part).cpu())
        writer.put(f"{tap}.n_tokens", torch.tensor([s.n_tokens]))
        if s.H is not None:
            writer.put(f"{tap}.H", s.H.cpu())


def _metadata(checkpoint: Checkpoint, ids: Tensor) -> dict[str, str]:
    return {
        "quantcli.stats": "1",
        "source": checkpoint.source,
        "dataset_sha256": sha256(ids),
        "n_samples": str(ids.shape[0]),
        "seq_len": str(ids.shape[1]),
        "n_tokens": str(ids.numel()),
    }


class StatsFile(Mapping[str, Stats]):
    """Tap → Stats of a stats file, each read when asked for.

    ``metadata``: ``source``, ``dataset_sha256``, ``n_samples``, ``seq_len``, ``n_tokens``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._locations: dict[str, Location] = read_header(path)
        self.metadata: dict[str, str] = parse_json(path, read_header_text(path)[1]).get("__metadata__", {})
        if "quantcli.stats" not in self.metadata:
            raise CheckpointError(f"{path}: a safetensors file, but not one that `quantcli calibrate` wrote")
        self._taps = dict.fromkeys(name.removesuffix(".n_tokens") for name in self._locations if name.endswith(".n_tokens"))
        for tap in self._taps:
            self._check(tap)

    @property
    def dataset_sha256(self) -> str:
        return self.metadata["dataset_sha256"]

    def __getitem__(self, tap: str) -> Stats:
        if tap not in self:
            raise KeyError(tap)
        H = self._read(f"{tap}.H") if f"{tap}.H" in self._locations else None
        importance, absmax, mean = (self._read(f"{tap}.{part}") for part in DIAGONAL_PARTS)
        return Stats(importance=importance, absmax=absmax, mean=mean, n_tokens=int(self._read(f"{tap}.n_tokens")), H=H)

    def __contains__(self, tap: object) -> bool:
        return tap in self._taps  # Mapping's own reads the tap

    def __iter__(self) -> Iterator[str]:
        return iter(self._taps)

    def __len__(self) -> int:
        return len(self._taps)

    def _check(self, tap: str) -> None:
        """Raise :class:`CheckpointError` unless every part of ``tap`` is there, in the dtype and shape that the others give it."""
        n = self._locations[f"{tap}.importance"].spec.n_elements if f"{tap}.importance" in self._locations else 0
        expected: dict[str, tuple[str, tuple[int, ...]]] = dict.fromkeys(DIAGONAL_PARTS, ("F32", (n,)))
        expected |= {"n_tokens": ("I64", (1,))}
        if f"{tap}.H" in self._locations:
            expected["H"] = ("F32", (n, n))
        for part, (dtype, shape) in expected.items():
            location = self._locations.get(f"{tap}.{part}")
            if location is None or (location.spec.dtype, location.spec.shape) != (dtype, shape):
                got = "missing" if location is None else f"{location.spec.dtype} {list(location.spec.shape)}"
                raise CheckpointError(f"{self.path}: {tap}.{part} is {got}, expected {dtype} {list(shape)}; run `quantcli calibrate` again")

    def _read(self, name: str) -> Tensor:
        return read_tensor(self._locations[name])


def load_stats(path: Path) -> StatsFile:
    """The statistics that ``calibrate`` wrote. Raises :class:`CheckpointError` for any other file."""
    return StatsFile(path)
