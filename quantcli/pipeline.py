"""For each layer: load → measure → passes → write → forget. The walk from a checkpoint to a quantized one; it yields events."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quantcli import __version__, heap, ops
from quantcli import plan as planning
from quantcli.checkpoint import Checkpoint
from quantcli.errors import NumericsError, RecipeError
from quantcli.plan import Plan, PlannedLayer, PlannedTensor
from quantcli.recipe import PassSpec, Recipe
from quantcli.registry import find
from quantcli.tensors import DTYPES, Layer, QuantizedTensor, Stats, TensorReport
from quantcli.writer import Writer

if TYPE_CHECKING:
    from quantcli.calibrate import Activations
    from quantcli.forward import Forward, LoadedLayer

MAX_TENSORS_AT_ONCE = 4
"""Tensors that are read, coded and written at the same time when no statistics tie them together; the threads are shared among them."""

PIECE_ELEMENTS = 1 << 22


@dataclass(frozen=True, slots=True)
class Planned:
    """The plan stands; nothing has been written."""

    plan: Plan


@dataclass(frozen=True, slots=True)
class LayerDone:
    """One layer is on disk. ``relative_error``: mean over its coded tensors, None when it has none; ``bpw`` of its weights."""

    name: str
    index: int
    n_layers: int
    relative_error: float | None
    bpw: float
    seconds: float
    tensors: tuple[TensorReport, ...]


@dataclass(frozen=True, slots=True)
class Finished:
    """The output stands under its final name."""

    output: Path
    plan: Plan
    lossless: bool


Event = Planned | LayerDone | Finished


@dataclass(frozen=True, slots=True)
class Calibrated:
    """What the calibrated passes learn from: token windows to run through the model, or statistics gathered before.

    ``windows``: [n, seq_len] int64; ``stats``: tap → Stats; exactly one of them. ``dataset_sha256`` is of the token ids.
    """

    dataset_sha256: str
    windows: Tensor | None = None
    stats: Mapping[str, Stats] | None = None


@dataclass(slots=True)
class _Run:
    """What the walk carries from layer to layer."""

    source: Checkpoint
    plan: Plan
    writer: Writer
    device: torch.device
    reports: list[TensorReport] = field(default_factory=list)

    def put(self, name: str, tensor: Tensor | QuantizedTensor) -> None:
        fmt = find("formats", self.plan.recipe.format)
        for part, data in fmt.parts(name, tensor, self.plan.context).items():
            self.writer.put(part, data)

    def copy(self, tensor: PlannedTensor) -> None:
        """Write a tensor that no pass touches."""
        if not tensor.outputs:
            return
        data = self.source.read(tensor.name)
        check_finite(tensor.name, data)
        self.put(tensor.name, data)


def quantize(
    source: Checkpoint,
    target: Path,
    recipe: Recipe,
    *,
    calibrate: Callable[[], Calibrated] | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    dry_run: bool = False,
) -> Iterator[Event]:
    """Write ``source`` to ``target`` as ``recipe`` says.

    ``calibrate`` is called, once the plan stands, when a pass needs statistics. With token windows each layer is measured on what the
    layers before it, already quantized, hand it; with statistics gathered before no layer runs. Nothing stands at ``target`` until the last
    event; ``overwrite`` replaces what stood there only then.
    """
    _check_apart(source, target)
    declared = planning.declared_taps(source)
    forward = _open_forward(source, device) if declared is None or recipe.needs else None
    taps = declared if forward is None else forward.taps  # where the model is built, it knows best
    assert taps is not None
    made_by = provenance(source, recipe)
    plan = planning.make(source, recipe, taps, metadata=made_by)
    yield Planned(plan)
    if dry_run:
        return
    data = None
    if recipe.needs:
        if calibrate is None:
            raise RecipeError(f"recipe '{recipe.name}' needs calibration data; give a dataset or --stats")
        data = calibrate()
        if data.stats is not None:
            _check_stats(plan, data.stats)
    fmt = find("formats", recipe.format)
    with fmt.writer(target, plan.outputs, plan.context, overwrite=overwrite) as writer:
        run = _Run(source, plan, writer, torch.device(device))
        if data is None:
            yield from _each_tensor(run)
        elif data.stats is not None:
            yield from _each_layer(run, data.stats)
        else:
            assert forward is not None
            assert data.windows is not None
            yield from _propagate(run, forward, data.windows)
        if writer.folder:
            record = {**made_by, "dataset_sha256": data.dataset_sha256 if data else None, "tensors": _record(run)}
            writer.add_sidecar("quantcli.json", (json.dumps(record, indent=1, sort_keys=True) + "\n").encode())
        writer.commit()
    yield Finished(writer.target, plan, all(_is_exact(source, tensor) for tensor in plan.tensors))


def provenance(source: Checkpoint, recipe: Recipe) -> dict[str, Any]:
    """What repeats a run: version, recipe, source and a fingerprint of its config and tensor headers."""
    headers = json.dumps([source.config, sorted((s.name, s.dtype, s.shape) for s in source.specs.values())], sort_keys=True)
    return {
        "version": __version__,
        "recipe": recipe.to_dict(),
        "source": source.source,
        "source_fingerprint": hashlib.sha256(headers.encode()).hexdigest(),
    }


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise :class:`NumericsError` when a float tensor has NaN or Inf. A piece at a time: the check makes copies."""
    if not tensor.is_floating_point():
        return
    if not all(bool(torch.isfinite(piece).all()) for piece in tensor.reshape(-1).split(PIECE_ELEMENTS)):
        raise NumericsError(f"{name}: the source has NaN or Inf; check the checkpoint, or take another revision of it")


def _check_apart(source: Checkpoint, target: Path) -> None:
    """Raise :class:`RecipeError` when the output would replace the model that it is made from."""
    model, output = Path(os.path.realpath(source.path)), Path(os.path.realpath(target))
    if output == model or output in model.parents:
        raise RecipeError(f"{target}: the output would replace the model it is made from, {source.source}; choose another -o")


def _check_stats(plan: Plan, stats: Mapping[str, Stats]) -> None:
    """Raise :class:`RecipeError` when statistics are missing, before any work is done."""
    for tensor in plan.tensors:
        if tensor.is_solved and tensor.tap not in stats:
            raise RecipeError(
                f"{tensor.name}: the statistics have no tap '{tensor.tap}'; they belong to another model: calibrate this one, "
                "or exclude the tensor with --skip"
            )


def _is_exact(source: Checkpoint, tensor: PlannedTensor) -> bool:
    """Whether the output of ``tensor`` holds every value of the source."""
    if not tensor.outputs:
        return True
    if planning.is_coded(tensor.scheme):
        return False
    read = torch.float32 if tensor.name in source.schemes else DTYPES.get(tensor.source.dtype)
    stored = DTYPES.get(tensor.outputs[0].dtype)
    return read == stored or (read is not None and stored is not None and torch.promote_types(read, stored) == stored)


def _open_forward(source: Checkpoint, device: str) -> Forward:
    from quantcli.forward import Forward  # transformers takes seconds to import

    return Forward(source, device=device)


def _each_tensor(run: _Run) -> Iterator[LayerDone]:
    """No statistics: every tensor for itself, a few at a time, written as they come."""

    def work(layer: str, tensor: PlannedTensor) -> tuple[TensorReport, ...]:
        if tensor.scheme is None or not tensor.outputs:
            run.copy(tensor)
            return ()
        unit = Layer(layer, {tensor.name: run.source.read(tensor.name).to(run.device)}, {tensor.name: tensor.scheme})
        return _apply(run, unit, run.plan.recipe.passes, {})

    pending: deque[Future[tuple[TensorReport, ...]]] = deque()
    todo = deque((layer.name, tensor) for layer in run.plan.layers for tensor in layer.tensors)
    n_threads = torch.get_num_threads()
    n_at_once = min(n_threads + 1, MAX_TENSORS_AT_ONCE)  # one more than there are threads: it waits for the disk
    with ThreadPoolExecutor(n_at_once) as pool:
        try:
            ops.set_threads(max(1, n_threads // n_at_once))
            for layer in _timed(run):
                for _ in layer.planned.tensors:
                    while todo and len(pending) < n_at_once:
                        pending.append(pool.submit(work, *todo.popleft()))
                    layer.reports += pending.popleft().result()
                yield layer.done()
        finally:
            ops.set_threads(n_threads)
            for future in pending:
                future.cancel()


def _each_layer(run: _Run, stats: Mapping[str, Stats]) -> Iterator[LayerDone]:
    """Statistics from a file: layer by layer, no forward pass, no error propagation."""
    for layer in _timed(run):
        layer.reports += _code(run, layer.planned, stats)
        yield layer.done()


def _propagate(run: _Run, forward: Forward, windows: Tensor) -> Iterator[LayerDone]:
    """Each layer is measured on the outputs of the quantized layers before it, quantized, and run again to feed the next."""
    from quantcli.calibrate import Activations

    activations = Activations.embed(forward, windows)
    taps = list(dict.fromkeys(forward.taps.values()))  # in the order in which the model runs them
    index = {name: i for i, name in enumerate(forward.layers)}
    for layer in _timed(run):
        name = layer.planned.name
        if name not in index:
            layer.reports += _code(run, layer.planned, {})
        else:
            with forward.layer(index[name]) as loaded:
                layer.reports += _measure_and_code(run, layer.planned, loaded, activations, taps)
                if index[name] + 1 < len(forward.layers):
                    activations.advance(loaded)
        yield layer.done()


def _measure_and_code(
    run: _Run, planned: PlannedLayer, loaded: LoadedLayer, activations: Activations, order: Sequence[str]
) -> list[TensorReport]:
    """Measure and code all taps of a layer at once, or with ``true_sequential`` one tap after the other, each seeing the ones before coded.
    ``order``: the model's taps as it runs them."""
    solved = [t for t in planned.tensors if t.is_solved]
    wanted = {t.tap for t in solved}
    taps = [tap for tap in order if tap in wanted]
    stages = [[tap] for tap in taps] if run.plan.recipe.true_sequential else [taps]
    reports: list[TensorReport] = []
    for stage in stages:
        stats = activations.measure(loaded, stage, run.plan.recipe.needs)
        subset = PlannedLayer(planned.name, tuple(t for t in solved if t.tap in stage))
        reports += _code(run, subset, stats, loaded)
    rest = PlannedLayer(planned.name, tuple(t for t in planned.tensors if not t.is_solved))
    return reports + _code(run, rest, {}, loaded)


def _code(run: _Run, planned: PlannedLayer, stats: Mapping[str, Stats], loaded: LoadedLayer | None = None) -> list[TensorReport]:
    """Run the passes over what ``planned`` solves, round to nearest what else has a scheme, and copy the rest.
    ``loaded`` has the solved weights in memory already, and receives each coded one as the engine will see it."""
    reports: list[TensorReport] = []
    coded = [t for t in planned.tensors if t.scheme and t.outputs]
    for tensor in planned.tensors:
        if tensor not in coded:
            run.copy(tensor)
    solved = [t for t in coded if t.is_solved]
    rounded = [t for t in coded if not t.is_solved]
    for members, passes in ((solved, run.plan.recipe.passes), (rounded, (planning.RTN,))):
        if not members:
            continue
        unit = Layer(
            planned.name,
            {t.name: loaded.tensors[t.name] if loaded and t.is_solved else run.source.read(t.name).to(run.device) for t in members},
            {t.name: t.scheme for t in members if t.scheme},
            {t.name: t.tap for t in members if t.tap},
        )
        reports += _apply(run, unit, passes, stats, loaded)
    return reports


def _apply(
    run: _Run,
    layer: Layer,
    passes: tuple[PassSpec, ...],
    stats: Mapping[str, Stats],
    loaded: LoadedLayer | None = None,
) -> tuple[TensorReport, ...]:
    """All passes over one unit of work, then its tensors to the file, and decoded to ``loaded`` for the runs that follow."""
    reports: tuple[TensorReport, ...] = ()
    for spec in passes:
        reports = find("passes", spec.name).run(layer, stats, spec.build_options()).tensors
    for name in list(layer.quantized):
        tensor = layer.quantized.pop(name)
        run.put(name, tensor)
        if loaded is not None:
            loaded.set(name, find("qtypes", tensor.scheme.qtype).unpack(tensor))
    run.reports += reports
    return reports


def _record(run: _Run) -> dict[str, dict[str, Any]]:
    """Each coded tensor's scheme, error and notes, for quantcli.json."""
    reports = {report.name: report for report in run.reports}
    record: dict[str, dict[str, Any]] = {}
    for tensor in run.plan.tensors:
        if tensor.name in reports:
            report = reports[tensor.name]
            record[tensor.name] = {"scheme": str(tensor.scheme), "relative_error": report.relative_error, "notes": list(report.notes)}
        elif not tensor.outputs:
            record[tensor.name] = {"dropped": "this format has no place for it"}
    return record


@dataclass(slots=True)
class _Timed:
    """One layer of the walk and the clock that runs for it."""

    planned: PlannedLayer
    index: int
    n_layers: int
    started: float
    reports: list[TensorReport] = field(default_factory=list)

    def done(self) -> LayerDone:
        coded = [t for t in self.planned.tensors if planning.is_coded(t.scheme)]
        errors = [r.relative_error for r in self.reports if any(t.name == r.name for t in coded)]
        n_bytes = sum(spec.nbytes for t in self.planned.tensors for spec in t.outputs)
        return LayerDone(
            name=self.planned.name,
            index=self.index,
            n_layers=self.n_layers,
            relative_error=sum(errors) / len(errors) if errors else None,
            bpw=8 * n_bytes / max(1, sum(t.source.n_elements for t in self.planned.tensors)),
            seconds=time.perf_counter() - self.started,
            tensors=tuple(self.reports),
        )


def _timed(run: _Run) -> Iterator[_Timed]:
    for index, planned in enumerate(run.plan.layers):
        yield _Timed(planned, index, len(run.plan.layers), time.perf_counter())
        heap.trim()
