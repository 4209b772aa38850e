"""Progress of a run over the layers: what an earlier process finished, and the record of each layer that is done."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field

from torch import Tensor

from quantcli.calibration.resume import Resume, Resumed
from quantcli.forward import HiddenStates
from quantcli.tensors import TensorReport
from quantcli.walk.encoder import LayerEncoder
from quantcli.walk.events import LayerDone, Timed


@dataclass(slots=True)
class Progress:
    """``run`` and its finished layers; ``n_done``: how many of the plan's layers an earlier process finished."""

    run: LayerEncoder
    resume: Resume
    n_done: int = field(init=False, default=0)

    def earlier(self) -> Iterator[Resumed | LayerDone]:
        """The layers that an earlier process finished, told again as it told them; their tensors lie in the output."""
        plan = self.run.plan
        self.n_done = len(self.resume.steps)
        if self.n_done:
            yield Resumed(self.resume.writer.work.path, self.n_done, len(plan.layers))
        for index, step in enumerate(self.resume.steps):
            reports = tuple(TensorReport(**{**report, "notes": tuple(report["notes"])}) for report in step.told["reports"])
            self.run.reports += reports
            told = step.told
            yield LayerDone(step.name, index, len(plan.layers), told["relative_error"], plan.layers[index].bpw, told["seconds"], reports)

    def states(self) -> Mapping[str, Tensor]:
        """Name → the hidden states behind the last layer that was finished; empty at the start."""
        return self.resume.states()

    def done(self, layer: Timed, states: Mapping[str, HiddenStates] | None = None) -> LayerDone:
        """``layer`` is finished, and put on the record; ``states``: what the next layers start from. Only the layer's own tensors
        are recorded: later ones may be on their way already."""
        done = layer.done()
        told = {
            "seconds": done.seconds,
            "relative_error": done.relative_error,
            "reports": [asdict(report) for report in done.tensors],
        }
        outputs = [spec for tensor in layer.planned.tensors for spec in tensor.outputs]
        outputs += [spec for cache in layer.planned.caches for spec in cache.outputs]
        self.resume.finish(done.name, told, {name: one.hidden for name, one in (states or {}).items()}, [s.name for s in outputs])
        return done
