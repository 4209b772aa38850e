"""quantcli inspect --memory: what a model needs at each shipped recipe, and for its KV cache."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from quantcli.cli.console import Console, size

if TYPE_CHECKING:
    from quantcli.checkpoint.checkpoint import Checkpoint


def estimate(checkpoint: Checkpoint, context: int) -> dict[str, Any]:
    """The bytes of each shipped recipe that fits the model, planned and not measured, smallest first; activations are not counted."""
    from quantcli.planning import memory

    return {
        "context": context,
        "kv_cache_bytes": memory.kv_cache_bytes(checkpoint.config, context, memory.cache_word(checkpoint)),
        "recipes": [asdict(need) for need in memory.needs(checkpoint, context)],
    }


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
