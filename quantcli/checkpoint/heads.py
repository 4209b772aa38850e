"""Whether an output embedding that a model ties to its input embedding, and stores all the same, holds other numbers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from quantcli import archs
from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.locations import Location, read_tensor
from quantcli.checkpoint.views import HEAD_WEIGHT
from quantcli.tensors import DTYPES

MAX_COMPARED_BYTES = 1 << 26
"""How much of each of two tensors is in memory while they are compared."""

_known: WeakKeyDictionary[Checkpoint, tuple[str, str] | None] = WeakKeyDictionary()


def own_head(source: Checkpoint) -> tuple[str, str] | None:
    """(output embedding, input embedding) of ``source``, by the names of their weights, where config.json ties the two and the file has
    both, with different numbers; None otherwise. Reads them, once for each checkpoint, as far as they are equal."""
    if source not in _known:
        names = stored_ends(source) if is_tied(source.config) else None
        _known[source] = names if names is not None and differ(source, *names) else None
    return _known[source]


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether ``config`` ties the output embedding to the input embedding, where need be by the family's default."""
    arch = archs.of(config)
    usual = {**config, **(config.get("text_config") or {})} if arch is None else arch.usual(config)
    return bool(usual.get("tie_word_embeddings"))


def stored_ends(source: Checkpoint) -> tuple[str, str] | None:
    """The weights of the output and of the input embedding, where ``source`` stores both."""
    arch = archs.of(source.config)
    if arch is not None:
        ends = {arch.gguf_name(name): name for name in source.specs}
        head, embedding = ends.get("output.weight"), ends.get("token_embd.weight")
    else:
        head = HEAD_WEIGHT if HEAD_WEIGHT in source.specs else None
        embedding = None if head is None else alike(source, head)
    return None if head is None or embedding is None else (head, embedding)


def alike(source: Checkpoint, head: str) -> str | None:
    """The one tensor outside of the layers in the shape of ``head``; None where there are several."""
    shape = source.specs[head].shape
    found = [name for name, spec in source.specs.items() if spec.shape == shape and name != head and not re.search(r"\.\d+\.", name)]
    return found[0] if len(found) == 1 else None


def differ(source: Checkpoint, one: str, other: str) -> bool:
    """Whether two tensors of ``source`` have another shape or other numbers; those that are stored dense are read a part at a time."""
    if source.specs[one].shape != source.specs[other].shape:
        return True
    places = {location.spec.name: location for location in source.locations()}
    if all(name in places and source.specs[name] == places[name].spec for name in (one, other)):
        return any(not torch.equal(a.float(), b.float()) for a, b in zip(pieces(places[one]), pieces(places[other]), strict=True))
    return not torch.equal(source.read(one).float(), source.read(other).float())


def pieces(location: Location) -> Iterator[Tensor]:
    """The tensor at ``location`` a few rows at a time: as many for each tensor of its shape."""
    spec = location.spec
    row, n_rows = spec.n_elements // max(1, spec.shape[0]), spec.shape[0]
    step = max(1, MAX_COMPARED_BYTES // max(1, 4 * row))
    itemsize = DTYPES[spec.dtype].itemsize
    for start in range(0, n_rows, step):
        shape = (min(step, n_rows - start), *spec.shape[1:])
        part = replace(spec, shape=shape, nbytes=shape[0] * row * itemsize)
        yield read_tensor(Location(location.path, part, location.offset + start * row * itemsize))
