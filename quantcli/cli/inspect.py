"""quantcli inspect: what a checkpoint holds, from its headers alone."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantcli.cli import options
from quantcli.cli.console import Console, count, size
from quantcli.cli.inputs import describe_stats, render_stats
from quantcli.cli.memory import estimate, render_memory

if TYPE_CHECKING:
    from quantcli.checkpoint.checkpoint import Checkpoint
    from quantcli.tensors import Scheme


def command(
    source: options.Source = ".",
    tensors: Annotated[bool, typer.Option("--tensors", help="List each tensor.")] = False,
    memory: Annotated[bool, typer.Option("--memory", help="Size at each shipped recipe, with the KV cache at --context.")] = False,
    context: Annotated[int, typer.Option(min=1, help="Tokens of context for --memory.")] = 4096,
    stats: Annotated[Path | None, typer.Option(metavar="FILE", help="Show what calibrate measured of inputs: outliers, energy.")] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Show architecture, size, number formats and what is quantized; no weight is read."""
    from quantcli.formats import open_checkpoint

    console = Console(json, quiet, verbose)
    with open_checkpoint(source) as checkpoint:
        data = describe(checkpoint)
        if tensors:
            data["tensors"] = list_tensors(checkpoint)
        if memory:
            data["memory"] = estimate(checkpoint, context)
        if stats is not None:
            data["stats"] = inputs_of(checkpoint, stats, console)
        console.result(data, render(console, data))
        for note in checkpoint.notes:
            console.warn(note)
    for row in data.get("stats", ()):
        for warning in row["warnings"]:
            console.warn(f"{row['tap']}: {warning}")


def inputs_of(checkpoint: Checkpoint, path: Path, console: Console) -> list[dict[str, Any]]:
    """What the statistics at ``path``, measured on this checkpoint, tell of its inputs."""
    from quantcli.statistics.stats_file import StatsFile

    stats = StatsFile(path)
    stats.check_source(checkpoint, warn=console.warn)
    return describe_stats(stats)


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
