"""Which op of a layer can take over a scale of a tap's inputs: found by trying, on the layer's own weights.

AWQ and SmoothQuant divide what a linear reads by s, multiply its columns by s, and fold 1/s into the op that makes the input: a norm, the
linear of the values (grouped-query heads share its rows), the up half of a gated MLP. A table of such pairs covers the models that
somebody thought of. Here every op of the right width is tried: scale, fold, run the layer. If its output stays what it was, for random
scales on random hidden states, nothing else reads that input and nothing bends it on the way. A gate behind SiLU fails, a router that
reads the same norm fails, ReLU between two linears holds. Float32 keeps such an output to 1e-5 of what the scale alone does to it; what
is wrong anywhere changes about as much as that.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantcli import archs
from quantcli.passes import _basis
from quantcli.tensors import Layer, Prev

if TYPE_CHECKING:
    from quantcli.forward.layer import LoadedLayer
    from quantcli.forward.model import Forward

N_TOKENS = 24
"""Tokens of a trial: enough that attention mixes them and that experts get some."""

TOLERANCE = 1e-3
"""What of the effect of a scale may be left after folding it, in the norm of the layer's output."""


class Absorbers:
    """``of(index)``: tap → :class:`Prev` for the taps of layer ``index``. Layers of the same tensor names and shapes are tried once."""

    def __init__(self, forward: Forward) -> None:
        self._forward = forward
        self._known: dict[tuple[tuple[str, tuple[int, ...]], ...], dict[str, Prev]] = {}

    def of(self, index: int) -> dict[str, Prev]:
        prefix = self._forward.layers[index] + "."
        specs = self._forward.checkpoint.specs
        shape = tuple((name.removeprefix(prefix), specs[name].shape) for name in self._forward.layer_tensors(index))
        if shape not in self._known:
            with self._forward.layer(index) as layer:
                found = _Trial(self._forward, index, layer).all()
            self._known[shape] = {tap.removeprefix(prefix): moved(prev, prefix, "") for tap, prev in found.items()}
        return {prefix + tap: moved(prev, "", prefix) for tap, prev in self._known[shape].items()}


def moved(prev: Prev, old: str, new: str) -> Prev:
    """``prev`` with names that begin with ``new`` where they began with ``old``."""
    return replace(prev, names=tuple(new + name.removeprefix(old) if name.startswith(old) else name for name in prev.names))


class _Trial:
    """One layer with its weights, run again and again on the same hidden states."""

    def __init__(self, forward: Forward, index: int, layer: LoadedLayer) -> None:
        self.layer, self.config = layer, forward.checkpoint.config
        self.shapes = {name: forward.checkpoint.specs[name].shape for name in forward.layer_tensors(index)}
        self.readers: dict[str, list[str]] = {}
        for name, tap in forward.taps.items():
            if name in self.shapes:
                self.readers.setdefault(tap, []).append(name)
        self.random = torch.Generator().manual_seed(0)
        self.hidden = torch.randn(1, N_TOKENS, forward.hidden_size, generator=self.random)
        self.ids = torch.arange(N_TOKENS)[None] % forward.vocab_size
        self.output = layer(self.hidden, self.ids)
        self.declared = declared(forward.checkpoint.config)

    def all(self) -> dict[str, Prev]:
        """Tap → the first op that holds. Of numbered modules (experts) that are alike the first that any token reaches speaks for all."""
        found: dict[str, Prev] = {}
        settled: dict[str, tuple[str, Prev | None]] = {}
        for tap in self.readers:
            kind = re.sub(r"(?<=\.)\d+(?=\.)", "#", tap)
            if kind not in settled:
                prev, was_reached = self.first(tap)
                if was_reached:
                    settled[kind] = (parent(tap), prev)
            if kind in settled:
                twin, prev = settled[kind]
                found |= {} if prev is None else {tap: moved(prev, twin, parent(tap))}
        return found

    def first(self, tap: str) -> tuple[Prev | None, bool]:
        """The first op that takes over a scale of ``tap``, and whether a scale of ``tap`` shows in the output at all."""
        reached = True
        for prev in self.candidates(tap):
            s = torch.empty(len(prev.channel)).uniform_(-1, 1, generator=self.random).exp2()
            s = _basis.shared(s, prev, "mean")
            reached = (effect := self.change(tap, s, prev, folded=False)) > 0
            if not reached or self.change(tap, s, prev, folded=True) < TOLERANCE * effect:
                return (prev if reached else None), reached
        return None, reached

    def change(self, tap: str, s: Tensor, prev: Prev, *, folded: bool) -> float:
        """How far the layer's output moves when the columns that read ``tap`` are multiplied by ``s``, ``folded`` into prev or not."""
        touched = (*self.readers[tap], *prev.names)
        was = {name: self.layer.get(name) for name in touched}
        unit = Layer("", {name: W.float() for name, W in was.items()}, {}, dict.fromkeys(self.readers[tap], tap), prev={tap: prev})
        _basis.fold(unit, tap, s)
        for name in touched if folded else self.readers[tap]:
            self.layer.set(name, unit.tensors[name])
        output = self.layer(self.hidden, self.ids)
        for name in touched:
            self.layer.set(name, was[name])
        return float((output - self.output).double().norm())

    def candidates(self, tap: str) -> Iterator[Prev]:
        """Every op whose output could be what ``tap`` reads, likely ones first."""
        width = self.shapes[self.readers[tap][0]][-1]
        hinted = self.declared.get(tap.removeprefix(self.layer.name + "."))
        near = sorted(self.shapes, key=lambda name: (module_of(name) != f"{self.layer.name}.{hinted}", parent(name) != parent(tap)))
        for name in near:
            shape = self.shapes[name]
            if name in self.readers[tap] or not name.endswith(".weight") or numbers(parent(name)) != numbers(parent(tap)):
                continue
            bias = module_of(name) + ".bias"
            names = (name, bias) if bias in self.shapes else (name,)
            if len(shape) == 1 and shape[0] == width:
                yield Prev(names, torch.arange(width))
                yield Prev(names, torch.arange(width), 1.0)
            elif len(shape) == 2:
                yield from (Prev(names, channel) for channel in self.channels(shape[0], width))

    def channels(self, n_rows: int, width: int) -> Iterator[Tensor]:
        """How the rows of a linear may make ``width`` inputs: one each, one for all heads of a group, or the last part of a fused one."""
        if n_rows == width:
            yield torch.arange(width)
        if n_rows == 2 * width:
            yield torch.arange(width, 2 * width)
            yield torch.arange(width)
        config = self.config.get("text_config") or self.config
        heads = config.get("num_attention_heads") or 1
        kv_heads = config.get("num_key_value_heads") or heads
        if width % heads or heads % kv_heads:
            return
        kv = torch.arange(width // heads * kv_heads).view(kv_heads, -1).repeat_interleave(heads // kv_heads, 0).flatten()
        n_kv = width // heads * kv_heads
        if n_rows == n_kv != width:
            yield kv
        if n_rows == width + 2 * n_kv:
            yield width + n_kv + kv  # [q; k; v]


def declared(config: Mapping) -> dict[str, str]:
    """Tap → the module that the architecture's literal, where there is one, says can absorb a scale."""
    arch = archs.of(config)
    return {} if arch is None else {linear.tap: linear.prev for linear in arch.linears if linear.prev}


def module_of(name: str) -> str:
    return name.rpartition(".")[0]


def parent(name: str) -> str:
    """The module that holds the module of tensor or tap ``name``."""
    return module_of(name.removesuffix(".weight"))


def numbers(name: str) -> list[str]:
    """The numbers in a name: of its layer, of its expert."""
    return re.findall(r"(?<=\.)\d+(?=\.|$)", name)
