"""How much each input of a weight counts when it is rounded: read tensor by tensor from an importance matrix or from statistics."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from typing_extensions import override

LEAST_SHARE = 2.0**-30
"""Of the largest importance of a matrix: what an input of none counts, too little to move a scale that others have a say in."""


def counted(importance: Tensor | None) -> Tensor | None:
    """``importance`` [in] or [n, in] without zeros: ones for a matrix of which nothing counts, else :data:`LEAST_SHARE` for its inputs that
    do not. Where nothing of a block counts, ggml's searches would choose a scale of zero, and the block would be lost on other text."""
    if importance is None or bool((importance > 0).all()):
        return importance
    largest = importance.amax(-1, keepdim=True)
    return torch.where(largest > 0, importance.maximum(largest * LEAST_SHARE), 1.0)


def is_silent(importance: Tensor) -> bool:
    """Whether nothing of a matrix counts, or of one of a stack of them."""
    return bool((importance == 0).all(-1).any())


class Row(Protocol):
    """The importance of one weight, wherever it lies."""

    def read(self) -> Tensor:
        """float32 [in], or [n, in] of a stack of n matrices."""


class ImportanceSource(Protocol):
    """A file that importance is taken from: llama.cpp's importance matrix, or the statistics of ``calibrate``."""

    def __len__(self) -> int:
        """How many tensors, or taps, it has figures for."""


@dataclass(frozen=True)
class Importance(Mapping[str, Tensor]):
    """Name of a weight → the mean squares of its inputs, float32 [in], or [n_experts, in] of a stack; read when asked for.

    ``file``: where they come from; ``datasets``: the texts they were measured on, as far as that is known; ``n_entries``: of the file;
    ``n_chunks``: windows of text; ``dataset``: what identifies that text (``dataset_sha256``, ``dataset_sketch``); ``notes``: what is
    missing.
    """

    rows: Mapping[str, Row]
    file: str = ""
    datasets: tuple[str, ...] = ()
    n_entries: int = 0
    n_chunks: int = 0
    dataset: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def fingerprint(self) -> str:
        """sha256 of every name and mean square."""
        digest = hashlib.sha256()
        for name in sorted(self):
            digest.update(name.encode() + self[name].numpy().tobytes())
        return digest.hexdigest()

    @override
    def __getitem__(self, name: str) -> Tensor:
        return self.rows[name].read()

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self.rows)

    @override
    def __len__(self) -> int:
        return len(self.rows)

    @override
    def __contains__(self, name: object) -> bool:
        return name in self.rows  # Mapping's own reads the row
