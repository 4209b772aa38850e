"""Layer encoder: copies, converts or quantizes the tensors of one layer and writes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quantcli import conversions
from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.finite import PIECE_ELEMENTS, check_finite
from quantcli.errors import about
from quantcli.experts import expert_of
from quantcli.output.writer import Writer
from quantcli.passes import of as pass_of
from quantcli.passes.shared import basis
from quantcli.planning import kv_caches
from quantcli.planning import plan as planning
from quantcli.planning.kv_caches import Fold, PlannedCache
from quantcli.planning.plan import Plan, PlannedTensor
from quantcli.recipe import PassSpec
from quantcli.tensors import Absorber, Layer, QuantizedTensor, Stats, TensorReport, ordered_sum
from quantcli.walk.input_scales import with_input_scale

if TYPE_CHECKING:
    from quantcli.forward import LoadedLayer

LOST = 0.5
"""The relative error from which on a tensor is said to be lost: more than half of it is error."""

ZEROS = "all its weights are zero: it was never trained, or the file is damaged"

Recount = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
"""tap → s [in], by which its inputs are divided from now on; tap → the histogram of its inputs then."""


@dataclass(slots=True)
class LayerEncoder:
    """A source, a plan and the writer of its output; ``reports`` gather what was done to each tensor. Thread-safe but for ``loaded``.

    ``importance``: weight → the mean squares of its inputs [in], where a file gives them for a recipe whose passes measure nothing.

    ``folds``: weight of a linear → by what its rows were divided for other linears: the row that makes each of their inputs, and s [in].
    """

    source: Checkpoint
    plan: Plan
    writer: Writer
    device: torch.device
    importance: Mapping[str, Tensor] = field(default_factory=dict)
    reports: list[TensorReport] = field(default_factory=list)
    folds: dict[str, list[Fold]] = field(default_factory=dict)

    def encode(
        self,
        layer: str,
        tensors: Iterable[PlannedTensor],
        stats: Mapping[str, Stats],
        loaded: LoadedLayer | None = None,
        absorbers: Mapping[str, Absorber] | None = None,
        recount: Recount | None = None,
        held_out: Mapping[str, Tensor] | None = None,
    ) -> list[TensorReport]:
        """Run the passes over what is to be solved, round to nearest what else has a scheme, carry over and copy the rest.

        ``stats``: tap → Stats. ``loaded`` has the solved weights in memory already, and receives each one as the engine will see it.
        ``absorbers``: tap → what can absorb a scale of its inputs, for a recipe that changes the basis; the layer is whole then.
        ``recount`` counts inputs anew in the basis found, where their range is told by a histogram. ``held_out``: tap → inputs [n, in] of
        text that nothing is fitted to, on which errors are measured too.
        """
        tensors = list(tensors)
        few = [t for t in tensors if self.has_few_tokens(t, stats)]
        solved = [t for t in tensors if t.is_solved and t not in few]
        rounded = [t for t in tensors if not t.is_solved and t.scheme is not None and t.outputs and not t.kept]
        reports = [self.keep(t) for t in tensors if t.kept]
        changed: dict[str, Tensor] = {}
        now: Mapping[str, Stats] = {}
        if solved:
            unit = self.unit(layer, solved, loaded)
            if absorbers is not None:
                self.add_readers(unit, tensors, absorbers, few)
            solved_reports, now = self.solve(unit, self.plan.recipe.passes, stats, loaded, recount, held_out=held_out)
            reports += solved_reports
            changed = {name: tensor for name, tensor in unit.tensors.items() if name not in unit.schemes}
        if few:
            left = self.unit(layer, few, loaded)
            left.tensors |= {t.name: changed[t.name] for t in few if t.name in changed}
            theirs = {t.tap: now[t.tap] if t.tap in now else stats[t.tap] for t in few if t.tap}
            reports += self.fall_back(left, theirs, now, loaded)
        if rounded:
            reports += self.solve(self.unit(layer, rounded, None), (planning.RTN,), stats, loaded)[0]
        for t in tensors:
            if not t.kept and (t.scheme is None or not t.outputs):
                self.copy(t, changed.get(t.name), loaded)
        reports = [with_loss(report) for report in reports]
        self.reports += reports
        return reports

    def copy(self, tensor: PlannedTensor, changed: Tensor | None = None, loaded: LoadedLayer | None = None) -> None:
        """Write a tensor that is not coded: as it is in the source, or ``changed`` by a pass."""
        if not tensor.outputs:
            return
        if self.source.is_opaque(tensor.name):
            self._put(tensor.name, self.source.quantized(tensor.name))
            return
        data = self.source.read(tensor.name) if changed is None else changed
        check_finite(tensor.name, data)
        self._put(tensor.name, data)
        if changed is not None and loaded is not None:
            loaded.set(tensor.name, changed)

    def keep(self, tensor: PlannedTensor) -> TensorReport:
        """Write the codes of a quantized source on the grid of the tensor's scheme."""
        assert tensor.scheme is not None
        have = self.source.quantized(tensor.name)
        with about(tensor.name):
            out, is_exact = conversions.convert(have, tensor.scheme)
            error = 0.0 if is_exact else added_error(conversions.decode(have), conversions.decode(out))
        self._put(tensor.name, out)
        return TensorReport(tensor.name, error, (), is_exact)

    def unit(self, layer: str, tensors: Sequence[PlannedTensor], loaded: LoadedLayer | None) -> Layer:
        """``tensors`` as the passes see them; weights that are in memory are taken from ``loaded``."""
        return Layer(
            layer,
            {t.name: loaded.tensors[t.name] if loaded else self.source.read(t.name).to(self.device) for t in tensors},
            {t.name: t.scheme for t in tensors if t.scheme},
            {t.name: t.tap for t in tensors if t.tap},
            importance={t.name: self.importance[t.name].to(self.device) for t in tensors if t.name in self.importance},
        )

    def add_readers(
        self, unit: Layer, tensors: Sequence[PlannedTensor], absorbers: Mapping[str, Absorber], few: Sequence[PlannedTensor] = ()
    ) -> None:
        """Give ``unit`` what a change of basis touches beside what is to be solved: dense tensors that read its taps, or absorb a scale,
        and what of ``few``, to be coded later, reads the same.

        A tap has no absorber there when that would touch a tensor whose bytes are settled: kept, dropped, or rounded on its own.
        """
        later = {t.name: t.scheme for t in few if t.scheme}
        free = {t.name for t in tensors if t.name in unit.schemes or (t.scheme is None and t.outputs and not t.kept)} | later.keys()
        for tap in [tap for tap in dict.fromkeys(unit.taps.values()) if tap in absorbers]:
            if tap in unit.absorbers:
                continue
            readers = absorbers[tap].readers or {t.name: tap for t in tensors if t.tap == tap}
            touched = (*readers, *absorbers[tap].names)
            if not all(name in free for name in touched):
                continue
            unit.absorbers |= dict.fromkeys(absorbers[tap].taps(tap), absorbers[tap])
            unit.taps |= readers
            unit.deferred |= {name: later[name] for name in touched if name in later}
            for name in touched:
                if name not in unit.tensors:
                    unit.tensors[name] = self.source.read(name).to(self.device)

    def solve(
        self,
        unit: Layer,
        passes: Sequence[PassSpec],
        stats: Mapping[str, Stats],
        loaded: LoadedLayer | None = None,
        recount: Recount | None = None,
        others: Mapping[str, Stats] | None = None,
        held_out: Mapping[str, Tensor] | None = None,
    ) -> tuple[list[TensorReport], Mapping[str, Stats]]:
        """All ``passes`` over one unit of work, then its codes to the file, and decoded to ``loaded`` for the runs that follow.

        ``others``: statistics of the layer's taps, those of the unit's included, among which a tap without a range finds one. Returns the
        reports, and the statistics of what its taps read now.
        """
        reports: dict[str, TensorReport] = {}
        scaled: dict[str, Tensor] = {}
        for spec in passes:
            for report in pass_of(spec.name).run(unit, stats, spec.build_options()).tensors:
                if (before := reports.get(report.name)) is not None:
                    report = replace(report, notes=before.notes + report.notes, settings={**before.settings, **report.settings})
                reports[report.name] = report
            scaled |= {tap: s * scaled.get(tap, 1.0) for tap, s in unit.scales.items() if tap in stats}
            stats = self.rebased(unit, stats)
        if recount is not None and scaled:
            stats = {**stats, **{tap: replace(stats[tap], histogram=histogram) for tap, histogram in recount(scaled).items()}}
        for name in list(unit.quantized):
            tensor = unit.quantized.pop(name)
            tap, method = unit.taps.get(name, ""), self.plan.recipe.calibration.input_range
            tensor, note = with_input_scale(name, tensor, tap, {**(others or {}), **stats}, method)
            told = [note + self.advice(tap)] if note else []
            told += [] if bool(unit.tensors[name].any()) else [ZEROS]
            reports[name] = replace(reports[name], notes=(*reports[name].notes, *told))
            self._put(name, tensor)
            X = (held_out or {}).get(tap)
            if X is None and loaded is None:
                continue
            W_hat = conversions.decode(tensor)
            if X is not None:
                error = error_on(X / scaled[tap].to(X) if tap in scaled else X, unit.tensors[name], W_hat)
                reports[name] = replace(reports[name], held_out_error=error)
            if loaded is not None and name in loaded.tensors:  # which the format may have cut from one that the model has whole
                loaded.set(name, W_hat)
        return list(reports.values()), stats

    def rebased(self, unit: Layer, stats: Mapping[str, Stats]) -> dict[str, Stats]:
        """The statistics of what ``unit``'s taps read after a pass that may have changed their basis; ``folds`` keeps what made them."""
        now = {tap: stats[tap] for tap in dict.fromkeys(unit.taps.values()) if tap in stats}
        for tap in list(unit.scales):
            s, absorber = unit.scales.pop(tap), unit.absorbers[tap]
            now |= {tap: basis.rescaled(now[tap], s)} if tap in now else {}  # nobody asked for those of an expert that stays dense
            if unit.tensors[absorber.names[0]].ndim > 1:
                self.folds.setdefault(absorber.names[0], []).append((absorber.channel, s))
        return now

    def put_caches(self, planned: Iterable[PlannedCache], stats: Mapping[str, Stats]) -> None:
        """Write the scales of a layer's key-value caches; ``stats``: of what enters them as the layer is now."""
        for one in planned:
            parts = self.plan.layout.cache_parts(one.cache, kv_caches.scales(one.cache, self.plan.recipe, stats))
            for name, data in parts.items():
                self.writer.put(name, data)

    def has_few_tokens(self, tensor: PlannedTensor, stats: Mapping[str, Stats]) -> bool:
        """Whether too few calibration tokens reached ``tensor``, an expert's, for the recipe's passes to learn from: the router chooses."""
        recipe = self.plan.recipe
        if not (tensor.is_solved and tensor.tap and expert_of(tensor.tap) and any(spec.needs for spec in recipe.passes)):
            return False
        return tensor.tap in stats and stats[tensor.tap].n_tokens < recipe.calibration.min_tokens

    def advice(self, tap: str) -> str:
        """What helps an expert that the router sends few tokens, as the end of a sentence."""
        is_routed = expert_of(tap) is not None and self.plan.recipe.calibration.moe == "routed"
        return "; --moe all measures every expert on all tokens" if is_routed else ""

    def fall_back(
        self, unit: Layer, stats: Mapping[str, Stats], others: Mapping[str, Stats], loaded: LoadedLayer | None
    ) -> list[TensorReport]:
        """Code starved tensors by the recipe's fallback, with what their few tokens tell, and say so in their reports. ``others``:
        statistics of the layer's other taps."""
        calibration, passes = self.plan.recipe.calibration, ", ".join(spec.name for spec in self.plan.recipe.passes)
        n_tokens = {name: stats[tap].n_tokens for name, tap in unit.taps.items()}
        reached = {tap: stats[tap] for tap in stats if stats[tap].n_tokens}
        reports, _ = self.solve(unit, (PassSpec(calibration.fallback),), reached, loaded, others={**others, **stats})
        few = f"calibration tokens reached it, fewer than min_tokens {calibration.min_tokens}: {calibration.fallback} in place of {passes}"
        return [replace(r, notes=(f"{n_tokens[r.name]} {few}{self.advice(unit.taps[r.name])}", *r.notes)) for r in reports]

    def record(self) -> dict[str, dict[str, Any]]:
        """Each coded tensor's scheme, error and notes, for quantcli.json."""
        reports = {report.name: report for report in self.reports}
        record: dict[str, dict[str, Any]] = {}
        for tensor in self.plan.tensors:
            if tensor.name in reports:
                report = reports[tensor.name]
                record[tensor.name] = {"scheme": str(tensor.scheme), "relative_error": report.relative_error, "notes": list(report.notes)}
                record[tensor.name] |= {} if report.held_out_error is None else {"held_out_error": report.held_out_error}
                record[tensor.name] |= report.settings
                if tensor.kept:
                    record[tensor.name]["codes_of"] = str(self.source.schemes[tensor.name])
            elif not tensor.outputs:
                record[tensor.name] = {"dropped": self.plan.why_dropped(tensor)}
        return record

    def _put(self, name: str, tensor: Tensor | QuantizedTensor) -> None:
        for part, data in self.plan.layout.parts(name, tensor).items():
            self.writer.put(part, data)


def with_loss(report: TensorReport) -> TensorReport:
    """``report`` with a note where little is left of the tensor."""
    if report.loss < LOST:
        return report
    lost = f"lost: its relative error is {report.loss:.2f}, where zeros have 1; keep it dense (--skip), or take another scheme"
    return replace(report, notes=(*report.notes, lost))


def error_on(X: Tensor, W: Tensor, W_hat: Tensor) -> float | None:
    """‖(W−Ŵ)X‖² / ‖WX‖² of inputs ``X`` [n, in] for weights [out, in]; None where W makes nothing of them."""
    W = W.float()
    error, total = (float(ordered_sum((X @ M.to(X).T).square())) for M in (W - W_hat, W))
    return error / total if total > 0 else None


def added_error(W: Tensor, W_hat: Tensor) -> float:
    """‖W−Ŵ‖² / ‖W‖², summed in pieces so that no third copy is made."""
    error = total = 0.0
    for w, w_hat in zip(W.reshape(-1).split(PIECE_ELEMENTS), W_hat.reshape(-1).split(PIECE_ELEMENTS), strict=True):
        error += float(ordered_sum((w - w_hat).square()))
        total += float(ordered_sum(w.square()))
    return error / total if total > 0 else float(error > 0)
