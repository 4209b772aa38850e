"""Where the verbs write: targets checked before the work, and the importance matrix that ``calibrate`` leaves beside its statistics."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from quantcli import formats
from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.errors import RecipeError
from quantcli.formats.gguf.imatrix import imatrix as imatrix_file
from quantcli.formats.gguf.imatrix import importance
from quantcli.formats.gguf.model.naming import gguf_names
from quantcli.output.disk import check_replaceable
from quantcli.planning.arrange import arrange
from quantcli.recipe import PassSpec, Recipe
from quantcli.statistics.stats_file import StatsFile
from quantcli.walk.events import Note
from quantcli.walk.notices import OnEvent


def check_target(target: Path, *, overwrite: bool, folder: bool) -> None:
    """Raise before hours of work what the writer would raise after them, and keep ``overwrite`` from other people's files."""
    check_replaceable(Path(os.path.realpath(target)), overwrite=overwrite, folder=folder)
    if target.is_file() and not formats.of("gguf").detect(target, None):
        raise RecipeError(f"{target}: is no GGUF file, so --overwrite will not replace it; choose another -o")


def check_statistics_target(output: Path, imatrix: Path | None, *, overwrite: bool) -> None:
    """Raise before the work where a file cannot be put. ``overwrite`` replaces statistics, never another file such as a model's shard."""
    for path in (output, imatrix):
        if path is not None:
            check_replaceable(Path(os.path.realpath(path)), overwrite=overwrite, folder=False)
    if output.is_file():
        StatsFile(output)


def write_imatrix(path: Path, stats: StatsFile, checkpoint: Checkpoint, datasets: Sequence[str], *, overwrite: bool, tell: OnEvent) -> None:
    """The statistics as llama-imatrix would have written them. ``datasets``: the names by which the user gave the text."""
    arranged = arrange(checkpoint, Recipe("imatrix", "gguf", (PassSpec("rtn"),)), run=True, all_taps=True)
    names = gguf_names(arranged.source.specs, arranged.source.config)
    measured = importance.measured(stats, arranged.taps, names)
    for target in importance.unmeasured(measured, names, arranged.source.specs):
        tell(Note(f"{path}: no entry for {target}, whose input was not measured", is_warning=True))
    failed = imatrix_file.write(
        path,
        measured,
        datasets=datasets,
        n_chunks=int(stats.metadata["n_samples"]),
        chunk_size=int(stats.metadata["seq_len"]),
        own_fields=importance.text_fields(importance.dataset_of(stats)),
        overwrite=overwrite,
    )
    for text in failed:
        tell(Note(text, is_warning=True))
