"""Reading GPTQ folders: what their words declare, where they stand, and which of them are believed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quantcli.checkpoint.checkpoint import read_config
from quantcli.checkpoint.json_files import shown
from quantcli.checkpoint.shards import open_folder
from quantcli.formats.gptq.config import LEGACY_CONFIG, V1, declared_version, is_gptq, legacy_words, settings_reader
from quantcli.formats.shared.packed_folder import PackedCheckpoint


def detect(path: Path, config: dict[str, Any] | None) -> bool:
    """A folder whose config.json says gptq, or an old one that says it in quantize_config.json alone."""
    if config is None:
        return False
    words = config.get("quantization_config")
    if not words:
        return is_gptq(legacy_words(path), unnamed=True)
    return is_gptq(words, unnamed=False)


def read(path: Path) -> PackedCheckpoint:
    """The GPTQ folder at ``path``: headers, and the first zero points of each module."""
    config, legacy = read_config(path), legacy_words(path)
    words = config.get("quantization_config") or legacy
    notes: list[str] = []
    if isinstance(legacy, dict) and words is not legacy:
        keys = [key for key in ("bits", "group_size", "sym", "desc_act", "checkpoint_format") if key in words and key in legacy]
        differ = [f"{key} {shown(words[key])} / {shown(legacy[key])}" for key in keys if words[key] != legacy[key]]
        notes = [f"config.json and {LEGACY_CONFIG} differ in {', '.join(differ)}; the former is obeyed"] if differ else []
    version = declared_version(path, words)
    return PackedCheckpoint(
        path,
        kind="gptq",
        config=config,
        quantization=words,
        shards=open_folder(path),
        declared=settings_reader(words),
        said=f"checkpoint_format {version}",
        less_one=version == V1,
        notes=notes,
    )
