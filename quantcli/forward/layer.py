"""A decoder layer with its weights in memory, which can be run, observed and changed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Set
from functools import partial

import torch
from torch import Tensor, nn
from typing_extensions import override

from quantcli.errors import CheckpointError, NumericsError
from quantcli.forward.cache import OnUpdate, watched
from quantcli.forward.even_pieces import EvenPieces
from quantcli.forward.experts import Products, all_tokens
from quantcli.forward.names import Source
from quantcli.forward.readers import Readers
from quantcli.forward.stack import Call
from quantcli.forward.weights import Weights
from quantcli.tensors import DTYPES, KvCache

OnInput = Callable[[str, Tensor], None]
"""``on_input(tap, X)`` with X [n_tokens, in] in the run's dtype; X is valid during the call only."""

OnRead = Callable[[Tensor], Tensor]
"""``change(X)`` for X [..., in] is what a linear reads in place of X."""


class LoadedLayer:
    """A decoder layer whose weights are in memory.

    ``tensors``: its weights by disk name: as they were set, else in the run's dtype where that represents the stored values exactly, else
    as stored. ``shows_all_tokens``: observed experts run on every token, rather than on those routed to them.
    """

    name: str
    shows_all_tokens: bool

    def __init__(
        self,
        module: nn.Module,
        readers: Readers,
        weights: Weights,
        index: int,
        *,
        call: Callable[[Tensor], Call],
        changes: Mapping[tuple[str, int], OnRead],
        cache_changes: Mapping[str, OnUpdate],
        all_tokens: bool,
    ) -> None:
        """Layer ``index``, which ``weights`` has loaded. ``call``: the module's arguments for ids [B, T]; ``changes``: of experts' inputs,
        by parameter and expert; ``cache_changes``: of keys and values, by attention; ``all_tokens``: see ``shows_all_tokens``."""
        self.name = readers.name
        self.shows_all_tokens = all_tokens
        self._module, self._readers, self._weights, self._index = module, readers, weights, index
        self._call = call
        self._changes, self._cache_changes = changes, cache_changes
        self._sources = {name: source for source in weights.sources(index) for name in source.disk}
        self._set: dict[str, Tensor] = {}
        self._stale: dict[str, Source] = {}  # by target: to be made again from what was set
        self._rewritten: set[str] = set()  # experts' weights that were set, in their parameter's rows

    @property
    def tap_widths(self) -> dict[str, int]:
        """Every tap of the layer → its in_features."""
        specs, turned = self._weights.checkpoint.specs, self._readers.turned
        shapes = {tap: (f"{tap}.weight" in turned, specs[f"{tap}.weight"].shape) for tap in self._readers.taps.values()}
        return {tap: shape[0 if is_turned else -1] for tap, (is_turned, shape) in shapes.items()}

    @property
    def cache_widths(self) -> dict[str, int]:
        """Every tap of the layer's keys and values → its width."""
        caches = self._readers.cache_modules().values()
        return {tap: width for cache in caches for tap, width in cache.widths.items()}

    @property
    def device(self) -> torch.device:
        return self._weights.device

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Made on each call: stored, it would form a reference cycle, and the weights would outlive the layer."""
        return _Tensors(self._sources, self.get)

    def get(self, name: str) -> Tensor:
        """The weight ``name`` (on disk)."""
        if name in self._set:
            return self._set[name]
        source = self._sources[name]
        stored = self._weights.checkpoint.specs[name].dtype
        if name in self._rewritten:
            return self._slice(name).clone()  # what is set next is written over the slice
        if source.is_copy:
            live = self._weights.tensor(source.target)
            if live.dtype in (DTYPES.get(stored), torch.float32):
                return live
        return self._weights.checkpoint.read(name).to(self._weights.device)

    def set(self, name: str, W: Tensor) -> None:
        """Replace the weight ``name`` (on disk) by ``W`` of its shape, for the runs that follow."""
        expected = self._weights.checkpoint.specs[name].shape
        if tuple(W.shape) != expected:
            raise CheckpointError(f"{name}: a weight of shape {list(expected)} cannot be replaced by one of shape {list(W.shape)}")
        if name in self._readers.slices and self._slice(name).copy_(W).dtype == W.dtype:
            self._rewritten.add(name)
            self._set.pop(name, None)
            return
        self._set[name] = W
        if name in self._readers.slices:  # rounded to the run's dtype in its rows
            self._rewritten.discard(name)
            return
        self._stale[self._sources[name].target] = self._sources[name]

    def __call__(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """The layer's output for ``hidden`` [B, T, hidden] of the tokens ``ids`` [B, T], in the run's dtype.

        Raises :class:`NumericsError` when it is not finite.
        """
        self._refresh()
        call = self._call(ids)
        with torch.no_grad(), EvenPieces(), self._changed():
            output = call.run(self._module, hidden.to(device=self._weights.device, dtype=self._weights.dtype))
        output = output if isinstance(output, Tensor) else output[0]
        if not torch.isfinite(output).all():
            raise NumericsError(f"{self.name}: its output has NaN or Inf in {self._weights.dtype}; check the weights, or run in float32")
        return output

    def observe(self, hidden: Tensor, ids: Tensor, on_input: OnInput, taps: Collection[str] | None = None) -> Tensor:
        """The same as a call; ``on_input(tap, X)`` receives the inputs of ``taps`` (None: all linears'), or of a cache, as it runs."""
        with self._hooked(self._wanted(taps), on_input):
            return self(hidden, ids)

    def inputs(self, hidden: Tensor, ids: Tensor, on_input: OnInput, taps: Collection[str] | None = None) -> None:
        """``on_input(tap, X)`` with the inputs of ``taps`` (None: all linears'); the layer runs no further than the last of them."""
        wanted = self._wanted(taps)
        missing = set(wanted)

        def note(tap: str, X: Tensor) -> None:
            on_input(tap, X)
            missing.discard(tap)
            if not missing and not self._readers.repeats:
                raise _AllSeen

        with self._hooked(wanted, note), contextlib.suppress(_AllSeen):
            self(hidden, ids)

    def _wanted(self, taps: Collection[str] | None) -> Set[str]:
        known = set(self._readers.taps.values())
        return known if taps is None else {tap for tap in (*known, *self.cache_widths) if tap in taps}

    @contextlib.contextmanager
    def _hooked(self, wanted: Set[str], on_input: OnInput) -> Iterator[None]:
        """Within the context, ``on_input`` receives the inputs of the taps ``wanted``."""
        modules = self._readers.tap_modules()
        handles = [m.register_forward_pre_hook(partial(_tell, on_input, tap)) for tap, m in modules.items() if tap in wanted]
        caches = self._readers.cache_modules().items()
        updates = {module: partial(_tell_cache, on_input, cache, wanted) for module, cache in caches if wanted & cache.widths.keys()}
        try:
            with self._watched(wanted, on_input), watched(updates):
                yield
        finally:
            for handle in handles:
                handle.remove()

    @contextlib.contextmanager
    def _watched(self, wanted: Set[str], on_input: OnInput) -> Iterator[None]:
        """The part of :meth:`_hooked` for experts."""
        self._refresh()  # before the parameters' places in memory are noted
        taps = {x.parameter: x.taps for x in self._readers.experts if wanted & set(x.taps)}

        def on_product(parameter: str, expert: int, X: Tensor) -> None:
            if (tap := taps[parameter][expert]) in wanted:
                on_input(tap, X.flatten(0, -2))

        if not taps:
            yield
            return
        products = Products({name: self._weights.tensor(name) for name in taps}, on_product)
        with products, contextlib.ExitStack() as stack:
            if self.shows_all_tokens:
                stack.enter_context(all_tokens(self._readers.expert_modules(), products))
            yield

    @contextlib.contextmanager
    def _changed(self) -> Iterator[None]:
        """Within it, experts read their inputs as changed by :meth:`Forward.on_read`, and caches hold what ``on_cache`` returns."""
        caches = self._readers.cache_modules().items()
        changes = {module: change for module, cache in caches if (change := self._cache_changes.get(cache.attention))}
        with watched(changes), self._changed_experts():
            yield

    @contextlib.contextmanager
    def _changed_experts(self) -> Iterator[None]:
        if not self._changes:
            yield
            return

        def on_product(parameter: str, expert: int, X: Tensor) -> Tensor | None:
            change = self._changes.get((parameter, expert))
            return None if change is None else change(X)

        with Products({name: self._weights.tensor(name) for name, _ in self._changes}, on_product):
            yield

    def _slice(self, name: str) -> Tensor:
        """The rows of the model's parameter that the expert's weight ``name`` is."""
        parameter, expert, rows = self._readers.slices[name]
        return rows.of(self._weights.tensor(parameter)[expert])

    def _refresh(self) -> None:
        """Rebuild the model's tensors that are made of weights which have been set since."""
        for source in self._stale.values():
            self._weights.rebuild(source, self._index, self._set)
        self._stale.clear()


class _AllSeen(Exception):
    """Ends a forward pass of which the rest is not needed."""


def _tell(on_input: OnInput, tap: str, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    on_input(tap, inputs[0].flatten(0, -2))


def _tell_cache(on_input: OnInput, cache: KvCache, wanted: Set[str], K: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    for tap, states in ((cache.k_tap, K), (cache.v_tap, V)):
        if tap in wanted:
            on_input(tap, states.transpose(1, 2).flatten(2).flatten(0, 1))  # [n_tokens, heads · dim]
    return K, V


class _Tensors(Mapping[str, Tensor]):
    """The weights of a loaded layer by disk name, read when asked for."""

    def __init__(self, names: Mapping[str, Source], get: Callable[[str], Tensor]) -> None:
        self._names = names
        self._get = get

    @override
    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._get(name)

    @override
    def __contains__(self, name: object) -> bool:
        return name in self._names

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    @override
    def __len__(self) -> int:
        return len(self._names)
