"""Importance matrices: what llama-imatrix measured of the pico model, our own measure of it, and matrices made up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFWriter
from torch import Tensor

from data.make_imatrix import N_CTX, TEXT
from quantcli import recipe as recipes
from quantcli.calibration import calibrate
from quantcli.formats import open_checkpoint
from quantcli.formats.gguf.imatrix import imatrix, importance
from quantcli.formats.gguf.model.naming import gguf_names
from quantcli.formats.gguf.types.filetypes import file_type
from quantcli.formats.gguf.types.mixes import FileType
from quantcli.forward import tokenizer
from quantcli.recipe import Recipe
from quantcli.statistics.stats_file import StatsFile
from quantcli.walk.events import Planned
from quantcli.walk.targets import write_imatrix
from support.places import DATA, PICO
from support.runs import run

GOLDEN = DATA / "pico-imatrix.gguf"


def chunks() -> Tensor:
    """The windows of llama-imatrix: consecutive, without overlap, a rest left out."""
    with open_checkpoint(str(PICO)) as source:
        ids = tokenizer(source)(TEXT, add_special_tokens=False)["input_ids"]
    n = len(ids) // N_CTX
    return torch.tensor(ids[: n * N_CTX]).view(n, N_CTX)


def measure(target: Path, ids: Tensor, *, hessian: bool, folder: Path = PICO) -> StatsFile:
    with open_checkpoint(str(folder)) as source:
        list(calibrate.calibrate(source, ids, target, hessian=hessian))
    return StatsFile(target)


def written(stats: StatsFile, path: Path, folder: Path = PICO) -> imatrix.Imatrix:
    """What ``calibrate --imatrix`` writes of ``stats``."""
    with open_checkpoint(str(folder)) as source:
        write_imatrix(path, stats, source, ["some.txt"], overwrite=False, tell=lambda event: None)
    return imatrix.read(path)


def quantize(target: Path, recipe: str, folder: Path = PICO, imatrix: Path | None = None, **options: Any) -> tuple[str, ...]:
    """``folder`` by a recipe with GGUF's options and an importance matrix; the notes."""
    data = None if imatrix is None else importance.read(imatrix)
    events = run(folder, target, replace(recipes.load(recipe), format_options=options), data)
    assert isinstance(events[0], Planned)
    return events[0].notes


def save(path: Path, sums: Mapping[str, np.ndarray], counts: Mapping[str, Sequence[float]], **keys: Any) -> Path:
    """A GGUF importance matrix by the gguf package, which is not ours."""
    writer = GGUFWriter(str(path), "none")
    writer.kv_data[0].clear()
    writer.add_string("general.type", "imatrix")
    writer.add_array("imatrix.datasets", keys.get("datasets", ["a.txt"]))
    writer.add_uint32("imatrix.chunk_count", keys.get("n_chunks", 2))
    for name in sums:
        writer.add_tensor(f"{name}.in_sum2", sums[name].astype(np.float32))
        writer.add_tensor(f"{name}.counts", np.array(counts[name], np.float32)[:, None])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def everything(folder: Path, width: int | None = None) -> dict[str, np.ndarray]:
    """Sums for every matrix of a tiny Llama's layers, by GGUF name; random, all positive."""
    random = np.random.default_rng(0)
    with open_checkpoint(str(folder)) as source:
        names = gguf_names(source.specs, source.config)
        wide = {names[hf]: spec.shape[-1] for hf, spec in source.specs.items() if len(spec.shape) == 2 and "blk" in names[hf]}
    return {name: random.random(width or n) + 0.1 for name, n in wide.items()}


def needs_matrix(kind: FileType) -> bool:
    """Whether llama-quantize refuses to make a file of this type without an importance matrix."""
    return not kind.types.isdisjoint(name.upper() for name in importance.needy_types(kind.number))


def weighed(recipe: str, folder: Path, scratch: Path) -> tuple[Recipe, imatrix.Imatrix | None]:
    """A shipped recipe, and for those that are refused without a matrix one of ``folder``'s own, written to ``scratch``."""
    loaded = recipes.load(recipe)
    if loaded.mix is None or not needs_matrix(file_type(loaded.mix)):
        return loaded, None
    sums = everything(folder)
    path = save(scratch / "weights.gguf", sums, {name: [4] for name in sums})
    return loaded, imatrix.read(path)
