"""Key-value caches: observes keys and values as a layer stores them, or rounds them as an engine does, in any architecture.

transformers' attention passes its keys (rotated) and values to ``past_key_values.update`` and uses what that returns. So a stand-in for
the cache, passed to each attention module, receives both, [B, kv_heads, T, head_dim], and may change them; compressed-tensors' own
inference does the same. A layer without a cache of that kind (linear attention, or one that reads another layer's) has none here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

ARGUMENT = "past_key_values"

OnUpdate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""``on_update(K, V)``, both [B, kv_heads, T, head_dim], returns what the attention computes with."""


class StandIn:
    """Passed to an attention module in place of a cache; ``inner``: another cache, updated with what this one returns."""

    def __init__(self, on_update: OnUpdate, inner: Any = None) -> None:
        self._on_update = on_update
        self._inner = inner

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        key, value = self._on_update(key, value)
        return (key, value) if self._inner is None else self._inner.update(key, value, *args, **kwargs)


def attention_modules(layer: nn.Module) -> dict[str, nn.Module]:
    """The modules of ``layer`` that may have a cache, by name: recognized as compressed-tensors does, which applies a folder's scales."""
    found = {name: m for name, m in layer.named_modules() if "attention" in type(m).__name__.lower()}
    return {name: m for name, m in found.items() if ARGUMENT in inspect.signature(m.forward).parameters}


@contextmanager
def watched(modules: Mapping[nn.Module, OnUpdate]) -> Iterator[None]:
    """While it lasts each of ``modules`` is given a stand-in for its cache."""
    handles = [module.register_forward_pre_hook(partial(_give, on_update), with_kwargs=True) for module, on_update in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _give(on_update: OnUpdate, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {**kwargs, ARGUMENT: StandIn(on_update, kwargs.get(ARGUMENT))}


def found_in(layer: nn.Module, run: Callable[[], Any]) -> dict[str, tuple[int, int, int]]:
    """The attention modules of ``layer`` that update a cache exactly once as ``run()`` runs it: name → heads, k_dim, v_dim.

    Empty where the layer uses more of a cache than ``update``.
    """
    updates: dict[str, list[tuple[int, int, int]]] = {}

    def note(name: str, K: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
        is_by_head = K.ndim == V.ndim == 4 and K.shape[:3] == V.shape[:3]
        updates.setdefault(name, []).append((K.shape[1], K.shape[3], V.shape[3]) if is_by_head else (0, 0, 0))
        return K, V

    modules = attention_modules(layer)
    try:
        with watched({m: partial(note, name) for name, m in modules.items()}):
            run()
    except (AttributeError, TypeError):  # an attribute or an argument that a stand-in lacks
        return {}
    return {name: first for name, (first, *more) in updates.items() if not more and first[0]}
