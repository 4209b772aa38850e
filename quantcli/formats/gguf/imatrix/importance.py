"""How much each input of a model's weights counts when they are rounded: from an importance matrix, or from ``calibrate``'s statistics."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from gguf import GGUFValueType, LlamaFileType
from torch import Tensor

from quantcli.archs import Architecture
from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.errors import RecipeError, about
from quantcli.formats.gguf.file.container import Field
from quantcli.formats.gguf.imatrix import imatrix
from quantcli.formats.gguf.imatrix.imatrix import Imatrix, Measured
from quantcli.formats.gguf.model.naming import slices_of
from quantcli.formats.gguf.types.chooser import DENSE, EMBEDDINGS, is_quantizable
from quantcli.importance import Importance, ImportanceSource
from quantcli.statistics.stats_file import StatsFile
from quantcli.tensors import Scheme, TensorSpec

NEEDY = ("iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs")
"""Types that give garbage unless they know which inputs count, so that llama-quantize refuses them too."""

UNMEASURED = (*EMBEDDINGS, "output.weight")
"""What llama-imatrix leaves out, usually or always, and what may go without importance whatever its type."""

ROUTER, EXPERTS = "ffn_gate_inp.weight", "ffn_up_exps.weight"
"""Ends of the GGUF names of a layer's router and of experts of it."""

MAX_TEXT_BYTES = 127
"""Of a string that llama-quantize puts into the metadata."""


@dataclass(frozen=True)
class Row:
    """The importance of one weight, in ``matrix`` under ``key``: matrix ``index`` of those that lie there, or all that lie there."""

    matrix: Imatrix | StatsFile
    key: str
    shape: tuple[int, ...]
    index: int | None

    def read(self) -> Tensor:
        if isinstance(self.matrix, StatsFile):
            stats = self.matrix.diagonals(self.key)
            return stats.importance if stats.n_tokens else torch.ones_like(stats.importance)
        if self.index is not None:
            return self.matrix.slice(self.key, self.index, self.shape[-1])
        return self.matrix[self.key].view(*self.shape)


def read(path: Path) -> ImportanceSource:
    """The importance matrix at ``path``, in either of llama.cpp's forms, or the statistics of ``calibrate``."""
    return StatsFile(path) if path.suffix == ".safetensors" else imatrix.read(path)


def of(
    matrix: ImportanceSource, source: Checkpoint, schemes: Mapping[str, Scheme], names: Mapping[str, str], arch: Architecture
) -> Importance:
    """What ``matrix``, an importance matrix or a statistics file, states about the weights of ``source`` that ``schemes`` quantize.

    ``names``: HF → GGUF name of every tensor, experts of a tensor in their order. :class:`RecipeError` for a file of another model.
    """
    quantized = {hf: target for hf, target in names.items() if hf in schemes and schemes[hf].qtype.upper() not in DENSE}
    if isinstance(matrix, StatsFile):
        return of_stats(matrix, source, quantized, arch)
    assert isinstance(matrix, Imatrix)
    return of_imatrix(matrix, source, quantized)


def of_imatrix(matrix: Imatrix, source: Checkpoint, names: Mapping[str, str]) -> Importance:
    """The rows of an importance matrix, which knows tensors by their GGUF ``names``."""
    slices = slices_of(names)
    rows: dict[str, Row] = {}
    for target, parts in slices.items():
        *stack, _, in_features = source.specs[parts[0]].shape
        shape = (len(parts), in_features) if len(parts) > 1 else (*stack, in_features)
        if target not in matrix or (target in EMBEDDINGS and matrix.n_values(target) != math.prod(shape)):
            continue
        if matrix.n_values(target) != math.prod(shape):
            raise RecipeError(
                f"{matrix.path}: {target} has {matrix.n_values(target)} values, and {parts[0]} needs {math.prod(shape)}; it belongs to "
                "another model: measure this one"
            )
        rows |= {hf: Row(matrix, target, shape, index if len(parts) > 1 else None) for index, hf in enumerate(parts)}
    missing = [target for target in slices if target not in matrix and target not in UNMEASURED]
    if missing and not rows:
        raise RecipeError(f"{matrix.path}: has no entry for any of this model's tensors, such as {missing[0]}; measure this model")
    notes = tuple(f"{matrix.path}: no entry for {target}, which is rounded as if all its inputs counted alike" for target in missing)
    for target in slices:
        if target in matrix and (unseen := matrix.unseen(target)):
            notes += (f"{matrix.path}: {target}: no token reached {experts(unseen)}, whose inputs all count alike",)
    dataset = {key: str(field.value) for key, field in matrix.own_fields.items()}
    return Importance(rows, str(matrix.path), matrix.datasets, len(matrix), matrix.n_chunks, dataset, notes)


def of_stats(stats: StatsFile, source: Checkpoint, names: Mapping[str, str], arch: Architecture) -> Importance:
    """The rows of ``calibrate``'s statistics, which know an input by the first linear that reads it."""
    notes: list[str] = []
    stats.check_source(source, warn=notes.append)
    rows: dict[str, Row] = {}
    for hf, target in names.items():
        if (tap := arch.tap(hf)) is not None and tap in stats:
            with about(hf):
                stats.check_tap(tap, source.specs[hf].shape[-1], needs=frozenset({"importance"}))
            rows[hf] = Row(stats, tap, (source.specs[hf].shape[-1],), None)
        elif target not in UNMEASURED:
            notes.append(f"{stats.path}: no statistics of what {hf} reads, which is rounded as if all its inputs counted alike")
    taps = dict.fromkeys(row.key for row in rows.values())
    notes += [f"{stats.path}: no token reached {tap}, whose inputs all count alike" for tap in taps if stats.n_tokens(tap) == 0]
    n_chunks = int(stats.metadata.get("n_samples", 0))
    return Importance(rows, str(stats.path), (), len(stats), n_chunks, dataset_of(stats), tuple(notes))


def dataset_of(stats: StatsFile) -> dict[str, str]:
    """What shows another text's overlap with the one that ``stats`` were measured on, by the keys of a GGUF file."""
    return {key: stats.metadata[ours] for key in imatrix.OURS if (ours := key.removeprefix("quantcli.")) in stats.metadata}


def measured(stats: StatsFile, taps: Mapping[str, str], names: Mapping[str, str]) -> dict[str, Measured]:
    """The statistics as an importance matrix has them: GGUF name → what the tensor's matrices read.

    ``taps``: HF name of a weight → its tap; ``names``: HF → GGUF name, experts of a tensor in their order. A router has no tap: it reads
    what its experts do, every token once where each of these goes to several of them.
    """
    read_by = {target: [taps[hf] for hf in parts if taps.get(hf) in stats] for target, parts in slices_of(names).items()}
    found: dict[str, Measured] = {}
    for target, parts in read_by.items():
        if parts:
            n_tokens = [stats.n_tokens(tap) for tap in parts]
            found[target] = Measured(n_tokens, stats.in_features(parts[0]), partial(mean_squares, stats, parts))
        elif target.endswith(ROUTER) and (read := read_by.get(target.removesuffix(ROUTER) + EXPERTS)):
            found[target] = Measured(
                [int(stats.metadata["n_tokens"])], stats.in_features(read[0]), partial(mean_square_of_all, stats, read)
            )
    return found


def mean_squares(stats: StatsFile, taps: Sequence[str]) -> Tensor:
    """[n_taps, in]."""
    return torch.stack([stats.diagonals(tap).importance for tap in taps])


def mean_square_of_all(stats: StatsFile, taps: Sequence[str]) -> Tensor:
    """[1, in], over what all ``taps`` read."""
    n_tokens = torch.tensor([stats.n_tokens(tap) for tap in taps], dtype=torch.float64)[:, None]
    return ((mean_squares(stats, taps) * n_tokens).sum(0, keepdim=True) / n_tokens.sum()).float()


def unmeasured(measured: Collection[str], names: Mapping[str, str], specs: Mapping[str, TensorSpec]) -> list[str]:
    """The GGUF names of matrices that ``measured`` lacks and a quantizer would look for."""
    matrices = dict.fromkeys(target for hf, target in names.items() if is_quantizable(target, specs[hf].shape))
    return [target for target in matrices if target not in measured and target not in UNMEASURED]


def described(importance: Importance) -> dict[str, Field]:
    """The keys by which llama-quantize records its importance matrix, and quantcli's own of the text."""
    fields = {"quantize.imatrix.file": text(importance.file)}
    if importance.datasets:
        fields["quantize.imatrix.dataset"] = text(importance.datasets[0])
    fields["quantize.imatrix.entries_count"] = Field(GGUFValueType.UINT32, importance.n_entries)
    if importance.n_chunks > 0:
        fields["quantize.imatrix.chunks_count"] = Field(GGUFValueType.UINT32, importance.n_chunks)
    return fields | text_fields(importance.dataset)


def text_fields(dataset: Mapping[str, str]) -> dict[str, Field]:
    return {key: Field(GGUFValueType.STRING, value) for key, value in dataset.items()}


def text(value: str) -> Field:
    return Field(GGUFValueType.STRING, value.encode("utf-8", "surrogateescape")[:MAX_TEXT_BYTES].decode("utf-8", "surrogateescape"))


def experts(numbers: Sequence[int]) -> str:
    return f"expert{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def needy_types(file_type: int) -> tuple[str, ...]:
    """:data:`NEEDY`, and what llama-quantize adds in files of one type."""
    return (*NEEDY, "q2_k") if file_type == LlamaFileType.MOSTLY_Q2_K_S else NEEDY


def check(importance: Collection[str], schemes: Mapping[str, Scheme], names: Mapping[str, str], file_type: int) -> None:
    """Raise :class:`RecipeError` for a weight whose type needs its importance, and that has none. ``names``: HF → GGUF name."""
    needy = needy_types(file_type)
    for hf, target in names.items():
        if hf in schemes and schemes[hf].qtype in needy and target not in UNMEASURED and hf not in importance:
            raise RecipeError(
                f"{hf} ({target}): {schemes[hf].qtype.upper()} gives garbage where it is not known which inputs count, and there is no "
                "entry for it; give --imatrix FILE (from llama-imatrix, or from quantcli calibrate)"
            )
