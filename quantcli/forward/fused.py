"""Splits tensors that hold all experts of a layer: which rows are which expert's linear, and its published name on disk.

Mixtral as transformers 5 can save it has ``mlp.experts.gate_up_proj`` [n_experts, 2·intermediate, hidden]; as published, it has
``block_sparse_moe.experts.3.w1.weight``. Quantized folders have the second form, which is the one that engines read. transformers'
conversion tables, run backwards on stand-ins that carry their own number, show which rows become which tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.views import Piece
from quantcli.tensors import TensorSpec

PROBE_ROWS = 4
"""Rows of an expert's stand-in: it may be split in two, and both halves must show that their rows are contiguous."""


def expert_pieces(checkpoint: Checkpoint, model: Any) -> dict[str, Piece]:
    """Name as published → the piece of a stored tensor, for every tensor of ``checkpoint``; empty where no experts are stored in one
    tensor, or where transformers has no separate names for them. ``model``: the checkpoint's, without weights."""
    expected = model.state_dict()
    stored = [
        name for name, spec in checkpoint.specs.items() if len(spec.shape) == 3 and name in expected and name not in checkpoint.schemes
    ]
    stored = [name for name in stored if tuple(expected[name].shape) == checkpoint.specs[name].shape]
    if not stored:
        return {}
    pieces = _split(checkpoint, stored, model)
    return dict(sorted(pieces.items())) if any(piece.take for piece in pieces.values()) else {}


def _rows(expert: int, start: int, stop: int, stacked: Tensor) -> Tensor:
    """Rows ``start … stop`` of one expert in a tensor [n_experts, rows, in]."""
    return stacked[expert, start:stop]


def _split(checkpoint: Checkpoint, stored: list[str], model: Any) -> dict[str, Piece]:
    """Name as published → its piece, for every tensor of ``checkpoint``; ``stored``: the tensors [n_experts, out, in]."""
    from transformers.core_model_loading import revert_weight_conversion

    expected, fused = model.state_dict(), set(stored)
    others = [name for name in checkpoint.specs if name not in fused]
    named = {name: torch.tensor([float(k)], dtype=torch.float64) for k, name in enumerate(others) if name in expected}
    whole = {name: Piece(name) for name in others}
    pieces: dict[str, Piece] = {}
    try:
        probes = {name: _probe(k, checkpoint.specs[name].shape[0]) for k, name in enumerate(stored)}
        made = revert_weight_conversion(model, {**named, **probes})
    except (RuntimeError, ValueError, KeyError, IndexError):  # a conversion that cannot be run backwards, or not on stand-ins
        return whole | {name: Piece(name) for name in stored}
    for name, probe in made.items():
        if probe.shape == (1,):
            pieces[name] = Piece(others[int(probe)])
        elif probe.ndim == 2 and (piece := _piece(probe, stored, checkpoint.specs)):
            pieces[name] = piece
    covered = {piece.stored for piece in pieces.values()}
    left = {name: Piece(name) for name in checkpoint.specs if name not in covered}
    n_rows = {name: sum(p.shape[0] for p in pieces.values() if p.stored == name) for name in fused & covered}
    if any(n != checkpoint.specs[name].shape[0] * checkpoint.specs[name].shape[1] for name, n in n_rows.items()):
        return whole | {name: Piece(name) for name in stored}
    return left | pieces


def _probe(number: int, n_experts: int) -> Tensor:
    """[n_experts, PROBE_ROWS, 1] float64: the tensor's number, then the expert's, then the row's, in one integer of mixed base 2²⁰."""
    row = torch.arange(n_experts * PROBE_ROWS, dtype=torch.float64) + 1
    return (row + (number + 1) * 2.0**20).view(n_experts, PROBE_ROWS, 1)


def _piece(probe: Tensor, stored: list[str], specs: Mapping[str, TensorSpec]) -> Piece | None:
    """The piece whose stand-in is ``probe`` [n, 1]; None when its rows are not contiguous rows of one expert."""
    values = [int(v) for v in probe.flatten().tolist()]
    number, first = divmod(values[0], 1 << 20)
    expert, row = divmod(first - 1, PROBE_ROWS)
    if probe.shape[1] != 1 or values != list(range(values[0], values[0] + len(values))) or row + len(values) > PROBE_ROWS:
        return None
    name = stored[number - 1]
    height = specs[name].shape[1]
    if height * row % PROBE_ROWS or height * len(values) % PROBE_ROWS:
        return None
    start, stop = height * row // PROBE_ROWS, height * (row + len(values)) // PROBE_ROWS
    return Piece(name, (stop - start, specs[name].shape[2]), partial(_rows, expert, start, stop))
