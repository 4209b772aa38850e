"""What the verbs take: a source opened and closed, datasets by name, windows of text, and what a run learns from."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from torch import Tensor
from typing_extensions import TypeIs

from quantcli.calibration.data import Data, Windows
from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.finite import culprit_named
from quantcli.formats import open_checkpoint
from quantcli.forward import tokenizer
from quantcli.planning import source_check
from quantcli.recipe import Recipe
from quantcli.statistics.stats_file import StatsFile
from quantcli.text import texts
from quantcli.walk.notices import OnEvent, Witness, note_to, windows_within

Source = str | os.PathLike[str] | Checkpoint
"""A folder, a file, a Hub id ``org/name[@revision]``, or a checkpoint that is open already."""

Text = str | os.PathLike[str] | Sequence[str]
"""A dataset as the command line names it (``mine.txt``, ``NAME=WEIGHT``), or several; () for the default text."""


@contextmanager
def opened(source: Source) -> Iterator[Checkpoint]:
    """``source`` opened, and closed at the end; one that was open already stays so. NaN and Inf of its own are told by their tensor."""
    if isinstance(source, Checkpoint):
        with culprit_named(source):
            yield source
        return
    with open_checkpoint(os.fspath(source)) as checkpoint, culprit_named(checkpoint):
        yield checkpoint


def check(checkpoint: Checkpoint, tell: OnEvent, *, takes_config: bool = True) -> None:
    """Hold ``checkpoint`` to what its architecture promises, before any work."""
    for text in source_check.check(checkpoint, takes_config=takes_config):
        note_to(tell, text, is_warning=True)


def named(data: Text) -> list[str]:
    """The datasets that ``data`` names."""
    return [os.fspath(data)] if isinstance(data, (str, os.PathLike)) else [os.fspath(word) for word in data]


def is_text(data: Text | Data) -> TypeIs[Text]:
    """Whether ``data`` names datasets, rather than being what a run learns from."""
    return isinstance(data, (str, os.PathLike, list, tuple))


def learn(checkpoint: Checkpoint, recipe: Recipe, data: Data | None, tell: Witness) -> Data | Callable[[], Data]:
    """What a run of ``recipe`` learns from; text is read and cut when it is first asked for."""
    if data is None:
        return partial(calibration_windows, checkpoint, recipe, tell)
    if isinstance(data, StatsFile) and recipe.is_calibrated:
        data.check_source(checkpoint, warn=partial(note_to, tell, is_warning=True))
    return data


def calibration_windows(checkpoint: Checkpoint, recipe: Recipe, tell: Witness) -> Windows:
    """Token windows of the texts that ``recipe`` is calibrated on, and some that are held out."""
    wanted, note = recipe.calibration, partial(note_to, tell)
    seq_len = windows_within(checkpoint, wanted.seq_len, tell)
    ids, held_out = texts.windows_and_held_out(
        wanted.datasets, tokenizer(checkpoint), wanted.samples, seq_len, recipe.seed, hold_out=True, note=note, read=tell.read
    )
    return Windows(ids, held_out, tuple(tell.rows))


def eval_windows(checkpoint: Checkpoint, data: Text, samples: int, seq_len: int, tell: Witness) -> Tensor:
    """The first windows [n, seq_len] of the texts, in order; by default of a text that calibration does not use."""
    seq_len = windows_within(checkpoint, seq_len, tell)
    note = partial(note_to, tell)
    return texts.eval_windows_of(named(data), tokenizer(checkpoint), samples, seq_len, note=note, read=tell.read)
