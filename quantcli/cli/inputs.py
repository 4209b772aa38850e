"""What inspect --stats tells of the inputs that were measured: outliers, where the energy lies, and whether the text was enough."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from quantcli.cli.console import Console

if TYPE_CHECKING:
    from quantcli.statistics.stats_file import StatsFile
    from quantcli.tensors import Stats


def describe_stats(stats: StatsFile) -> list[dict[str, Any]]:
    """A row for each tap, in the order of the file; H is not read."""
    return [describe_tap(tap, stats.diagonals(tap)) for tap in stats]


def describe_tap(tap: str, stats: Stats) -> dict[str, Any]:
    """The figures of :mod:`quantcli.statistics.outliers`, and what they warn of."""
    from quantcli.statistics.outliers import figures_of

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


def render_stats(console: Console, rows: list[dict[str, Any]]) -> list[str]:
    """The taps as a table, those with the widest range for their size first."""
    worst_first = sorted(rows, key=lambda row: row["absmax_over_rms"], reverse=True)
    headers = ["tap", "inputs", "tokens", "absmax", "rms", "absmax/rms", "kurtosis", ">= 6.0", "top 1 %", "coverage"]
    cells = [
        [
            row["tap"],
            str(row["in_features"]),
            str(row["n_tokens"]),
            f"{row['absmax']:.4g}",
            f"{row['rms']:.4g}",
            f"{row['absmax_over_rms']:.1f}",
            "-" if row["kurtosis"] is None else f"{row['kurtosis']:.1f}",
            str(row["outlier_channels"]),
            f"{row['energy_top1pct']:.1%}",
            f"{row['coverage']:.1%}",
        ]
        for row in worst_first
    ]
    lines = ["", *console.table(headers, cells)]
    if any(row["outlier_channels"] for row in rows):
        lines.append(">= 6.0: channels that LLM.int8 keeps in 16 bits; top 1 %: the share of the energy in that many channels")
    return lines
