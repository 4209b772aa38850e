"""The main loop: for each layer load, measure, run the passes, write, free. It yields events."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from quantcli import ops, qtypes
from quantcli.calibration import measuring, resume, text_check
from quantcli.calibration.data import Data, Learned, Windows, checked, is_importance, protected_by, too_little, weighed
from quantcli.calibration.original import Original
from quantcli.calibration.resume import Resume
from quantcli.calibration.text_check import TextCheck
from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.readahead import reading_ahead
from quantcli.errors import RecipeError
from quantcli.forward import Forward, HiddenStates, LoadedLayer
from quantcli.forward.absorb import Absorbers
from quantcli.output.journal import Run
from quantcli.output.writer import Writer
from quantcli.planning import kv_caches, source_check
from quantcli.planning import plan as planning
from quantcli.planning.arrange import arrange
from quantcli.planning.plan import PlannedLayer, PlannedTensor
from quantcli.planning.schemes import is_quantized
from quantcli.recipe import Recipe
from quantcli.statistics.outliers import Protected
from quantcli.statistics.stats_file import StatsFile
from quantcli.tensors import DTYPES, HEAD, Absorber, Stats, TensorReport
from quantcli.walk.encoder import LayerEncoder
from quantcli.walk.events import Event, Finished, LayerDone, Planned, timed
from quantcli.walk.progress import Progress
from quantcli.walk.provenance import Provenance

MAX_TENSORS_AT_ONCE = 4
"""Tensors that are read, coded and written at the same time when no statistics tie them together; the threads are shared among them."""


def quantize(
    source: Checkpoint,
    target: Path,
    recipe: Recipe,
    *,
    data: Data | Callable[[], Data] | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    fresh: bool = False,
    dry_run: bool = False,
) -> Generator[Event, None, None]:
    """Write ``source`` to ``target`` as ``recipe`` says.

    ``data``: what the recipe learns from; a function that gives it is called once the plan stands, or for it (``protect_outliers``). With
    token windows each layer is measured on what the layers before it, already quantized, hand it; with statistics gathered before no layer
    runs; an importance matrix weighs plain rounding. Nothing stands at ``target`` until the last event; ``overwrite`` replaces what stood
    there only then. Close the walk (``contextlib.closing``) where you may leave it half way. The same call goes on behind the last finished
    layer of a walk that was left or killed, with the same bytes in the end; ``fresh`` starts over.
    """
    _check_apart(source, target)
    arranged = arrange(source, recipe, device)
    plan = planning.make(arranged, recipe, is_weighed=is_importance(data, recipe))
    learned = weighed(plan, data) if is_importance(data, recipe) else Learned()
    planning.check_importance(plan, learned.importance or ())
    protected: list[Protected] | None = None
    if recipe.protect_outliers is not None:  # whose plan follows from the inputs
        learned = checked(plan, data)
        if learned.stats is not None or not dry_run:
            protected = protected_by(plan, learned, arranged.forward)
            plan = planning.make(arranged, recipe, protected=protected)
    yield Planned(plan, (*plan.notes, *(learned.importance.notes if learned.importance is not None else ())))
    if dry_run:
        return
    if recipe.is_calibrated and learned.kind is None:
        learned = checked(plan, data)
    warning = too_little(plan, learned)
    provenance = replace(
        Provenance.of(arranged.source, recipe, untied=arranged.untied),
        data=learned.provenance(),
        protected=None if protected is None else tuple(unit.to_dict() for unit in protected),
    )
    text_check = None
    layout, record = plan.layout, provenance.to_dict()
    again = Run(resume.identity(source, device, recipe=recipe.to_dict(), data=learned.fingerprint), fresh)
    with layout.writer(target, plan.outputs, record, importance=learned.importance, overwrite=overwrite, run=again) as writer:
        _check_files_apart(source, writer)
        run = LayerEncoder(plan.source, plan, writer, torch.device(device), learned.importance or {})
        progress = Progress(run, Resume(writer))
        yield from progress.earlier()
        if learned.stats is not None:
            yield from _each_layer(progress, learned.stats, arranged.forward)
        elif learned.windows is not None:
            assert arranged.forward is not None
            text_check = yield from _propagate(progress, arranged.forward, learned.windows)
        else:
            yield from _each_tensor(progress)
        if writer.folder:
            rows = [one.to_dict() for one in learned.windows.rows] if learned.windows is not None else []
            told = {"dataset_sha256": None, **record, "coverage": plan.coverage, "rows": rows, "tensors": run.record()}
            told |= {"warnings": [warning]} if warning else {}
            writer.add_sidecar("quantcli.json", (json.dumps(told, indent=1, sort_keys=True) + "\n").encode())
        writer.commit(partial(source_check.check_output, recipe.format))
    exact = {report.name for report in run.reports if report.is_exact}
    lossless = all(tensor.name in exact or _is_exact(plan.source, tensor) for tensor in plan.tensors)
    warnings = (*([warning] if warning else []), *writer.notes)
    yield Finished(writer.target, plan, lossless, learned.dataset_sha256, text_check, learned.kind, warnings)


def _check_apart(source: Checkpoint, target: Path) -> None:
    """Raise :class:`RecipeError` when the output would replace the model that it is made from."""
    model, output = Path(os.path.realpath(source.path)), Path(os.path.realpath(target))
    if output == model or output in model.parents:
        raise RecipeError(f"{target}: the output would replace the model it is made from, {source.source}; choose another -o")


def _check_files_apart(source: Checkpoint, writer: Writer) -> None:
    """The same of files that are cut or joined, whose names the writer alone knows."""
    read = {os.path.realpath(path) for path in {location.path for location in source.locations()}}
    if taken := [path for path in writer.files if os.path.realpath(path) in read]:
        raise RecipeError(f"{taken[0]}: the output would replace the model it is made from, {source.source}; choose another -o")


def _is_exact(source: Checkpoint, tensor: PlannedTensor) -> bool:
    """Whether the output of ``tensor`` holds every value of the source."""
    if not tensor.outputs:
        return True
    if is_quantized(tensor.scheme):
        return False
    read = torch.float32 if tensor.name in source.schemes else DTYPES.get(tensor.source.dtype)
    stored = DTYPES.get(tensor.outputs[0].dtype)
    return read == stored or (read is not None and stored is not None and torch.promote_types(read, stored) == stored)


def _each_tensor(progress: Progress) -> Iterator[LayerDone]:
    """No statistics: every tensor for itself, a few at a time, written as they come."""
    run = progress.run
    left = run.plan.layers[progress.n_done :]
    layers = {layer.name: [(layer.name, unit) for unit in units(layer)] for layer in left}
    n_threads = torch.get_num_threads()
    n_at_once = min(n_threads + 1, MAX_TENSORS_AT_ONCE)  # one more than there are threads: it waits for the disk
    with ThreadPoolExecutor(n_at_once) as pool:
        futures: dict[str, Future[list[TensorReport]]] = {}
        try:
            ops.set_threads(max(1, n_threads // n_at_once))
            futures = {unit[0].name: pool.submit(run.encode, layer, unit, {}) for layer, unit in spread(list(layers.values()))}
            for layer in timed(run.plan, progress.n_done):
                for _, unit in layers[layer.planned.name]:
                    layer.reports += futures.pop(unit[0].name).result()
                yield progress.done(layer)
        finally:
            ops.set_threads(n_threads)
            for future in futures.values():
                future.cancel()


Unit = tuple[str, list[PlannedTensor]]
"""What is coded at once, and the layer it belongs to."""


def spread(layers: Sequence[Sequence[Unit]]) -> list[Unit]:
    """The units of all ``layers`` in the order of work: those of decoder layers as they come, and embedding, head and the like evenly among
    them. These are the largest: two side by side would take the most memory, and the last one would have one thread while others idle."""
    order = [unit for layer in layers for unit in layer if unit[0] != unit[1][0].name]
    alone = [unit for layer in layers for unit in layer if unit[0] == unit[1][0].name]
    step = len(order) // max(1, len(alone))
    for i in reversed(range(len(alone))):
        order.insert(i * step, alone[i])
    return order


def units(layer: PlannedLayer) -> list[list[PlannedTensor]]:
    """The tensors of ``layer`` one by one, but together those of one tap whose number format has parts that engines want them to share."""
    groups: dict[object, list[PlannedTensor]] = {}
    for tensor in layer.tensors:
        shared = tensor.is_solved and tensor.scheme is not None and qtypes.of(tensor.scheme.qtype).shares_parts
        groups.setdefault((tensor.tap, tensor.scheme) if shared else tensor.name, []).append(tensor)
    return list(groups.values())


def _each_layer(progress: Progress, stats: StatsFile, forward: Forward | None) -> Iterator[LayerDone]:
    """Statistics from a file: layer by layer, no error propagation, no forward pass but the trials of a change of basis."""
    run = progress.run
    names = [layer.name for layer in run.plan.layers[progress.n_done :]]
    absorbers_of = _absorbers(run, forward)
    for layer in reading_ahead(timed(run.plan, progress.n_done), names, (*run.source.locations(), *stats.locations())):
        name = layer.planned.name
        absorbers = absorbers_of(name) if absorbers_of else None
        layer.reports += run.encode(name, layer.planned.tensors, stats, None, absorbers)
        for one in layer.planned.caches:
            run.put_caches([one], kv_caches.rebased(one.cache, stats, run.folds))
        yield progress.done(layer)


def _propagate(progress: Progress, forward: Forward, data: Windows) -> Generator[LayerDone, None, TextCheck | None]:
    """Each layer is measured on the outputs of the quantized layers before it, quantized, and run again to feed the next.

    A few windows go through the layers as they came, to tell how well the source knows the text, which a model that predicts no text
    does not tell; all of them where a pass compares. The windows that are held out go behind the quantized layers too, and nothing but
    errors is measured on them.
    """
    run, kept, windows = progress.run, progress.states(), data.ids
    states = HiddenStates.enter(forward, windows, kept.get("states"))
    held_out = original = untouched = None
    if data.held_out is not None and run.plan.recipe.needs:
        held_out = HiddenStates.enter(forward, data.held_out, kept.get("held_out"))
    if "dXXT" in run.plan.recipe.needs:
        original = Original(forward, windows, kept.get("original"))
    if forward.predicts:
        untouched = HiddenStates.enter(forward, windows[text_check.sampled(windows)], kept.get("untouched"))
    del kept
    absorbers_of = _absorbers(run, forward)
    taps = list(dict.fromkeys(forward.taps.values()))  # in the order in which the model runs them
    index = {name: i for i, name in enumerate(forward.layers)}
    has_head = bool(run.plan.recipe.needs) and any(tensor.tap == HEAD and tensor.is_solved for tensor in run.plan.tensors)
    names = [layer.name for layer in run.plan.layers[progress.n_done :]]
    for layer in reading_ahead(timed(run.plan, progress.n_done), names, run.source.locations()):
        name = layer.planned.name
        walked: dict[str, HiddenStates] = {}
        if name not in index:
            is_head = has_head and any(tensor.tap == HEAD for tensor in layer.planned.tensors)  # which comes after all layers
            stats = measuring.measure_head(forward, states, needs=run.plan.recipe.needs, original=original) if is_head else {}
            layer.reports += run.encode(name, layer.planned.tensors, stats)
        else:
            absorbers = absorbers_of(name) if absorbers_of else None
            with forward.layer(index[name]) as loaded, original.layer(index[name]) if original else nullcontext():
                if untouched is not None:
                    untouched.advance(loaded)
                layer.reports += _measure_and_code(run, layer.planned, loaded, states, held_out, original, taps, absorbers)
                is_last = index[name] + 1 == len(forward.layers) and not has_head
                run.put_caches(layer.planned.caches, _leave(run, states, loaded, layer.planned, is_last=is_last))
                if held_out is not None and not is_last:
                    held_out.advance(loaded)
            others = {"untouched": untouched, "held_out": held_out, "original": original.states if original is not None else None}
            walked = {"states": states, **{key: one for key, one in others.items() if one is not None}}
        yield progress.done(layer, walked)
    return None if untouched is None else text_check.measure(forward, untouched, windows)


def _leave(run: LayerEncoder, states: HiddenStates, loaded: LoadedLayer, planned: PlannedLayer, *, is_last: bool) -> Mapping[str, Stats]:
    """Have the windows go through a coded layer, unless nothing comes after it. Returns the statistics of its caches, as it runs now."""
    taps, needs = [tap for one in planned.caches for tap in one.cache.widths], run.plan.recipe.cache_needs
    if taps and not is_last:
        return measuring.measure_and_advance(loaded, states, taps=taps, needs=needs)
    if taps:
        return measuring.measure(loaded, states, taps=taps, needs=needs)
    if not is_last:
        states.advance(loaded)
    return {}


def _absorbers(run: LayerEncoder, forward: Forward | None) -> Callable[[str], Mapping[str, Absorber]] | None:
    """Layer name → its taps' :class:`Absorber`, where a pass of the recipe changes the basis."""
    if forward is None or not run.plan.recipe.changes_basis:
        return None
    if forward.dtype != torch.float32:  # trials tell what holds from what does not by less than other types can show
        forward = forward.another(dtype=torch.float32)
    found, index = Absorbers(forward), {name: i for i, name in enumerate(forward.layers)}
    return lambda name: found.of(index[name]) if name in index else {}


def _measure_and_code(
    run: LayerEncoder,
    planned: PlannedLayer,
    loaded: LoadedLayer,
    states: HiddenStates,
    held_out: HiddenStates | None,
    original: Original | None,
    order: Sequence[str],
    absorbers: Mapping[str, Absorber] | None,
) -> list[TensorReport]:
    """Measure and code all taps of a layer at once, or with ``true_sequential`` one tap after the other, each seeing the ones before coded.
    ``held_out``: states of the windows that errors alone are measured on; ``order``: the model's taps as it runs them; ``absorbers``:
    given where a pass changes the basis, which ties all taps together."""
    needs = run.plan.recipe.needs
    measure = partial(measuring.measure, loaded, states, needs=needs, original=original)
    solved = [t for t in planned.tensors if t.is_solved]
    wanted = {t.tap for t in solved}
    taps = [tap for tap in order if tap in wanted]

    def held_inputs(taps: Sequence[str]) -> dict[str, Tensor]:
        return {} if held_out is None else measuring.kept_inputs(loaded, held_out, taps)

    if absorbers is not None:
        recount = partial(measuring.histograms, loaded, states) if "histogram" in needs else None
        return run.encode(planned.name, planned.tensors, measure(taps=taps), loaded, absorbers, recount, held_inputs(taps))
    stages = measuring.in_turn(taps) if run.plan.recipe.true_sequential else [taps]
    stages = [share for stage in stages for share in measuring.shares(stage, loaded.tap_widths, needs)]
    reports: list[TensorReport] = []
    for stage in stages:
        stats = measure(taps=stage) if needs else {}
        reports += run.encode(planned.name, [t for t in solved if t.tap in stage], stats, loaded, held_out=held_inputs(stage))
    return reports + run.encode(planned.name, [t for t in planned.tensors if not t.is_solved], {}, loaded)
