"""A Hugging Face folder of AutoRound's own (``quant_method: auto-round``), read only: integers packed as GPTQ or AWQ does.

``packing_format`` decides which, by auto-round's own rule (export/export_to_autoround, inference/backend.py of 0.15)::

    … awq …                              AWQ's interleaved packing
    … gptq … without gptqmodel, auto     GPTQ's packing, zero points stored less one
    any other, auto_round:gptqmodel      GPTQ's packing, zero points as they are

The name behind these, ``:exllamav2`` say, is a kernel and changes nothing. ``extra_config`` has settings by module, whose keys are names
or regular expressions that are searched for; a width above 8 bits is a dense module. The tensors show bits and groups.

AutoRound's other exports carry the names of other formats (gptq, awq, compressed-tensors, GGUF) and are read as such. Those in which an
engine does more than multiply integers (FP8 and MX types, quantized activations, rotations) are refused. Nothing is written: engines that
take this dialect take gptq and awq as well.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from typing_extensions import override

from quantcli.checkpoint.checkpoint import Checkpoint, read_config
from quantcli.checkpoint.json_files import shown
from quantcli.checkpoint.shards import open_folder
from quantcli.errors import UnsupportedError
from quantcli.formats import DEFAULTS, Format, Request
from quantcli.formats.shared.packed_folder import PackedCheckpoint, Settings
from quantcli.formats.shared.patterns import compiled
from quantcli.tensors import Scheme

DEFAULT_PACKING = "auto_round:auto_gptq"
WAY_OUT = "export it by auto-round as auto_gptq, auto_awq or llm_compressor, or start from the dense model"


def detect(path: Path, config: dict[str, Any] | None) -> bool:
    """A folder whose config.json declares auto-round (early ones: intel/auto-round)."""
    quant_config = (config or {}).get("quantization_config")
    return isinstance(quant_config, dict) and "auto-round" in str(quant_config.get("quant_method")).lower().replace("_", "-")


def read(path: Path) -> PackedCheckpoint:
    """The AutoRound folder at ``path``: headers, and the first zero points of each module."""
    config = read_config(path)
    quant_config = config["quantization_config"]
    check_quant_config(path, quant_config)
    packing = quant_config.get("packing_format") or quant_config.get("backend") or DEFAULT_PACKING
    layout = layout_of(path, packing)
    return PackedCheckpoint(
        path,
        kind="auto-round",
        config=config,
        quantization=quant_config,
        shards=open_folder(path),
        declared=settings_reader(quant_config),
        zero_setting=f"packing_format {shown(packing)}",
        less_one=layout == "less one",
        interleaved=layout == "interleaved",
    )


def check_quant_config(path: Path, quant_config: Mapping[str, Any]) -> None:
    """Raise :class:`UnsupportedError` for what is more than integers times scales."""
    if (kind := quant_config.get("data_type", "int")) not in ("int", None):
        raise UnsupportedError(f"{path}: data_type {shown(kind)} in AutoRound's own layout is not read; {WAY_OUT}")
    if isinstance(bits := quant_config.get("act_bits"), int) and bits <= 8:
        raise UnsupportedError(f"{path}: activations of {bits} bits in AutoRound's own layout are not read; {WAY_OUT}")
    if rotated := next((key for key in ("rotation_config", "spinquant_config") if quant_config.get(key)), None):
        raise UnsupportedError(f"{path}: {rotated}: its engine rotates activations as it runs, which quantcli does not; {WAY_OUT}")


def layout_of(path: Path, packing: object) -> str:
    """ "interleaved", "less one" or "as it is"; :class:`UnsupportedError` for a packing of floats or of one engine."""
    head = str(packing).lower().removeprefix("auto_round:")
    if not isinstance(packing, str) or re.search(r"fp\d|mx|mlx|compressor|hpu", head):
        raise UnsupportedError(f"{path}: packing_format {shown(packing)} is not read; {WAY_OUT}")
    if "awq" in head:
        return "interleaved"
    return "less one" if head == "auto" or ("gptq" in head and "gptqmodel" not in head) else "as it is"


def settings_reader(quant_config: Mapping[str, Any]) -> Callable[[str], Settings]:
    """The declared settings of a module: the folder's, as changed by ``extra_config``; a name goes before a pattern."""
    extra = {key: own for key, own in entries(quant_config.get("extra_config")) if isinstance(own, dict)}
    patterns = [(compiled, own) for key, own in extra.items() if (compiled := pattern_of(key))]

    def of(module: str) -> Settings:
        own = extra.get(module) or next((found for pattern, found in patterns if pattern.search(module)), {})
        merged = {**quant_config, **own}
        bits = merged.get("bits")
        skipped = isinstance(bits, int) and bits > 8
        return Settings(None if skipped else bits, merged.get("group_size", 128), bool(merged.get("sym", True)), skipped=skipped)

    return of


def entries(value: object) -> list[tuple[str, Any]]:
    return list(value.items()) if isinstance(value, dict) else []


def pattern_of(key: str) -> re.Pattern[str] | None:
    """``key`` as a regular expression; None for a plain name, and for what cannot be matched."""
    return compiled(key) if re.search(r"[*+?^$\\[(|]", key) else None


class AutoRound(Format):
    """AutoRound's own folders, which are only read."""

    is_written = False

    @override
    def detect(self, path: Path, config: dict[str, Any] | None) -> bool:
        return detect(path, config)

    @override
    def read(self, path: Path) -> Checkpoint:
        return read(path)

    @override
    def layout(self, source: Checkpoint, schemes: Mapping[str, Scheme], request: Request = DEFAULTS) -> NoReturn:
        raise UnsupportedError("auto-round is a format that quantcli reads and does not write; --format gptq or awq loads wherever it does")


FORMAT = AutoRound()
