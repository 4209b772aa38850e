"""What inspect --stats tells of the inputs that were measured: outliers, where the energy lies, and whether the text was enough."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from quantcli.cli.console import Console

if TYPE_CHECKING:
    from quantcli.stats_file import StatsFile
    from quantcli.tensors import Stats

TOP_SHARE = 0.01
"""The share of channels whose energy is told."""


def describe_stats(stats: StatsFile) -> list[dict[str, Any]]:
    """A row for each tap, in the order of the file; H is not read."""
    return [describe_tap(tap, stats.diagonals(tap)) for tap in stats]


def describe_tap(tap: str, stats: Stats) -> dict[str, Any]:
    """``outlier_channels``: those that reach 6.0, LLM.int8's threshold. ``absmax_over_rms`` stands in for kurtosis, whose fourth moment is
    not gathered: how far the range that a single scale must span exceeds the typical input. ``dead``: channels that were always zero."""
    from quantcli.ops.activations import OUTLIER

    n = len(stats.importance)
    energy = stats.importance.double().sort(descending=True).values
    total = float(energy.sum())
    rms = math.sqrt(total / n)
    absmax = float(stats.absmax.max())
    n_top = math.ceil(TOP_SHARE * n)
    row = {
        "tap": tap,
        "in_features": n,
        "n_tokens": stats.n_tokens,
        "absmax": absmax,
        "rms": rms,
        "absmax_over_rms": absmax / rms if rms else 0.0,
        "outlier_channels": int((stats.absmax >= OUTLIER).sum()),
        "energy_top1pct": float(energy[:n_top].sum()) / total if total else 0.0,
        "dead": int((stats.absmax == 0).sum()),
    }
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


def render_stats(console: Console, rows: list[dict[str, Any]]) -> list[str]:
    """The taps as a table, those with the widest range for their size first."""
    worst_first = sorted(rows, key=lambda row: row["absmax_over_rms"], reverse=True)
    headers = ["tap", "inputs", "tokens", "absmax", "rms", "absmax/rms", ">= 6.0", "top 1 %", "dead"]
    cells = [
        [
            row["tap"],
            str(row["in_features"]),
            str(row["n_tokens"]),
            f"{row['absmax']:.4g}",
            f"{row['rms']:.4g}",
            f"{row['absmax_over_rms']:.1f}",
            str(row["outlier_channels"]),
            f"{row['energy_top1pct']:.1%}",
            str(row["dead"]),
        ]
        for row in worst_first
    ]
    lines = ["", *console.table(headers, cells)]
    if any(row["outlier_channels"] for row in rows):
        lines.append(">= 6.0: channels that LLM.int8 keeps in 16 bits; top 1 %: the share of the energy in that many channels")
    return lines
