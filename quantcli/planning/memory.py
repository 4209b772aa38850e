"""Memory table: bytes of the weights at each shipped recipe and of the key-value cache, computed from plans."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantcli import recipe as recipes
from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.modules import Modules
from quantcli.errors import RecipeError, UnsupportedError
from quantcli.forward import Forward
from quantcli.planning import plan as planning
from quantcli.planning.arrange import arrange
from quantcli.planning.plan import Plan
from quantcli.recipe import Recipe

KV_BYTES = 2
"""Bytes of one key or value: engines keep them in 16 bits unless a model has scales for a smaller cache."""


@dataclass(frozen=True, slots=True)
class Need:
    """What a recipe's output takes: ``n_bytes`` of tensors, ``kv_cache_bytes`` for one sequence, None where the config does not say."""

    recipe: str
    format: str
    n_bytes: int
    bpw: float
    kv_cache_bytes: int | None


def needs(checkpoint: Checkpoint, context: int) -> list[Need]:
    """Every shipped recipe that fits the model, smallest first; the bytes are those that its dry run gives. ``context``: tokens."""
    found = []
    forward: Forward | None = None
    modules: Modules | None = None
    for name in recipes.shipped():
        recipe = recipes.load(name)
        try:
            # where the key-value cache gets scales, only the model itself shows where these are
            arranged = arrange(checkpoint, recipe, run=bool(recipe.kv_cache), forward=forward, modules=modules)
            forward = arranged.forward or forward
            modules = arranged.modules if arranged.format.lists_modules else modules
            plan = planning.make(arranged, recipe)
            if needs_importance(plan):
                plan = planning.make(arranged, recipe, is_weighed=True)
        except (RecipeError, UnsupportedError):  # this one does not fit the model
            continue
        cache = kv_cache_bytes(checkpoint.config, context, cache_word(checkpoint, recipe))
        found.append(Need(name, recipe.format, plan.n_bytes, plan.bpw, cache))
    return sorted(found, key=lambda need: need.n_bytes)


def needs_importance(plan: Plan) -> bool:
    """Whether ``plan`` is of no use without an importance matrix."""
    try:
        planning.check_importance(plan, ())
    except RecipeError:
        return True
    return False


def cache_word(checkpoint: Checkpoint, recipe: Recipe | None = None) -> str:
    """How the key-value cache is stored (``tensors.KV_CACHES``), by the recipe or by the checkpoint's own scales; "" for 16 bits."""
    if recipe is not None and recipe.kv_cache:
        return recipe.kv_cache
    return next(iter(checkpoint.kv_cache.values()), "")


def kv_cache_bytes(config: Mapping[str, Any], context: int, kv_cache: str = "") -> int | None:
    """2 · layers · KV heads · head_dim · context · bytes; None where the config does not say them. One sequence, no sliding window.
    ``kv_cache``: of ``tensors.KV_CACHES``, which are of one byte, or ""."""
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    head_dim = config.get("head_dim") or (hidden // heads if isinstance(heads, int) and isinstance(hidden, int) and heads else None)
    layers, kv_heads = config.get("num_hidden_layers"), config.get("num_key_value_heads") or heads
    if not (isinstance(layers, int) and isinstance(kv_heads, int) and isinstance(head_dim, int)):
        return None
    return 2 * layers * kv_heads * head_dim * context * (1 if kv_cache else KV_BYTES)
