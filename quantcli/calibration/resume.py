"""Keeps what a run over the layers needs to go on after it was stopped: finished layers, and the hidden states that the next one reads."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from typing_extensions import override

from quantcli import __version__
from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.shards import file_layout
from quantcli.output import disk, system
from quantcli.output.journal import Step
from quantcli.output.layouts import write_tensors
from quantcli.output.writer import Writer
from quantcli.tensors import DTYPE_NAMES, TensorSpec

STATES = "states"
"""The key of a step's record that names the file of hidden states."""


def identity(source: Checkpoint, device: str | torch.device, **more: Any) -> dict[str, Any]:
    """What must be the same for a run to go on with the work of an earlier one: version, weights and their files, device, and ``more``."""
    paths = sorted({os.path.realpath(location.path) for location in source.locations()})
    files = [[os.path.basename(path), os.stat(path).st_size, os.stat(path).st_mtime_ns] for path in paths]
    return {
        "version": __version__,
        "weights": source.fingerprint(),
        "source files": files,
        "device": torch.device(device).type,
        **more,
    }


@dataclass(frozen=True, slots=True)
class Resumed:
    """The run goes on with the work of an earlier process, in the folder ``work``: ``n_done`` of ``n_layers`` layers are there."""

    work: Path
    n_done: int
    n_layers: int

    @override
    def __str__(self) -> str:
        return f"goes on with unfinished work in {self.work}: {self.n_done} of {self.n_layers} layers are done; --fresh starts over"


@dataclass(slots=True)
class Resume:
    """The finished layers of the output of ``writer``, and hidden states between layers, which lie in its work folder one at a time."""

    writer: Writer

    @property
    def steps(self) -> tuple[Step, ...]:
        """The finished layers, in order, with what was told of them."""
        return self.writer.steps

    def states(self) -> dict[str, Tensor]:
        """Name → hidden states [n, T, hidden] behind the last finished layer; empty where none were kept."""
        files = [step.told[STATES] for step in self.steps if step.told.get(STATES)]
        return load_file(self.writer.work.path / files[-1]) if files else {}

    def finish(
        self, layer: str, told: Mapping[str, Any], states: Mapping[str, Tensor] | None = None, tensors: Collection[str] | None = None
    ) -> None:
        """Put ``layer`` on the record, with the ``states`` that the layers after it start from; ``tensors``: its own in the output, where
        later layers may have put theirs already. An interruption from here on costs no more than the next layer."""
        if not self.writer.is_resumable:
            return
        name = f"states-{len(self.steps)}.safetensors" if states else None
        if states and name:
            with disk.wording_errors(self.writer.target):
                specs = [TensorSpec.dense(key, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) for key, tensor in states.items()]
                write_tensors(self.writer.work.path / name, file_layout(name, specs), states)
        self.writer.finish_step(layer, {**told, STATES: name}, tensors=tensors)
        if name:
            self._forget_all_but(self.writer.work.path / name)

    def _forget_all_but(self, kept: Path) -> None:
        for path in self.writer.work.path.glob("states-*.safetensors"):
            if path != kept:
                with disk.wording_errors(self.writer.target):
                    system.unlink(path)
