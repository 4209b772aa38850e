"""Reading GPTQ folders: where the quantization config is, and which declared settings are trusted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quantcli.checkpoint.checkpoint import read_config
from quantcli.checkpoint.json_files import shown
from quantcli.checkpoint.shards import open_folder
from quantcli.formats.gptq.config import LEGACY_CONFIG, V1, declared_version, is_gptq, legacy_config, settings_reader
from quantcli.formats.shared.packed_folder import PackedCheckpoint


def detect(path: Path, config: dict[str, Any] | None) -> bool:
    """A folder whose config.json declares gptq, or an old one that declares it in quantize_config.json alone."""
    if config is None:
        return False
    quant_config = config.get("quantization_config")
    if not quant_config:
        return is_gptq(legacy_config(path), unnamed=True)
    return is_gptq(quant_config, unnamed=False)


def read(path: Path) -> PackedCheckpoint:
    """The GPTQ folder at ``path``: headers, and the first zero points of each module."""
    config, legacy = read_config(path), legacy_config(path)
    quant_config = config.get("quantization_config") or legacy
    notes: list[str] = []
    if isinstance(legacy, dict) and quant_config is not legacy:
        keys = [key for key in ("bits", "group_size", "sym", "desc_act", "checkpoint_format") if key in quant_config and key in legacy]
        differ = [f"{key} {shown(quant_config[key])} / {shown(legacy[key])}" for key in keys if quant_config[key] != legacy[key]]
        notes = [f"config.json and {LEGACY_CONFIG} differ in {', '.join(differ)}; the former is used"] if differ else []
    version = declared_version(path, quant_config)
    return PackedCheckpoint(
        path,
        kind="gptq",
        config=config,
        quantization=quant_config,
        shards=open_folder(path),
        declared=settings_reader(quant_config),
        zero_setting=f"checkpoint_format {version}",
        less_one=version == V1,
        notes=notes,
    )
