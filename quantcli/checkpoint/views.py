"""Views of a checkpoint under other tensor names: fused tensors split (experts, q and k and v), separate ones joined, tied ones copied."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from quantcli import archs
from quantcli.archs import Architecture, Cut
from quantcli.archs.shared.transformations import CUTS, JOINS
from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.locations import Location
from quantcli.checkpoint.side_files import SideFiles
from quantcli.errors import CheckpointError, UnsupportedError
from quantcli.tensors import DTYPES, QuantizedTensor, TensorSpec

HEAD_WEIGHT = "lm_head.weight"
"""The output embedding where it is a separate tensor."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor of ``shape`` that ``take`` returns of the tensor ``stored``; without ``take`` it is the whole tensor."""

    stored: str
    shape: tuple[int, ...] = ()
    take: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True, slots=True)
class Joint:
    """A tensor joined of others. ``parts``: of each expert (or head), or only once, the tensors into which a cut of the kind ``how`` splits
    it, in that order; ``by_expert``: whether the cut's tensors have a dimension of experts, of which a part is a slice."""

    parts: tuple[tuple[str, ...], ...]
    how: str
    config: Mapping[str, Any]
    by_expert: bool

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor that it needs."""
        return tuple(name for parts in self.parts for name in parts)

    def made(self, read: Callable[[str], Tensor]) -> Tensor:
        """The tensor; ``read`` gives the others. One expert's are in memory beside it at a time."""
        whole: Tensor | None = None
        for e, names in enumerate(self.parts):
            part = JOINS[self.how]([read(name)[None] if self.by_expert else read(name) for name in names], self.config)
            if whole is None:
                whole = part.new_empty(len(self.parts) * part.shape[0], *part.shape[1:])
            whole[e * part.shape[0] : (e + 1) * part.shape[0]] = part
        assert whole is not None
        return whole

    def spec(self, name: str, specs: Mapping[str, TensorSpec]) -> TensorSpec:
        """Its spec as ``name``; ``specs``: of the parts. Of quantized parts it is float32, decoded, with their number of bytes."""
        parts = [specs[part] for part in self.names]
        try:
            shape = tuple(self.made(lambda part: torch.empty(specs[part].shape, device="meta")).shape)
        except (RuntimeError, IndexError, ValueError, KeyError) as error:
            raise CheckpointError(f"{name}: cannot be joined of {parts[0].name} and the {len(parts) - 1} others: {error}") from error
        dtype = parts[0].dtype if parts[0].dtype in DTYPES else "F32"
        return TensorSpec(name, dtype, shape, sum(part.nbytes for part in parts))


class View(Checkpoint):
    """``inner`` under other names: every tensor of ``pieces`` is a stored one, a part of one that is not quantized, or joined of several.
    ``config``: replaces that of ``inner``."""

    def __init__(self, inner: Checkpoint, pieces: Mapping[str, Piece | Joint], config: dict[str, Any] | None = None) -> None:
        self.inner = inner
        self._pieces = dict(pieces)
        super().__init__(
            inner.path,
            kind=inner.kind,
            config=inner.config if config is None else config,
            specs={name: _spec(name, piece, inner.specs) for name, piece in pieces.items()},
            schemes={
                name: inner.schemes[piece.stored]
                for name, piece in pieces.items()
                if isinstance(piece, Piece) and piece.stored in inner.schemes
            },
            quantization=inner.quantization,
            notes=inner.notes,
            kv_cache=inner.kv_cache,
        )
        self.source = inner.source

    @property
    @override
    def file_metadata(self) -> Mapping[str, Any]:
        return self.inner.file_metadata

    @override
    def unnamed(self) -> dict[str, Tensor]:
        return self.inner.unnamed()

    @property
    @override
    def provenance(self) -> Mapping[str, Any]:
        return self.inner.provenance

    @override
    def load(self, name: str) -> Tensor:
        piece = self._pieces[name]
        if isinstance(piece, Joint):
            return piece.made(self.inner.read)
        tensor = self.inner.read(piece.stored)
        return tensor if piece.take is None else piece.take(tensor).contiguous()

    @override
    def load_quantized(self, name: str) -> QuantizedTensor:
        piece = self._pieces[name]
        assert isinstance(piece, Piece)
        return self.inner.quantized(piece.stored)

    @override
    def cache_scales(self, attention: str) -> tuple[Tensor, Tensor]:
        return self.inner.cache_scales(attention)

    @override
    def locations(self) -> Iterable[Location]:
        return self.inner.locations()

    @override
    def fingerprint(self) -> str:
        return self.inner.fingerprint()

    @override
    def sidecars(self) -> SideFiles:
        return self.inner.sidecars()

    @override
    def close(self) -> None:
        self.inner.close()


def _spec(name: str, piece: Piece | Joint, specs: Mapping[str, TensorSpec]) -> TensorSpec:
    if isinstance(piece, Joint):
        return piece.spec(name, specs)
    stored = specs[piece.stored]
    if piece.take is None:
        return TensorSpec(name, stored.dtype, stored.shape, stored.nbytes)
    return TensorSpec.dense(name, stored.dtype, piece.shape)


def pieces_of(source: Checkpoint, cuts: Mapping[str, Cut]) -> dict[str, Piece]:
    """Every tensor of ``source``, those in ``cuts`` split; quantized ones stay whole. Empty where no name or shape changes."""
    arch = archs.of(source.config)
    if arch is None or not cuts:
        return {}
    config = arch.usual(source.config)
    pieces: dict[str, Piece] = {}
    for name, spec in source.specs.items():
        rest = arch.rest_of(name) or ""
        found = cuts.get(rest)
        if found is None or name in source.schemes or spec.dtype not in DTYPES:
            pieces[arch.published(name)] = Piece(name)
        else:
            pieces |= _pieces_of(spec, found, name.removesuffix(rest), config)
    return pieces if pieces.keys() != source.specs.keys() or any(piece.take for piece in pieces.values()) else {}


def tied_embedding(source: Checkpoint) -> str | None:
    """The input embedding's weight, where the output embedding is the same tensor; None where it is not, or where it is not identified."""
    config = {**source.config, **(source.config.get("text_config") or {})}
    if not config.get("tie_word_embeddings", HEAD_WEIGHT not in source.specs):
        return None
    matrices = (spec for name, spec in source.specs.items() if len(spec.shape) == 2 and name != HEAD_WEIGHT)
    embeddings = [spec.name for spec in matrices if spec.shape[0] == config.get("vocab_size")]
    return embeddings[0] if len(embeddings) == 1 else None


HALVES = ("gptq", "awq")
"""Kinds of folders that gptqmodel makes: under the names of gate and up they have the first and the second half of rows in which
gpt-oss interleaves the two (Defuser's ``_split_fused_projection``, 2026)."""


def experts_apart(source: Checkpoint) -> dict[str, Joint]:
    """The joint tensors that transformers needs for experts that ``source`` stores one by one; empty for families that do not need any.
    Raises :class:`UnsupportedError` where the source's names mean other rows."""
    arch = archs.of(source.config)
    if arch is None or not arch.stacked:
        return {}
    joints = joints_of(source.specs, arch.experts, arch, source.config)
    if joints and source.kind in HALVES:
        raise UnsupportedError(
            f"{source.source}: {source.kind} folders of {source.config['model_type']} store other rows than those of "
            "gate and up under these names; quantcli does not read them: use the model that it was made from"
        )
    return joints


def joints_of(names: Iterable[str], cuts: Mapping[str, Cut], arch: Architecture, config: Mapping[str, Any]) -> dict[str, Joint]:
    """Stored tensor → how it is joined of those among ``names`` into which ``cuts`` split it; :class:`CheckpointError` when some of
    these are missing."""
    places = {name: (stored, k) for stored, cut in cuts.items() for k, name in enumerate(cut.names)}
    found: dict[tuple[str, str], dict[int, dict[int, str]]] = {}
    for name in names:
        rest = arch.rest_of(name) or ""
        pattern, e = archs.by_expert(rest)
        if (place := places.get(pattern)) is not None:
            found.setdefault((name.removesuffix(rest), place[0]), {}).setdefault(e or 0, {})[place[1]] = name
    usual = arch.usual(config)
    return {prefix + stored: _joint(prefix + stored, cuts[stored], slices, usual) for (prefix, stored), slices in found.items()}


def _joint(stored: str, cut: Cut, slices: Mapping[int, Mapping[int, str]], config: Mapping[str, Any]) -> Joint:
    for e in range(max(slices) + 1):
        for k, name in enumerate(cut.names):
            if k not in slices.get(e, {}):
                raise CheckpointError(f"{stored}: its part {name.replace('{e}', str(e))} is missing in the checkpoint")
    parts = tuple(tuple(slices[e][k] for k in range(len(cut.names))) for e in range(len(slices)))
    return Joint(parts, cut.how, config, by_expert="{e}" in cut.names[0])


def _pieces_of(spec: TensorSpec, cut: Cut, prefix: str, config: Mapping[str, Any]) -> dict[str, Piece]:
    """Name → piece of the stored tensor ``spec``; ``prefix``: the name of its layer and a dot."""
    made = partial(_made, cut, config)
    try:
        parts = dict(zip(cut.names, made(torch.empty(spec.shape, device="meta")), strict=True))
    except (RuntimeError, IndexError, ValueError, KeyError) as error:
        raise CheckpointError(f"{spec.name}: {list(spec.shape)} cannot be split into {', '.join(cut.names)}: {error}") from error
    pieces: dict[str, Piece] = {}
    for k, (name, part) in enumerate(parts.items()):
        if "{e}" not in name:
            pieces[prefix + name] = Piece(spec.name, tuple(part.shape), partial(_part, made, k, None))
            continue
        for e in range(part.shape[0]):
            pieces[prefix + name.replace("{e}", str(e))] = Piece(spec.name, tuple(part.shape[1:]), partial(_part, made, k, e))
    return pieces


def _made(cut: Cut, config: Mapping[str, Any], tensor: Tensor) -> Sequence[Tensor]:
    return CUTS[cut.how](tensor, len(cut.names), config)


def _part(made: Callable[[Tensor], Sequence[Tensor]], k: int, e: int | None, tensor: Tensor) -> Tensor:
    part = made(tensor)[k]
    return part if e is None else part[e]
