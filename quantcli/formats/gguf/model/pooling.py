"""How an embedding model makes one vector of a text: from sentence-transformers' files to llama.cpp's ``pooling_type``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, PoolingType

from quantcli.checkpoint.json_files import read_json, shown
from quantcli.checkpoint.side_files import MODULES, module_folders
from quantcli.formats.gguf.model.metadata import read_object

MODES = {"mean_tokens": PoolingType.MEAN, "cls_token": PoolingType.CLS, "lasttoken": PoolingType.LAST}
"""sentence-transformers' words, behind ``pooling_mode_``, of what llama.cpp knows."""

WORDS = {"mean": PoolingType.MEAN, "cls": PoolingType.CLS, "lasttoken": PoolingType.LAST, "last": PoolingType.LAST}
"""The same in a config that has ``pooling_mode`` alone."""

LEFT_ALONE = ("Transformer", "Pooling", "Normalize")
"""Modules that llama.cpp runs: the model, its pooling, and a normalization of the vector, which it does on request."""


def add_pooling(keys: GGUFWriter, folder: Path) -> tuple[str, ...]:
    """``pooling_type``, where modules.json of ``folder`` names a pooling that llama.cpp knows; returns what a user should know."""
    modules = modules_of(folder)
    notes: list[str] = []
    if (path := modules.get("Pooling")) is not None:
        config = folder / path / "config.json"
        if (pooling := pooling_of(read_object(config))) is not None:
            keys.add_pooling_type(pooling)
        else:
            what = "is missing" if not config.is_file() else "names no pooling that llama.cpp has (mean, cls, lasttoken)"
            notes.append(f"{path}/config.json {what}: the file has no pooling_type, and llama.cpp wants --pooling")
    if others := [f"{kind} ({path})" for kind, path in modules.items() if kind not in LEFT_ALONE]:
        notes.append(f"{', '.join(others)} of {MODULES} has no place in GGUF: llama.cpp's vectors are those before it")
    return tuple(notes)


def modules_of(folder: Path) -> dict[str, str]:
    """Kind of module (the last part of its type) → its subfolder, as modules.json lists them."""
    places = module_folders(folder)
    listed = read_json(folder / MODULES, unique=False) if places else []
    found: dict[str, str] = {}
    for module in listed:
        path = str(module.get("path")).strip("/") if isinstance(module, dict) else ""
        if path in places:
            found[shown(str(module.get("type")).rpartition(".")[2]).strip("'")] = path
    return found


def pooling_of(config: Mapping[str, Any]) -> PoolingType | None:
    """llama.cpp's value for a pooling's ``config``; None for one that it lacks, or several side by side."""
    if isinstance(word := config.get("pooling_mode"), str):
        return WORDS.get(word)
    chosen = [key.removeprefix("pooling_mode_") for key, is_on in config.items() if key.startswith("pooling_mode_") and is_on is True]
    return MODES.get(chosen[0]) if len(chosen) == 1 else None
