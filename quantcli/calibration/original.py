"""The unquantized model, run layer by layer next to the one being quantized, for asymmetric calibration."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial

from torch import Tensor

from quantcli.forward import Forward, HiddenStates, LoadedLayer
from quantcli.tensors import HEAD


class Original:
    """A second walk of the windows, through layers that nobody changes: what asymmetric calibration compares with.

    Memory: one more layer, and the hidden states of all windows once more.
    """

    def __init__(self, like: Forward, ids: Tensor, kept: Tensor | None = None) -> None:
        """Of the checkpoint of ``like``, run as that runs it; ``ids``: [n, T] int64; ``kept``: where a walk left off, [n, T, hidden]."""
        self._forward = like.another()
        self._layer: LoadedLayer | None = None
        self.states = HiddenStates.enter(self._forward, ids, kept)

    @contextmanager
    def layer(self, index: int) -> Iterator[None]:
        """Layer ``index`` is in memory, and at the end the windows have gone through it."""
        with self._forward.layer(index) as self._layer:
            yield
            self.states.advance(self._layer)
        self._layer = None

    def inputs(self, taps: Collection[str]) -> Iterator[dict[str, list[Tensor]]]:
        """What ``taps`` of the layer in memory read, a batch of windows at a time: tap → X₀ [n_tokens, in] of each time it is read."""
        assert self._layer is not None
        for hidden, ids in self.states.batches():
            seen: dict[str, list[Tensor]] = {tap: [] for tap in taps}
            self._layer.inputs(hidden, ids, partial(_keep, seen), taps)
            yield seen

    def head_inputs(self) -> Iterator[dict[str, list[Tensor]]]:
        """What the output embedding reads, the same way; for windows that have gone through all layers."""
        for hidden, _ in self.states.batches():
            seen: dict[str, list[Tensor]] = {HEAD: []}
            self._forward.observe_head(hidden, partial(_keep, seen, HEAD))
            yield seen


def _keep(seen: dict[str, list[Tensor]], tap: str, X: Tensor) -> None:
    seen[tap].append(X.clone())  # which is the layer's own again when it goes on
