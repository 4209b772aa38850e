"""Loads and frees a model's weights: small tensors stay in memory, the embedding, a layer or the head while it is needed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.forward.names import NameMap, Source
from quantcli.forward.skeleton import drop, dtypes, put
from quantcli.forward.stack import Stack

EMBEDDING, HEAD, REST = "embedding", "head", "rest"

Part = int | str
"""What is loaded and dropped at once: a layer by its number, :data:`EMBEDDING`, :data:`HEAD`, or :data:`REST`, always in memory."""


class Weights:
    """The weights of ``stack``'s model, in memory part by part; in ``dtype``, or the one that the model keeps a tensor in, on ``device``.

    ``checkpoint``: where they are read; ``names``: how the model's tensors are made from those on disk.
    """

    def __init__(self, stack: Stack, names: NameMap, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        self.checkpoint, self.names = checkpoint, names
        self.dtype, self.device = dtype, device
        self._model = stack.model
        self._dtypes = dtypes(self._model, dtype)
        self._parts = self._divide(stack)
        self._needed: Part | None = None  # EMBEDDING or HEAD, where one of them is in memory
        for name, buffer in list(self._model.named_buffers()):
            put(self._model, name, buffer.to(device))
        for name in names.absent:
            put(self._model, name, torch.zeros_like(self.tensor(name), device=device))
        self.drop(EMBEDDING)
        self.load(REST)

    def sources(self, part: Part) -> list[Source]:
        """Where the tensors of ``part`` come from, each source once."""
        of = self.names.of
        return list({id(of[name]): of[name] for name in self._parts[part] if name in of}.values())

    def tensor(self, target: str) -> Tensor:
        """The model's tensor ``target`` as it is in memory."""
        live: Tensor = self._model.get_parameter_or_buffer(target)
        return live.data

    def rebuild(self, source: Source, part: Part, weights: Mapping[str, Tensor]) -> None:
        """Make the tensors of ``part`` that come from ``source``: from ``weights``, by disk name, where given, else from the checkpoint."""

        def read(name: str) -> Tensor:
            tensor = weights[name] if name in weights else self.checkpoint.read(name)
            return tensor.to(device=self.device, dtype=self._dtypes[source.target])

        made = source.load(read, self._model)
        for name in self._parts[part]:
            if self.names.of.get(name) is source:
                put(self._model, name, made[name if name in made else source.target])  # a tied name is not in made

    def load(self, part: Part) -> None:
        """Read ``part`` into memory."""
        for source in self.sources(part):
            self.rebuild(source, part, {})

    def drop(self, part: Part) -> None:
        """Free the memory of ``part``."""
        # Some models ask their embedding for its device, so it stays on it.
        device = self.device if part == EMBEDDING else torch.device("meta")
        for name in self._parts[part]:
            drop(self._model, name, device)

    def need(self, part: Part) -> None:
        """Load ``part``, :data:`EMBEDDING` or :data:`HEAD`, and drop the other one."""
        if self._needed == part:
            return
        self.release()
        self.load(part)
        self._needed = part

    def release(self) -> None:
        """Drop the embedding or the head, whichever is in memory."""
        if self._needed is not None:
            self.drop(self._needed)
        self._needed = None

    def _divide(self, stack: Stack) -> dict[Part, list[str]]:
        """The model's names of each part's tensors."""
        prefixes: dict[str, Part] = {f"{stack.name}.{i}.": i for i in range(len(stack.layers))}
        prefixes |= {f"{stack.module_name(stack.embedding)}.": EMBEDDING}
        if stack.head is not None:
            prefixes |= {f"{stack.module_name(stack.head)}.": HEAD}
        parts: dict[Part, list[str]] = {part: [] for part in (*prefixes.values(), HEAD, REST)}
        starts = {len(prefix) for prefix in prefixes}
        for name in self._dtypes:
            part = next((prefixes[name[:n]] for n in starts if name[:n] in prefixes), REST)
            parts[part].append(name)
        return parts
