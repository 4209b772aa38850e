"""A checkpoint seen through cuts: tensors that it stores as one, a layer's experts or tied embeddings, under the names of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantcli import archs
from quantcli.archs import Cut
from quantcli.archs._transformations import CUTS
from quantcli.checkpoint import Checkpoint
from quantcli.errors import CheckpointError
from quantcli.locations import Location
from quantcli.tensors import DTYPES, QuantizedTensor, TensorSpec

HEAD_WEIGHT = "lm_head.weight"
"""The output embedding where it is a tensor of its own."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor of ``shape`` as what ``take`` gives of the tensor ``stored``; without ``take`` it is all of it."""

    stored: str
    shape: tuple[int, ...] = ()
    take: Callable[[Tensor], Tensor] | None = None


class View(Checkpoint):
    """``inner`` under other names: every tensor of ``pieces`` is a stored one, or cut from one that is not quantized. ``config``: in place
    of that of ``inner``."""

    def __init__(self, inner: Checkpoint, pieces: Mapping[str, Piece], config: dict[str, Any] | None = None) -> None:
        self._inner = inner
        self._pieces = dict(pieces)
        super().__init__(
            inner.path,
            kind=inner.kind,
            config=inner.config if config is None else config,
            specs={name: _spec(name, piece, inner.specs[piece.stored]) for name, piece in pieces.items()},
            schemes={name: inner.schemes[piece.stored] for name, piece in pieces.items() if piece.stored in inner.schemes},
            quantization=inner.quantization,
            notes=inner.notes,
        )
        self.source = inner.source

    def load(self, name: str) -> Tensor:
        piece = self._pieces[name]
        tensor = self._inner.read(piece.stored)
        return tensor if piece.take is None else piece.take(tensor).contiguous()

    def load_quantized(self, name: str) -> QuantizedTensor:
        return self._inner.quantized(self._pieces[name].stored)

    def locations(self) -> Iterable[Location]:
        return self._inner.locations()

    def fingerprint(self) -> str:
        return self._inner.fingerprint()

    def sidecars(self) -> dict[str, Path]:
        return self._inner.sidecars()

    def close(self) -> None:
        self._inner.close()


def _spec(name: str, piece: Piece, stored: TensorSpec) -> TensorSpec:
    if piece.take is None:
        return TensorSpec(name, stored.dtype, stored.shape, stored.nbytes)
    return TensorSpec.dense(name, stored.dtype, piece.shape)


def unfused(source: Checkpoint) -> Checkpoint:
    """``source`` with the linears of its experts one by one, where its architecture's literal says how they are stored together."""
    arch = archs.of(source.config)
    return source if arch is None else cut(source, arch.experts)


def cut(source: Checkpoint, cuts: Mapping[str, Cut]) -> Checkpoint:
    """``source`` with the tensors that ``cuts`` names cut up; itself where it has none of them. Quantized ones stay whole."""
    arch = archs.of(source.config)
    if arch is None or not cuts:
        return source
    config = arch.usual(source.config)
    pieces: dict[str, Piece] = {}
    for name, spec in source.specs.items():
        rest = arch.rest_of(name) or ""
        found = cuts.get(rest) or cuts.get(rest.removesuffix(".weight"))
        if found is None or name in source.schemes or spec.dtype not in DTYPES:
            pieces[arch.published(name)] = Piece(name)
        else:
            pieces |= _pieces_of(spec, found, name.removesuffix(rest), config)
    return View(source, pieces) if pieces.keys() != source.specs.keys() or any(piece.take for piece in pieces.values()) else source


def tied_embedding(source: Checkpoint) -> str | None:
    """The input embedding's weight, where the output embedding is the same tensor; None where it is not, or not to be told from others."""
    config = {**source.config, **(source.config.get("text_config") or {})}
    if not config.get("tie_word_embeddings", HEAD_WEIGHT not in source.specs):
        return None
    matrices = (spec for name, spec in source.specs.items() if len(spec.shape) == 2 and name != HEAD_WEIGHT)
    embeddings = [spec.name for spec in matrices if spec.shape[0] == config.get("vocab_size")]
    return embeddings[0] if len(embeddings) == 1 else None


def untied(source: Checkpoint, embedding: str) -> Checkpoint:
    """``source`` with an output embedding of its own, the same numbers as ``embedding``, which the model tied it to."""
    apart = {"tie_word_embeddings": False}
    text = {"text_config": source.config["text_config"] | apart} if source.config.get("text_config") else {}
    pieces = {name: Piece(name) for name in source.specs} | {HEAD_WEIGHT: Piece(embedding)}
    return View(source, pieces, source.config | text | apart)


def _pieces_of(spec: TensorSpec, cut: Cut, prefix: str, config: Mapping) -> dict[str, Piece]:
    """Name → piece of the stored tensor ``spec``; ``prefix``: the name of its layer and a dot."""
    made = partial(_made, cut, config)
    try:
        parts = dict(zip(cut.names, made(torch.empty(spec.shape, device="meta")), strict=True))
    except (RuntimeError, IndexError, ValueError, KeyError) as error:
        raise CheckpointError(f"{spec.name}: {list(spec.shape)} cannot be cut into {', '.join(cut.names)}: {error}") from error
    pieces: dict[str, Piece] = {}
    for k, (name, part) in enumerate(parts.items()):
        if "{e}" not in name:
            pieces[prefix + name] = Piece(spec.name, tuple(part.shape), partial(_part, made, k, None))
            continue
        for e in range(part.shape[0]):
            pieces[prefix + name.replace("{e}", str(e))] = Piece(spec.name, tuple(part.shape[1:]), partial(_part, made, k, e))
    return pieces


def _made(cut: Cut, config: Mapping, tensor: Tensor) -> Sequence[Tensor]:
    return CUTS[cut.how](tensor, len(cut.names), config)


def _part(made: Callable[[Tensor], Sequence[Tensor]], k: int, e: int | None, tensor: Tensor) -> Tensor:
    part = made(tensor)[k]
    return part if e is None else part[e]
