"""Runs of the library that tests look into: the events of one, without notes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import quantcli as qc


def run(source: Path, target: Path, recipe: str | qc.Recipe, data: Any = None, **options: Any) -> list[Any]:
    """``source`` quantized to ``target``; Planned, a LayerDone for each layer, Finished."""
    events: list[Any] = []
    qc.quantize(source, target, recipe, data=data, device="cpu", on_event=events.append, **options)
    return [event for event in events if not isinstance(event, qc.Note)]
