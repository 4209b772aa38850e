"""Runs one model of transformers with one layer's weights in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quantcli import heap
from quantcli.checkpoint import views
from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.errors import RecipeError, UnsupportedError
from quantcli.forward.cache import OnUpdate
from quantcli.forward.even_pieces import EvenPieces
from quantcli.forward.layer import LoadedLayer, OnRead
from quantcli.forward.names import NameMap
from quantcli.forward.positions import rows_of
from quantcli.forward.readers import Readers
from quantcli.forward.skeleton import build
from quantcli.forward.stack import Call, Stack
from quantcli.forward.weights import EMBEDDING, HEAD, REST, Weights
from quantcli.tensors import KvCache, TensorSpec


def run_dtype(specs: Iterable[TensorSpec], device: str | torch.device) -> torch.dtype:
    """The dtype in which a model is run for measurements: float32, but bfloat16 on a GPU for a model whose matrices are stored in it.

    There it is 15 times as fast, and what engines compute in. On a CPU without instructions for it, it is over a hundred times as slow.
    """
    stored = {spec.dtype for spec in specs if len(spec.shape) > 1}
    return torch.bfloat16 if torch.device(device).type == "cuda" and stored == {"BF16"} else torch.float32


class Forward:
    """One model, layer by layer, with the same results as the whole model in the same dtype.

    A causal LM with its head; of every other (an encoder, a classifier, a model without a head) the base model, up to the last layer.

    ``layers``: the layers' names on disk; ``taps``: disk name of a linear's weight → tap, which is the name of the first linear that
    reads the same input, each expert's linears having taps of their own; ``turned``: those of them that are stored [in, out];
    ``untapped``: the layers' other matrices (routers, convolutions,
    experts of an unknown layout), which have no tap; ``unused``: disk tensors that the model does not use; ``caches``: the key-value
    caches, whose taps are not among ``taps``; ``positions``: the most tokens of a window, None where no table of positions limits it.

    ``checkpoint``: with a tensor for each expert's linear where its family has names for them (:mod:`quantcli.planning.arrange`).
    Experts run one after the other, transformers' implementation "eager". ``all_tokens``: observed experts run on every token, not only
    on those routed to them.

    In memory are one layer while its context is open, or the embedding, or the head, and the small tensors outside of them (norms).
    """

    layers: tuple[str, ...]
    taps: dict[str, str]
    turned: frozenset[str]
    untapped: tuple[str, ...]
    unused: tuple[str, ...]
    caches: tuple[KvCache, ...]

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: Any,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        all_tokens: bool = False,
    ) -> None:
        """``model``: what :func:`quantcli.forward.skeleton.build` made of the checkpoint's config in ``dtype``; it is changed."""
        self.dtype = dtype
        self.all_tokens = all_tokens
        self.device = torch.device(device)
        self._model = model
        self.checkpoint = checkpoint
        self.positions = rows_of(model)
        names = NameMap(model, checkpoint.specs, checkpoint.source, views.experts_apart(checkpoint))
        self._stack = Stack(self._model, has_head=names.has_head)
        self._weights = Weights(self._stack, names, checkpoint, dtype, self.device)
        self._by_tokens = self._stack.trace(self.device)
        heap.trim()
        self._calls: dict[tuple[int, ...], list[Call]] = {}
        self._readers = [self._read_by(i) for i in range(len(self._stack.layers))]
        self.layers = tuple(readers.name for readers in self._readers)
        self._slices = {name: (i, x, e) for i, readers in enumerate(self._readers) for name, (x, e, _) in readers.slices.items()}
        self._changes: list[dict[tuple[str, int], OnRead]] = [{} for _ in self._readers]
        self.caches = tuple(cache for readers in self._readers for cache in readers.caches.values())
        self._cache_changes: dict[str, OnUpdate] = {}
        self.taps = {name: tap for readers in self._readers for name, tap in readers.taps.items()}
        self.turned = frozenset[str]().union(*(readers.turned for readers in self._readers))
        self.unused = names.unused
        matrices = (name for i in range(len(self.layers)) for name in self.layer_tensors(i) if len(checkpoint.specs[name].shape) > 1)
        self.untapped = tuple(name for name in matrices if name not in self.taps)

    def another(self, *, dtype: torch.dtype | None = None) -> Forward:
        """A second instance of the same checkpoint, with the original weights; in ``dtype`` where given."""
        dtype = dtype or self.dtype
        model = build(self.checkpoint.config, dtype, self.checkpoint.source)
        return Forward(self.checkpoint, model, dtype=dtype, device=self.device, all_tokens=self.all_tokens)

    def layer_tensors(self, index: int) -> tuple[str, ...]:
        """Disk names of the tensors of layer ``index``."""
        return tuple(name for source in self._weights.sources(index) for name in source.disk)

    def embed(self, ids: Tensor) -> Tensor:
        """The input of the first layer for ``ids``: [B, T] int64. Returns [B, T, hidden] in the run's dtype."""
        if self.positions is not None and ids.shape[1] > self.positions:
            raise RecipeError(f"windows of {ids.shape[1]} tokens are longer than the {self.positions} positions that this model has")
        self._weights.need(EMBEDDING)
        with EvenPieces():
            return self._stack.embed(ids.to(self.device))

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [B, T, vocab] of the last layer's output ``hidden``: [B, T, hidden]; norm and soft caps are the model's own."""
        self._weights.need(HEAD)
        with EvenPieces():
            return self._stack.logits(self._entering(hidden))

    def observe_head(self, hidden: Tensor, on_input: Callable[[Tensor], None]) -> None:
        """``on_input(X)`` with what the output embedding reads, X [n_tokens, hidden]. No logits are computed."""

        def catch(x: Tensor) -> Tensor:
            on_input(x.flatten(0, -2))
            return x[..., :1]

        with EvenPieces():
            self._stack.logits(self._entering(hidden), catch)

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states between layers."""
        return int(self._model.config.get_text_config().hidden_size)

    @property
    def vocab_size(self) -> int:
        """Number of logits of a position."""
        return int(self._model.config.get_text_config().vocab_size)

    @property
    def predicts(self) -> bool:
        """Whether there are logits of the next token; only then :meth:`head` and :meth:`observe_head`."""
        return self._stack.head is not None

    @property
    def model_class(self) -> str:
        """transformers' name for the class of the model."""
        return type(self._model).__name__

    @property
    def head_weight(self) -> str | None:
        """Disk name of the output embedding's weight; None where it is the input embedding's."""
        if self._stack.head is None or self._model.config.get_text_config().tie_word_embeddings:
            return None
        return self._weights.names.disk.get(f"{self._stack.module_name(self._stack.head)}.weight")

    @property
    def head_in_features(self) -> int:
        """Width of what the output embedding reads."""
        if self._stack.head is None:
            raise UnsupportedError(f"{type(self._model).__name__} has no output embedding")
        return int(self._stack.head.weight.shape[-1])

    def on_read(self, weight: str, change: OnRead) -> bool:
        """From now on the linear with the ``weight`` (on disk) reads ``change(X)`` for X [..., in]; False where no module can do so.

        For an expert's linears that run as one (gate and up), the first change that was given applies to all.
        """
        if weight in self._slices:
            index, parameter, expert = self._slices[weight]
            self._changes[index].setdefault((parameter, expert), change)
            return True
        targets = [
            name.removesuffix(".weight") for name, disk in self._weights.names.disk.items() if disk == weight and name.endswith(".weight")
        ]
        modules = [self._model.get_submodule(target) for target in targets]
        linears = [module for module in modules if not isinstance(module, nn.Embedding)]  # which an lm_head may be tied to
        for module in linears:
            module.register_forward_pre_hook(partial(_change, change))
        return bool(linears)

    def on_cache(self, attention: str, change: OnUpdate) -> bool:
        """From now on the module ``attention`` (on disk) computes with ``change(K, V)`` of its keys and values, [B, kv_heads, T, head_dim],
        as from a cache that rounds them; False where it has no cache."""
        if all(cache.attention != attention for cache in self.caches):
            return False
        self._cache_changes[attention] = change
        return True

    @contextmanager
    def layer(self, index: int) -> Iterator[LoadedLayer]:
        """Layer ``index`` with its weights in memory; they are freed at the end of the context."""
        weights = self._weights
        weights.release()
        weights.load(index)
        try:
            yield LoadedLayer(
                self._stack.layers[index],
                self._readers[index],
                weights,
                index,
                call=partial(self._call, index),
                changes=self._changes[index],
                cache_changes=self._cache_changes,
                all_tokens=self.all_tokens,
            )
        finally:
            weights.drop(index)
            heap.trim()

    def close(self) -> None:
        """Free all weights."""
        self._weights.release()
        self._weights.drop(REST)

    @property
    def has_experts(self) -> bool:
        """Whether some taps are those of experts, which see only the tokens routed to them."""
        return any(readers.experts for readers in self._readers)

    def _call(self, index: int, ids: Tensor) -> Call:
        """The arguments of layer ``index`` for ``ids`` [B, T].

        They are kept for the last four shapes (a full batch and a last one, the text's check, windows held out), unless they depend on
        the tokens.
        """
        ids = ids.to(self.device)
        if self._by_tokens:
            self._weights.need(EMBEDDING)
            return self._stack.calls(ids, None)[index]
        shape = tuple(ids.shape)
        if shape not in self._calls:
            while len(self._calls) > 3:
                self._calls.pop(next(iter(self._calls)))
            self._calls[shape] = self._stack.calls(ids, 0.0)
        return self._calls[shape][index]

    def _entering(self, hidden: Tensor) -> Tensor:
        return hidden.to(device=self.device, dtype=self.dtype)

    def _read_by(self, index: int) -> Readers:
        module, trace, names = f"{self._stack.name}.{index}", self._stack.traces[index], self._weights.names
        return Readers(self._model, module, trace, names, self.checkpoint.specs, self.layer_tensors(index))


def _change(change: OnRead, _module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (change(inputs[0]), *inputs[1:])
