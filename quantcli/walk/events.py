"""Events of a run: the plan, work taken over, each finished layer with its time and error, notes, and the end."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from quantcli import heap
from quantcli.calibration.resume import Resumed as Resumed
from quantcli.planning.plan import Plan, PlannedLayer
from quantcli.planning.schemes import is_quantized
from quantcli.tensors import TensorReport

if TYPE_CHECKING:
    from quantcli.calibration.text_check import TextCheck


@dataclass(frozen=True, slots=True)
class Planned:
    """The plan stands; nothing has been written. ``notes``: what a user might not expect of it, or of the data that it is given."""

    plan: Plan
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LayerDone:
    """One layer is on disk. ``relative_error``: mean over its coded tensors, None when it has none; ``bpw`` of its weights;
    ``held_out_error``: mean over those whose error was measured on text that nothing was fitted to."""

    name: str
    index: int
    n_layers: int
    relative_error: float | None
    bpw: float
    seconds: float
    tensors: tuple[TensorReport, ...]
    held_out_error: float | None = None


@dataclass(frozen=True, slots=True)
class Finished:
    """The output stands under its final name. ``calibrated_by``: "windows" or "statistics"; ``text_check``: of the source with the
    calibration text, where windows were run; ``warnings``: of what the run learned from, and of what failed
    once the output had its name."""

    output: Path
    plan: Plan
    lossless: bool
    dataset_sha256: str | None = None
    text_check: TextCheck | None = None
    calibrated_by: str | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Note:
    """Something the user should know; ``is_warning``: that may be wrong, or lose something."""

    text: str
    is_warning: bool = False


Event = Planned | Resumed | LayerDone | Finished


@dataclass(slots=True)
class Timed:
    """One layer of the walk and the clock that runs for it."""

    planned: PlannedLayer
    index: int
    n_layers: int
    started: float
    reports: list[TensorReport] = field(default_factory=list)

    def done(self) -> LayerDone:
        coded = [t for t in self.planned.tensors if is_quantized(t.scheme)]
        names = {t.name for t in coded}
        errors = [r.relative_error for r in self.reports if r.name in names]
        held_out = [r.held_out_error for r in self.reports if r.name in names and r.held_out_error is not None]
        return LayerDone(
            name=self.planned.name,
            index=self.index,
            n_layers=self.n_layers,
            relative_error=sum(errors) / len(errors) if errors else None,
            bpw=self.planned.bpw,
            seconds=time.perf_counter() - self.started,
            tensors=tuple(self.reports),
            held_out_error=sum(held_out) / len(held_out) if held_out else None,
        )


def timed(plan: Plan, start: int = 0) -> Iterator[Timed]:
    """The layers of ``plan`` in turn, from number ``start`` on; what each leaves behind goes back to the system."""
    for index, planned in enumerate(plan.layers[start:], start):
        yield Timed(planned, index, len(plan.layers), time.perf_counter())
        heap.trim()
