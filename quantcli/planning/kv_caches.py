"""Static scales for a quantized key-value cache: which layers get them, and their values.

An engine that stores keys and values in eight bits divides each by a scale of the layer's own (``tensors.KV_CACHES``), which a folder
brings along. Keys are measured as they enter the cache, with their positions rotated in, behind the layers as quantized.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantcli import formats
from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.errors import RecipeError, UnsupportedError
from quantcli.formats import OutputLayout
from quantcli.passes.shared import basis
from quantcli.passes.shared.activations import static_scale
from quantcli.recipe import Recipe
from quantcli.statistics.ranges import find_range
from quantcli.tensors import KvCache, Stats, TensorSpec

Fold = tuple[Tensor, Tensor]
"""``channel`` [in] int64, the row that makes each input of a tap, and ``s`` [in], by which that row was divided."""


@dataclass(frozen=True, slots=True)
class PlannedCache:
    """A cache that gets scales. ``outputs``: the file tensors that hold them."""

    cache: KvCache
    outputs: tuple[TensorSpec, ...]


def check(source: Checkpoint, recipe: Recipe, caches: Sequence[KvCache]) -> None:
    """Raise for a format that has no place for the scales, and for a model whose engine would not use them."""
    if not recipe.kv_cache:
        return
    if not formats.of(recipe.format).has_cache_scales:
        raise UnsupportedError(f"the {recipe.format} format has no place for the scales of a key-value cache; use compressed-tensors")
    config = source.config.get("text_config") or source.config
    if config.get("kv_lora_rank"):
        raise UnsupportedError(
            f"{source.source}: its attention is latent (kv_lora_rank): engines cache what keys and values are made from, and have no use "
            "for scales of these; leave kv_cache out"
        )
    if not caches:
        raise UnsupportedError(f"{source.source}: no layer of it hands keys and values by head to a cache; leave kv_cache out")
    if old := [cache.attention for cache in caches if cache.attention in source.kv_cache]:
        raise RecipeError(f"{source.source}: {old[0]} has scales for its cache already, which are kept; leave kv_cache out")


def planned(recipe: Recipe, caches: Sequence[KvCache], layout: OutputLayout) -> list[PlannedCache]:
    """What is written for ``caches``; nothing where the recipe does not ask for it."""
    if not recipe.kv_cache:
        return []
    return [PlannedCache(cache, tuple(layout.cache_outputs(cache))) for cache in caches]


def rebased(cache: KvCache, stats: Mapping[str, Stats], folds: Mapping[str, Sequence[Fold]]) -> dict[str, Stats]:
    """``stats`` of ``cache``, gathered before the rows of its attention's value projection were divided as ``folds`` tell: what enters it
    now. Keys are as they were: no fold reaches them.

    The rows that a fold names are those that make values, in their order, wherever in a joined projection they lie.
    """
    now = {tap: stats[tap] for tap in cache.widths if tap in stats}
    for weight in (weight for weight in folds if weight.startswith(f"{cache.attention}.")):
        for channel, s in folds[weight]:
            rows, value = channel.unique(return_inverse=True)
            if len(rows) != cache.widths[cache.v_tap]:
                raise UnsupportedError(
                    f"{weight}: a scale was folded into {len(rows)} of its rows, the cache holds {cache.widths[cache.v_tap]} values of a "
                    "token; give --dataset in place of --stats, so that the cache is measured as it is filled"
                )
            over = torch.ones(len(rows), dtype=s.dtype).index_put((value.cpu(),), s.cpu())
            now[cache.v_tap] = basis.rescaled(now[cache.v_tap], over)
    return now


def scales(cache: KvCache, recipe: Recipe, stats: Mapping[str, Stats]) -> tuple[Tensor, Tensor]:
    """The scales of keys and of values: each F32 [1], or [heads] where every head has its own, whose range is always its largest value."""
    act, by_head = f"{recipe.kv_cache.removesuffix('-head')}-tensor", recipe.kv_cache.endswith("-head")
    found = []
    for tap in (cache.k_tap, cache.v_tap):
        if tap not in stats or not stats[tap].n_tokens:
            raise RecipeError(f"{tap}: no token reached it, and {recipe.kv_cache} needs its range; calibrate on other text")
        absmax, histogram = stats[tap].absmax, stats[tap].histogram
        reach = [find_range("minmax", act, head, None) for head in absmax.view(cache.heads, -1)]
        reach = reach if by_head else [find_range(recipe.calibration.input_range, act, absmax, histogram)]
        found.append(torch.cat([static_scale(act, r) for r in reach]))
    return found[0], found[1]
