"""Notes and warnings of a run, told as events: what a user should know of a plan, a text, a model or the inputs of its linears."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import Tensor

from quantcli.calibration.data import few_tokens
from quantcli.calibration.text_check import TextCheck
from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.experts import expert_of
from quantcli.planning.arrange import notes_on_head
from quantcli.planning.plan import Plan
from quantcli.planning.schemes import listed
from quantcli.statistics.stats_file import StatsFile
from quantcli.text import overlap
from quantcli.text.documents import Rows
from quantcli.walk import evaluate as evaluation
from quantcli.walk.events import Note, Planned

OnEvent = Callable[[Any], object]
"""Called with each event of a run: :class:`Planned`, :class:`LayerDone`, :class:`Note` and the like (:mod:`quantcli.walk.events`)."""

POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "max_target_positions", "seq_length")
"""The words of config.json for the tokens that a model was made for."""

LOW_COVERAGE = 0.9
"""The share of the layers' weights below which a user is told that the rest stays dense."""

HEX_SKETCH = re.compile("([0-9a-f]{8})+")


class Witness:
    """Passes events on to ``tell``, and keeps what a result says of them: warnings, and the rows of the datasets that were read."""

    def __init__(self, tell: OnEvent | None) -> None:
        self.warnings: list[str] = []
        self.rows: list[Rows] = []
        self._tell = tell

    def __call__(self, event: Any) -> None:
        if isinstance(event, Note) and event.is_warning:
            self.warnings.append(event.text)
        if self._tell is not None:
            self._tell(event)

    def read(self, rows: Rows) -> None:
        """A dataset was read."""
        self.rows.append(rows)
        warn_of_rows(rows, self)


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
    warn_of_coverage(event.plan, tell)


def tell_head(checkpoint: Checkpoint, tell: OnEvent) -> None:
    """A note where a head is stored that config.json ties to the embedding, and it differs."""
    for note in notes_on_head(checkpoint):
        tell(Note(f"{checkpoint.source}: {note}"))


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


def windows_within(checkpoint: Checkpoint, seq_len: int, tell: OnEvent) -> int:
    """``seq_len``, or the most tokens that the model takes at once, with a warning, where its positions are a table of fewer.

    Of a model that goes on beyond what it was made for, as rotary ones do, a warning alone.
    """
    inner = checkpoint.config.get("text_config")
    config = {**checkpoint.config, **(inner if isinstance(inner, dict) else {})}
    limit = next((config[key] for key in POSITIONS if isinstance(config.get(key), int)), None)
    if limit is not None and seq_len <= limit:
        return seq_len
    from quantcli.forward import table_rows  # transformers takes seconds to import

    rows = table_rows(checkpoint)
    if rows is not None and seq_len > rows:
        tell(Note(f"windows are cut to {rows} tokens, as many positions as this model has; {seq_len} were asked for", is_warning=True))
        return rows
    if limit is not None:
        text = f"windows of {seq_len} tokens are longer than the {limit} this model was made for; lower --seq-len"
        tell(Note(text, is_warning=True))
    return seq_len


def warn_of_rows(rows: Rows, tell: OnEvent) -> None:
    """Warn of a dataset's rows that have no text."""
    if rows.n_skipped:
        what = f"{rows.n_skipped} of the {rows.n_read} rows read of {rows.dataset} were skipped; the first is {rows.first_skipped}"
        tell(Note(what, is_warning=True))


def warn_of_few_tokens(stats: StatsFile, tell: OnEvent) -> dict[str, float]:
    """Warn where a tap has more inputs than it was given tokens. Tap → tokens for each of its inputs."""
    widths = {tap: stats.in_features(tap) for tap in stats}
    n_tokens = {tap: stats.n_tokens(tap) for tap in stats}
    if warning := few_tokens({tap: width for tap, width in widths.items() if not expert_of(tap)}, n_tokens):
        tell(Note(warning, is_warning=True))
    return {tap: n_tokens[tap] / widths[tap] for tap in stats}


def warn_of_coverage(plan: Plan, tell: OnEvent) -> None:
    """Warn where much of a model's layers stays dense because nothing here can code it."""
    left, coverage = plan.out_of_reach, plan.coverage
    if not left or plan.share_of(left) < 1 - LOW_COVERAGE or not plan.census()["quantized"]:
        return
    reasons: dict[str, list[str]] = {}
    for tensor in left:
        reasons.setdefault(plan.dense.get(tensor.name, "the recipe has no scheme for them"), []).append(tensor.name)
    parts = "; ".join(f"{listed(names)} stay dense: {reason}" for reason, names in reasons.items())
    text = f"only {coverage:.0%} of the weights in the decoder layers are coded: {parts}"
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
