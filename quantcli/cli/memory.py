"""quantcli inspect --memory: what a model needs at each shipped recipe, and for its KV cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quantcli.cli.console import Console, size

if TYPE_CHECKING:
    from quantcli.checkpoint import Checkpoint

KV_BYTES = 2
"""Bytes of one key or value: engines keep them in 16 bits unless told otherwise."""


def estimate(checkpoint: Checkpoint, context: int) -> dict[str, Any]:
    """The bytes of each shipped recipe that fits the model, planned and not measured, smallest first; activations are not counted."""
    from quantcli import cuts
    from quantcli import plan as planning
    from quantcli import recipe as recipes
    from quantcli.errors import RecipeError, UnsupportedError

    checkpoint = cuts.unfused(checkpoint)
    taps = planning.declared_taps(checkpoint)
    if taps is None:
        from quantcli.forward import Forward

        taps = Forward(checkpoint).taps
    rows = []
    for name in recipes.shipped():
        try:
            plan = planning.make(checkpoint, recipes.load(name), taps)
        except (RecipeError, UnsupportedError):  # this one does not fit the model
            continue
        rows.append({"recipe": name, "format": plan.recipe.format, "n_bytes": plan.n_bytes, "bpw": plan.bpw})
    return {
        "context": context,
        "kv_cache_bytes": kv_cache_bytes(checkpoint.config, context),
        "recipes": sorted(rows, key=lambda row: row["n_bytes"]),
    }


def kv_cache_bytes(config: dict[str, Any], context: int) -> int | None:
    """2 · layers · KV heads · head_dim · context · 2 bytes; None where the config does not say them. One sequence, no sliding window."""
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    head_dim = config.get("head_dim") or (hidden // heads if isinstance(heads, int) and isinstance(hidden, int) and heads else None)
    factors = (config.get("num_hidden_layers"), config.get("num_key_value_heads") or heads, head_dim)
    if not all(isinstance(factor, int) for factor in factors):
        return None
    layers, kv_heads, width = factors
    return 2 * layers * kv_heads * width * context * KV_BYTES  # type: ignore[operator]


def render_memory(console: Console, data: dict[str, Any]) -> list[str]:
    cache = data["kv_cache_bytes"]
    rows = [
        [row["recipe"], row["format"], f"{row['bpw']:.3f}", size(row["n_bytes"]), size(row["n_bytes"] + (cache or 0))]
        for row in data["recipes"]
    ]
    table = console.table(["recipe", "format", "bpw", "weights", "with KV cache"], rows)
    known = "unknown: config.json does not say its shape" if cache is None else f"{size(cache)} in 16 bits"
    return [
        "",
        *(table if rows else ["no shipped recipe fits this model"]),
        f"KV cache of {data['context']} tokens: {known}; activations come on top",
    ]
