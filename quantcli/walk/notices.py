"""Notes and warnings of a run, told as events: what a user should know of a plan, a text, a model or the inputs of its linears."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import Tensor

from quantcli.calibration.text_check import TextCheck
from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.planning.schemes import listed
from quantcli.text import overlap
from quantcli.walk import evaluate as evaluation
from quantcli.walk.events import Note, Planned

OnEvent = Callable[[Any], object]
"""Called with each event of a run: :class:`Planned`, :class:`LayerDone`, :class:`Note` and the like (:mod:`quantcli.walk.events`)."""

HEX_SKETCH = re.compile("([0-9a-f]{8})+")


def note_to(tell: OnEvent, text: str, *, is_warning: bool = False) -> None:
    tell(Note(text, is_warning))


def announce(checkpoint: Checkpoint, event: Planned, tell: OnEvent) -> None:
    """What a user should know before the work begins."""
    if any(tensor.is_requantized for tensor in event.plan.tensors):
        text = f"{checkpoint.source} is quantized already, and its error stays; better start from the original weights"
        tell(Note(text, is_warning=True))
    for note in (*checkpoint.notes, *event.notes):
        tell(Note(note))
    dropped: dict[str, list[str]] = {}
    for tensor in event.plan.tensors:
        if not tensor.outputs:
            dropped.setdefault(event.plan.why_dropped(tensor), []).append(tensor.name)
    for reason, names in dropped.items():
        count = f" ({len(names)} tensors)" if len(names) > 1 else ""
        tell(Note(f"{listed(names)}: dropped{count}: {reason}", is_warning=True))


def tell_activations(checkpoint: Checkpoint, simulated: bool, tell: OnEvent) -> None:
    """A note on what becomes of the linears' inputs, where the engine rounds them."""
    acts: dict[str, int] = {}
    for act in evaluation.rounded_inputs(checkpoint).values():
        acts[act] = acts.get(act, 0) + 1
    kinds = ", ".join(f"{act} of {n} linears" for act, n in acts.items())
    if acts and simulated:
        tell(Note(f"inputs are rounded as the engine does: {kinds}; --no-activations measures the weights alone"))
    elif acts:
        tell(Note(f"inputs are taken as they are, where the engine rounds them: {kinds}"))


def warn_of_context(checkpoint: Checkpoint, seq_len: int, tell: OnEvent) -> None:
    """Warn of windows longer than the model was made for."""
    limit = checkpoint.config.get("max_position_embeddings")
    if isinstance(limit, int) and seq_len > limit:
        text = f"windows of {seq_len} tokens are longer than the {limit} this model was made for; lower --seq-len"
        tell(Note(text, is_warning=True))


def warn_of_text(known: TextCheck, tell: OnEvent) -> None:
    """Warn of a text that the model does not know."""
    if not known.is_low:
        return
    if known.perplexity != known.perplexity:
        text = "the model's logits on the calibration text have NaN; check the checkpoint with quantcli eval"
    else:
        text = (
            f"the calibration text has perplexity {known.perplexity:.0f} for this model, and {known.counted:.0f} by a count of its tokens: "
            "it is no text that the model has learned; check --dataset, or the checkpoint"
        )
    tell(Note(text, is_warning=True))


def warn_of_overlap(checkpoint: Checkpoint, ids: Tensor, tell: OnEvent) -> None:
    """Warn when the text was calibrated on, as far as ``checkpoint`` tells: its figures would then flatter it."""
    sketch = checkpoint.provenance.get("dataset_sketch")
    if not isinstance(sketch, str) or not HEX_SKETCH.fullmatch(sketch):
        return
    if (found := overlap.overlap(sketch, ids)).is_notable:
        text = f"{found.share:.0%} of this text was calibrated on, which flatters the model; give --dataset with other text"
        tell(Note(text, is_warning=True))
