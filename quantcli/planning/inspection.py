"""Data for `inspect`: what a checkpoint holds, read from headers, and figures from a statistics file."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict
from typing import Any

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.planning import memory
from quantcli.statistics.outliers import figures_of
from quantcli.statistics.stats_file import StatsFile
from quantcli.tensors import Scheme, Stats


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    specs = checkpoint.specs.values()
    n_params = sum(s.n_elements for s in specs)
    n_bytes = sum(s.nbytes for s in specs)
    architectures = checkpoint.config.get("architectures") or [checkpoint.config.get("model_type", "unknown")]
    formats = Counter(str(checkpoint.schemes.get(s.name, s.dtype.lower())) for s in specs)
    return {
        "source": checkpoint.source,
        "kind": checkpoint.kind,
        "architecture": architectures[0],
        "n_params": n_params,
        "n_tensors": len(checkpoint.specs),
        "n_bytes": n_bytes,
        "bpw": 8 * n_bytes / n_params if n_params else 0.0,
        "dtypes": dict(sorted(formats.items())),
        "quantization": quantization(checkpoint),
        "notes": list(checkpoint.notes),
    }


def quantization(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The format's own words, and over them what every format has: its name and version, the commonest scheme and its bits, groups and
    symmetry, how many tensors have which scheme, and the matrices left dense, numbers of layers as ``*``. None if nothing is quantized."""
    schemes = checkpoint.schemes
    words = dict(checkpoint.quantization or {})
    if not schemes:
        return words or None
    (main, _), *_ = Counter(schemes.values()).most_common()
    left = [name for name, spec in checkpoint.specs.items() if len(spec.shape) > 1 and name not in schemes]
    return words | {
        "dialect": checkpoint.kind,
        "version": words.get("checkpoint_format") or words.get("format") or words.get("version"),
        "bits": bits_of(main),
        "group_size": main.get("group_size", main.get("block_size")),
        "sym": main.get("sym"),
        "schemes": dict(sorted(Counter(map(str, schemes.values())).items())),
        "dense": dict(Counter(re.sub(r"\.\d+\.", ".*.", name) for name in left)),
    }


def bits_of(scheme: Scheme) -> int:
    """Bits of a code: an option of the scheme, or the number in its qtype's name."""
    match = re.search(r"\d+", scheme.qtype)
    return int(scheme.get("bits") or (match[0] if match else 0))


def list_tensors(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    rows = []
    for spec in checkpoint.specs.values():
        scheme = checkpoint.schemes.get(spec.name)
        row = {"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape), "n_bytes": spec.nbytes}
        rows.append({**row, "scheme": None if scheme is None else str(scheme)})
    return rows


def estimate(checkpoint: Checkpoint, context: int) -> dict[str, Any]:
    """The bytes of each shipped recipe that fits the model, planned and not measured, smallest first; activations are not counted."""
    return {
        "context": context,
        "kv_cache_bytes": memory.kv_cache_bytes(checkpoint.config, context, memory.cache_word(checkpoint)),
        "recipes": [asdict(need) for need in memory.needs(checkpoint, context)],
    }


def describe_stats(stats: StatsFile) -> list[dict[str, Any]]:
    """A row for each tap, in the order of the file; H is not read."""
    return [describe_tap(tap, stats.diagonals(tap)) for tap in stats]


def describe_tap(tap: str, stats: Stats) -> dict[str, Any]:
    """The figures of :mod:`quantcli.statistics.outliers`, and what they warn of."""
    row = {"tap": tap, **asdict(figures_of(stats))}
    return {**row, "warnings": warnings(row)}


def warnings(row: dict[str, Any]) -> list[str]:
    """What to do about a tap whose figures will hurt."""
    found = []
    if not row["n_tokens"]:
        return ["no token reached it: calibrate on more text, or on text of its domain"]
    if row["n_tokens"] < row["in_features"]:
        found.append(f"{row['n_tokens']} tokens for {row['in_features']} inputs: H is singular; calibrate on more text")
    if row["dead"]:
        found.append(f"{row['dead']} inputs were always zero: their weights are rounded as if they did not matter")
    return found
