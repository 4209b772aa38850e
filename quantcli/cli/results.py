"""What quantize and export print: progress and notes as a run goes, then its plan or its result."""

from __future__ import annotations

import re
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any

from quantcli.cli.console import Console, Steps, size

if TYPE_CHECKING:
    from quantcli.api import Result
    from quantcli.planning.plan import Plan
    from quantcli.walk.events import LayerDone


ALL = 0.995
"""The share of the layers' weights from which on all are said to be coded: routers and the like stay dense."""


class Progress:
    """A context manager to be called with each event of a run: a bar or lines for the layers, notes and warnings as they come."""

    def __init__(self, console: Console, title: str) -> None:
        self._console, self._title, self._open = console, title, ExitStack()
        self._steps: Steps | None = None

    def __enter__(self) -> Progress:
        self._steps = self._open.enter_context(self._console.progress(self._title))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._open.__exit__(kind, error, trace)

    def __call__(self, event: Any) -> None:
        from quantcli.calibration.calibrate import LayerMeasured
        from quantcli.calibration.resume import Resumed
        from quantcli.walk.evaluate import LayerWalked
        from quantcli.walk.events import LayerDone, Note

        assert self._steps is not None
        if isinstance(event, Note):
            (self._console.warn if event.is_warning else self._console.note)(event.text)
        elif isinstance(event, Resumed):
            self._console.note(str(event))
        elif isinstance(event, LayerDone):
            self._steps.step(event.index, event.n_layers, layer_line(event))
            report_layer(self._console, event)
        elif isinstance(event, LayerMeasured):
            self._steps.step(event.index, event.n_layers, f"{event.name}  {event.n_taps} taps  {event.seconds:.1f} s")
        elif isinstance(event, LayerWalked):
            error = "" if event.relative_error is None else f"  error {event.relative_error:.2e}"
            self._steps.step(event.index, event.n_layers, f"{event.name}{error}  {event.seconds:.1f} s")


def layer_line(event: LayerDone) -> str:
    error = "" if event.relative_error is None else f"  error {event.relative_error:.2e}"
    return f"{event.name}  {event.bpw:.2f} bpw{error}  {event.seconds:.1f} s"


def report_layer(console: Console, event: LayerDone) -> None:
    """Its tensors' errors, where detail is wanted, and their notes; of notes that differ by numbers only, as a hundred experts' do, one."""
    alike: dict[str, list[str]] = {}
    for report in event.tensors:
        if report.relative_error:
            console.detail(f"{report.name}  error {report.relative_error:.2e}")
        for note in report.notes:
            alike.setdefault(re.sub(r"\d+", "#", note), []).append(f"{report.name}: {note}")
    for first, *others in alike.values():
        console.warn(f"{first}; likewise {len(others)} more of {event.name}" if others else first)
        for other in others:
            console.detail(other)


def render_result(console: Console, result: Result) -> list[str]:
    """A run's result, or of a dry run its plan."""
    return render_plan(console, result.plan) if result.finished is None else render_data(result.to_dict())


def render_plan(console: Console, plan: Plan) -> list[str]:
    rows = []
    for tensor in plan.tensors:
        kind = "dropped" if not tensor.outputs else str(tensor.scheme or tensor.outputs[0].dtype.lower())
        rows.append([tensor.name, kind, "x".join(map(str, tensor.source.shape)), str(sum(s.nbytes for s in tensor.outputs))])
    total = f"{size(plan.n_bytes)}, {plan.bpw:.3f}bpw; nothing was written"
    return [*console.table(["tensor", "becomes", "shape", "bytes"], rows), "", total]


def render_data(data: dict[str, Any]) -> list[str]:
    census = ", ".join(f"{n} {word}" for word, n in data["tensors"].items() if n)
    is_partial = data["tensors"]["quantized"] and data["coverage"] < ALL
    coverage = f" ({data['coverage']:.0%} of the layers' weights)" if is_partial else ""
    errors = [layer["relative_error"] for layer in data["layers"] if layer["relative_error"] is not None]
    held_out = [layer["held_out_error"] for layer in data["layers"] if layer["held_out_error"] is not None]
    error = f", mean relative error {sum(errors) / len(errors):.2e}" if errors else ""
    if held_out:
        error = f", mean relative error {sum(held_out) / len(held_out):.2e} on text held out ({sum(errors) / len(errors):.2e} on its own)"
    return [
        f"{data['output']}",
        f"{size(data['n_bytes'])}, {data['bpw']:.3f}bpw{error}",
        f"tensors: {census}{coverage}{', lossless' if data['lossless'] else ''}",
        f"{data['seconds']:.1f} s, peak memory {size(data['peak_ram_bytes'])}",
        *([f"calibrated by {how} of text {data['dataset_sha256'][:12]}"] if (how := data["calibrated_by"]) else []),
        *([f"perplexity of the calibration text {perplexity:.1f}"] if (perplexity := data["calibration_perplexity"]) else []),
    ]
