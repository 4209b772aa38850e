"""Hidden states of token windows between decoder layers: embedded, then advanced layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from quantcli.forward.model import Forward

BATCH_TOKENS = 2048
"""Tokens that a layer runs at once (at least one window): enough to keep a GEMM busy, few enough for the activations to stay small."""


def kept_on(device: torch.device, n_bytes: int) -> torch.device:
    """Where hidden states of ``n_bytes`` are stored between layers: on a GPU when they take no more than half of its free memory."""
    if device.type == "cuda" and n_bytes > torch.cuda.mem_get_info(device)[0] // 2:
        return torch.device("cpu")
    return device


def at_once(ids: Tensor) -> list[slice]:
    """The windows of ``ids`` [n, T] in the batches that a layer runs: about :data:`BATCH_TOKENS` each."""
    step = max(1, BATCH_TOKENS // ids.shape[1])
    return [slice(i, i + step) for i in range(0, len(ids), step)]


class HiddenStates:
    """The hidden states of all windows that the next layer reads.

    ``ids``: [n, T] int64; ``hidden``: [n, T, hidden] in the run's dtype, on its device if that has enough memory, overwritten as the
    windows advance.
    """

    def __init__(self, ids: Tensor, hidden: Tensor) -> None:
        self.ids = ids
        self.hidden = hidden

    @classmethod
    def embed(cls, forward: Forward, ids: Tensor) -> HiddenStates:
        """The input of the first layer for ``ids``: [n, T] int64."""
        hidden: Tensor | None = None
        for windows in at_once(ids):
            batch = forward.embed(ids[windows])
            if hidden is None:
                shape = (*ids.shape, batch.shape[-1])
                hidden = torch.empty(shape, dtype=batch.dtype, device=kept_on(batch.device, math.prod(shape) * batch.itemsize))
            hidden[windows] = batch
        assert hidden is not None
        return cls(ids, hidden)

    @classmethod
    def enter(cls, forward: Forward, ids: Tensor, kept: Tensor | None) -> HiddenStates:
        """The input of the first layer for ``ids`` [n, T], or where a walk left off: ``kept`` [n, T, hidden]."""
        if kept is None:
            return cls.embed(forward, ids)
        return cls(ids, kept.to(kept_on(forward.device, kept.nbytes)))

    def of(self, windows: Tensor) -> HiddenStates:
        """A copy of some ``windows`` only, given by their numbers [k] int64."""
        return HiddenStates(self.ids[windows], self.hidden[windows])

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Hidden states [b, T, hidden], a view, and ids [b, T]."""
        for windows in at_once(self.ids):
            yield self.hidden[windows], self.ids[windows]

    def advance(self, run: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Advance through a layer: ``run(hidden, ids)`` is a :class:`~quantcli.forward.layer.LoadedLayer`, or returns what one returns."""
        for hidden, ids in self.batches():
            hidden.copy_(run(hidden, ids))
