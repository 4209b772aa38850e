"""Finds the op of a layer that can absorb a scale of a tap's inputs, by trial on the layer's own weights.

AWQ and SmoothQuant divide what a linear reads by s, multiply its columns by s, and fold 1/s into the op that makes the input: a norm, the
linear of the values (grouped-query heads share its rows), the up half of a gated MLP. A table of such pairs covers known models only.
Here every op of the right width is tried: scale, fold, run the layer. If the output is unchanged, for random scales on random hidden
states, then nothing else reads that input and no nonlinearity lies between. A gate behind SiLU fails, ReLU between two linears passes.
In float32 such an output is equal to within 1e-5 of the effect of the scale alone; a wrong op changes it by about the whole effect.

A norm before experts feeds all of them, their router and often a shared expert, which are scaled together or not at all. The taps that it
feeds are found by dividing the norm and comparing what the taps read. With the other dense matrices of that width in the experts' module
they are tried as one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from quantcli import archs
from quantcli.experts import expert_of
from quantcli.forward.layer import LoadedLayer
from quantcli.forward.model import Forward
from quantcli.passes.shared import basis
from quantcli.tensors import Absorber, Layer

N_TOKENS = 24
"""Tokens of a trial: enough that attention mixes them and that some reach experts."""

TOLERANCE = 1e-3
"""The share of a scale's effect on the layer's output (its norm) that may remain after folding."""


class Absorbers:
    """``of(index)``: tap → :class:`Absorber` for the taps of layer ``index``. Layers of the same tensor names and shapes are tried once."""

    def __init__(self, forward: Forward) -> None:
        self._forward = forward
        self._known: dict[tuple[tuple[str, tuple[int, ...]], ...], dict[str, Absorber]] = {}

    def of(self, index: int) -> dict[str, Absorber]:
        prefix = self._forward.layers[index] + "."
        specs = self._forward.checkpoint.specs
        shape = tuple((name.removeprefix(prefix), specs[name].shape) for name in self._forward.layer_tensors(index))
        if shape not in self._known:
            with self._forward.layer(index) as layer:
                found = _Trial(self._forward, index, layer).all()
            self._known[shape] = {tap.removeprefix(prefix): moved(absorber, prefix, "") for tap, absorber in found.items()}
        return {prefix + tap: moved(absorber, "", prefix) for tap, absorber in self._known[shape].items()}


def moved(absorber: Absorber, old: str, new: str) -> Absorber:
    """``absorber`` with names that begin with ``new`` where they began with ``old``."""

    def at(name: str) -> str:
        return new + name.removeprefix(old) if name.startswith(old) else name

    readers = {at(name): at(tap) for name, tap in absorber.readers.items()}
    return replace(absorber, names=tuple(at(name) for name in absorber.names), readers=readers)


class _Trial:
    """One layer with its weights, run again and again on the same hidden states."""

    def __init__(self, forward: Forward, index: int, layer: LoadedLayer) -> None:
        self.layer, self.config = layer, forward.checkpoint.config
        self.shapes = {name: forward.checkpoint.specs[name].shape for name in forward.layer_tensors(index)}
        self.readers: dict[str, list[str]] = {}
        for name, tap in forward.taps.items():
            if name in self.shapes and name not in forward.turned:
                self.readers.setdefault(tap, []).append(name)
        self.random = torch.Generator().manual_seed(0)
        self.hidden = torch.randn(1, N_TOKENS, forward.hidden_size, generator=self.random)
        self.ids = torch.arange(N_TOKENS)[None] % forward.vocab_size
        self.output = layer(self.hidden, self.ids)
        self.declared = declared(forward.checkpoint.config)
        self.untapped = [name for name in forward.untapped if len(self.shapes.get(name, ())) == 2]

    def all(self) -> dict[str, Absorber]:
        """Tap → the first op that passes. Of numbered modules (experts) only the first that any token reaches is tried, for all of them."""
        found: dict[str, Absorber] = {}
        settled: dict[str, tuple[str, Absorber | None]] = {}
        for tap in self.readers:
            kind = kind_of(tap)
            if kind not in settled:
                absorber, was_reached = self.first(tap)
                if was_reached:
                    settled[kind] = (parent(tap), absorber)
            if kind in settled:
                tried, absorber = settled[kind]
                found |= {} if absorber is None else {tap: moved(absorber, tried, parent(tap))}
        return found | self.before_experts()

    def before_experts(self) -> dict[str, Absorber]:
        """Tap → the norm that feeds experts, for all taps that it feeds."""
        found: dict[str, Absorber] = {}
        widths = {self.width(tap) for tap in self.readers if expert_of(tap)}
        if not widths:
            return found
        read = self.read_by_kind()
        norms = [name for name in self.shapes if numbers(parent(name)) == numbers(self.layer.name)]
        for norm in (norm for name in norms for width in widths for norm in self.norms(name, width)):
            absorber = replace(norm, readers=self.fed_by(norm, read))
            if absorber.readers and found.keys().isdisjoint(absorber.readers.values()) and self.holds(absorber, absorber.readers)[0]:
                found |= dict.fromkeys(absorber.readers.values(), absorber)
        return found

    def fed_by(self, norm: Absorber, read: Mapping[str, Tensor]) -> dict[str, str]:
        """Matrix → tap for all that reads ``norm``, if experts do; ``read``: what each kind of tap reads with the norm unchanged.

        With a divided norm the router sends tokens to other experts. So each row is searched among those that any expert received.
        """
        was = {name: self.layer.get(name) for name in norm.names}
        unit = Layer("", {name: W.float() for name, W in was.items()}, {}, absorbers={"": norm})
        s = basis.fold(unit, "", self.random_scales(norm)).float()
        for name in was:
            self.layer.set(name, unit.tensors[name])
        divided = {kind: X * s for kind, X in self.read_by_kind().items() if kind in read and X.shape[-1] == len(s)}
        for name, W in was.items():
            self.layer.set(name, W)
        taps = [tap for tap in self.readers if (kind := kind_of(tap)) in divided and are_among(divided[kind], read[kind])]
        stacks = [at.stack for tap in taps if (at := expert_of(tap))]
        if not stacks:
            return {}
        untapped = [name for name in self.untapped if name.startswith(module_of(stacks[0]) + ".") and self.shapes[name][-1] == len(s)]
        return {name: tap for tap in taps for name in self.readers[tap]} | dict.fromkeys(untapped, taps[0])

    def read_by_kind(self) -> dict[str, Tensor]:
        """Kind of tap → the rows [n, in] that taps of that kind read."""
        seen: dict[str, list[Tensor]] = {}
        self.layer.inputs(self.hidden, self.ids, lambda tap, X: seen.setdefault(kind_of(tap), []).append(X.clone()))
        return {kind: torch.cat(Xs) for kind, Xs in seen.items()}

    def first(self, tap: str) -> tuple[Absorber | None, bool]:
        """The first op that absorbs a scale of ``tap``, and whether a scale of ``tap`` changes the output at all."""
        reached = True
        for absorber in self.candidates(tap):
            holds, reached = self.holds(absorber, dict.fromkeys(self.readers[tap], tap))
            if holds or not reached:
                return (absorber if holds else None), reached
        return None, reached

    def holds(self, absorber: Absorber, readers: Mapping[str, str]) -> tuple[bool, bool]:
        """Whether ``absorber`` absorbs a scale of all ``readers`` (matrix → tap), and whether the scale changes the output at all."""
        s = self.random_scales(absorber)
        effect = self.change(readers, s, absorber, folded=False)
        return effect > 0 and self.change(readers, s, absorber, folded=True) < TOLERANCE * effect, effect > 0

    def random_scales(self, absorber: Absorber) -> Tensor:
        s = torch.empty(len(absorber.channel)).uniform_(-1, 1, generator=self.random).exp2()
        return basis.shared(s, absorber, "mean")

    def change(self, readers: Mapping[str, str], s: Tensor, absorber: Absorber, *, folded: bool) -> float:
        """How far the layer's output moves when the columns of ``readers`` are multiplied by ``s``, ``folded`` into ``absorber`` or not."""
        touched = (*readers, *absorber.names)
        was = {name: self.layer.get(name) for name in touched}
        tensors = {name: W.float() for name, W in was.items()}
        unit = Layer("", tensors, {}, dict(readers), absorbers=dict.fromkeys(readers.values(), absorber))
        basis.fold(unit, next(iter(readers.values())), s)
        for name in touched if folded else readers:
            self.layer.set(name, unit.tensors[name])
        output = self.layer(self.hidden, self.ids)
        for name in touched:
            self.layer.set(name, was[name])
        return float((output - self.output).double().norm())

    def candidates(self, tap: str) -> Iterator[Absorber]:
        """Every op whose output ``tap`` may read, likely ones first."""
        width = self.width(tap)
        hinted = self.declared.get(tap.removeprefix(self.layer.name + "."))
        near = sorted(self.shapes, key=lambda name: (module_of(name) != f"{self.layer.name}.{hinted}", parent(name) != parent(tap)))
        for name in near:
            shape = self.shapes[name]
            if name in self.readers[tap] or not name.endswith(".weight") or numbers(parent(name)) != numbers(parent(tap)):
                continue
            yield from self.norms(name, width)
            if len(shape) == 2:
                yield from (Absorber(self.with_bias(name), channel) for channel in self.channels(shape[0], width))

    def norms(self, name: str, width: int) -> Iterator[Absorber]:
        """Tensor ``name`` as the weight of a norm of ``width`` channels, where it may be one."""
        if self.shapes[name] == (width,) and name.endswith(".weight"):
            yield from (Absorber(self.with_bias(name), torch.arange(width), offset) for offset in (0.0, 1.0))

    def with_bias(self, weight: str) -> tuple[str, ...]:
        bias = module_of(weight) + ".bias"
        return (weight, bias) if bias in self.shapes else (weight,)

    def width(self, tap: str) -> int:
        return self.shapes[self.readers[tap][0]][-1]

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


def declared(config: Mapping[str, Any]) -> dict[str, str]:
    """Tap → the module that can absorb a scale, as the architecture's literal declares it, if there is one."""
    arch = archs.of(config)
    return {} if arch is None else {linear.tap: linear.absorber for linear in arch.linears if linear.absorber}


def module_of(name: str) -> str:
    return name.rpartition(".")[0]


def kind_of(tap: str) -> str:
    """``tap`` with its numbers replaced: the same name for all experts."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "#", tap)


def are_among(rows: Tensor, others: Tensor) -> bool:
    """Whether each of ``rows`` [n, in] is one of ``others`` [m, in], but for rounding."""
    nearest = torch.cdist(rows.double(), others.double()).amin(1)
    return bool((nearest < TOLERANCE * rows.double().norm(dim=1)).all())


def parent(name: str) -> str:
    """The module that holds the module of tensor or tap ``name``."""
    return module_of(name.removesuffix(".weight"))


def numbers(name: str) -> list[str]:
    """The numbers in a name: of its layer, of its expert."""
    return re.findall(r"(?<=\.)\d+(?=\.|$)", name)
