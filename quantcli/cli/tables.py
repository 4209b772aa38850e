"""The tables of inspect: memory at each recipe, and what was measured of inputs."""

from __future__ import annotations

from typing import Any

from quantcli.cli.console import Console, size


def render_memory(console: Console, data: dict[str, Any]) -> list[str]:
    cache = data["kv_cache_bytes"]
    rows = [
        [row["recipe"], row["format"], f"{row['bpw']:.3f}", size(row["n_bytes"]), size(row["n_bytes"] + (row["kv_cache_bytes"] or 0))]
        for row in data["recipes"]
    ]
    table = console.table(["recipe", "format", "bpw", "weights", "with KV cache"], rows)
    known = "unknown: config.json does not say its shape" if cache is None else size(cache)
    return [
        "",
        *(table if rows else ["no shipped recipe fits this model"]),
        f"KV cache of {data['context']} tokens: {known}; activations come on top",
    ]


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
