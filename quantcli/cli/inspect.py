"""quantcli inspect: what a checkpoint holds, from its headers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from quantcli.cli import options
from quantcli.cli.console import Console, count, size
from quantcli.cli.tables import render_memory, render_stats


def command(
    source: options.Source = ".",
    tensors: Annotated[bool, typer.Option("--tensors", help="List each tensor.")] = False,
    memory: Annotated[bool, typer.Option("--memory", help="Show the size at each shipped recipe, with the KV cache at --context.")] = False,
    context: Annotated[int, typer.Option(min=1, help="Tokens of context for --memory.")] = 4096,
    stats: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Show figures of a statistics file: outlier channels, kurtosis.")
    ] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Show architecture, size, number formats and quantization; reads headers only."""
    from quantcli import api

    console = Console(json, quiet, verbose)
    data = api.inspect(source, tensors=tensors, memory=memory, context=context, stats=stats)
    console.result(data, render(console, data))
    for note in data["notes"]:
        console.warn(note)
    for row in data.get("stats", ()):
        for warning in row["warnings"]:
            console.warn(f"{row['tap']}: {warning}")


def render(console: Console, data: dict[str, Any]) -> list[str]:
    formats = ", ".join(f"{n} x {name}" for name, n in data["dtypes"].items())
    lines = [
        f"source        {data['source']}",
        f"kind          {data['kind']}",
        f"architecture  {data['architecture']}",
        f"parameters    {count(data['n_params'])} in {data['n_tensors']} tensors",
        f"size          {size(data['n_bytes'])}, {data['bpw']:.3f}bpw",
        f"tensors       {formats}",
    ]
    for key, value in sorted((data["quantization"] or {}).items()):
        lines.append(f"  {key:<28} {brief(value)}")
    if rows := data.get("tensors"):
        cells = [[r["name"], r["scheme"] or r["dtype"], "x".join(map(str, r["shape"])), str(r["n_bytes"])] for r in rows]
        lines += ["", *console.table(["tensor", "format", "shape", "bytes"], cells)]
    lines += render_memory(console, data["memory"]) if "memory" in data else []
    return lines + (render_stats(console, data["stats"]) if "stats" in data else [])


def brief(value: Any) -> str:
    """A value on one line; what nests deeply is for ``--json``."""
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."
