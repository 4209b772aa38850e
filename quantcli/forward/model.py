"""Forward: one HF causal LM whose weights are in memory a layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quantcli import cuts, heap
from quantcli.errors import UnsupportedError
from quantcli.forward.cache import OnUpdate
from quantcli.forward.layer import LoadedLayer
from quantcli.forward.names import NameMap, Source
from quantcli.forward.readers import Readers
from quantcli.forward.skeleton import build, drop, dtypes, put
from quantcli.forward.stack import Call, Stack
from quantcli.tensors import KvCache, TensorSpec

if TYPE_CHECKING:
    from quantcli.checkpoint import Checkpoint


def run_dtype(specs: Iterable[TensorSpec], device: str | torch.device) -> torch.dtype:
    """What a model is run in to be measured: float32, but bfloat16 on a GPU for a model whose matrices are stored in it.

    There it is 15 times as fast, and what engines compute in. A CPU without instructions for it takes over a hundred times as long.
    """
    stored = {spec.dtype for spec in specs if len(spec.shape) > 1}
    return torch.bfloat16 if torch.device(device).type == "cuda" and stored == {"BF16"} else torch.float32


class Forward:
    """One causal LM, layer by layer, with the same results as the whole model in the same dtype.

    ``layers``: the layers' names on disk; ``taps``: disk name of a linear's weight → tap, which is the name of the first linear that
    reads the same input, each expert's linears having taps of their own; ``untapped``: the layers' other matrices (routers, convolutions,
    experts of an unknown layout), which have no tap; ``unused``: disk tensors that the model has no place for; ``caches``: where keys and
    values are kept, whose taps are apart from ``taps``.

    ``checkpoint``: with a tensor for each expert's linear where its family has names for them (:mod:`quantcli.arrange`).
    Experts run one after the other, transformers' implementation "eager". ``all_tokens``: observed experts are shown every token, not
    only those routed to them.

    In memory are one layer while its context is open, or the embedding, or the head, and what is small beside them (norms).
    """

    layers: tuple[str, ...]
    taps: dict[str, str]
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
        self._names = NameMap(model, checkpoint.specs, checkpoint.source, cuts.experts_apart(checkpoint))
        self._dtypes = dtypes(self._model, dtype)
        self._stack = Stack(self._model)
        self._parts = self._divide()
        self._loaded: str | None = None  # "embedding" or "head"
        self._move_buffers()
        self._drop("embedding")
        self._load("rest")
        self._by_tokens = self._stack.trace(self.device)
        heap.trim()
        self._calls: dict[tuple[int, ...], list[Call]] = {}
        self._readers = [self._read_by(i) for i in range(len(self._stack.layers))]
        self.layers = tuple(readers.name for readers in self._readers)
        self._slices = {name: (i, x, e) for i, readers in enumerate(self._readers) for name, (x, e, _) in readers.slices.items()}
        self._changes: dict[int, dict[tuple[str, int], Callable[[Tensor], Tensor]]] = {}
        self.caches = tuple(cache for readers in self._readers for cache in readers.caches.values())
        self._cache_changes: dict[str, OnUpdate] = {}
        self.taps = {name: tap for readers in self._readers for name, tap in readers.taps.items()}
        self.unused = self._names.unused
        matrices = (name for i in range(len(self.layers)) for name in self.layer_tensors(i) if len(checkpoint.specs[name].shape) > 1)
        self.untapped = tuple(name for name in matrices if name not in self.taps)

    def another(self, *, dtype: torch.dtype | None = None) -> Forward:
        """A second one of the same checkpoint, whose weights nobody changes; in ``dtype`` where given."""
        dtype = dtype or self.dtype
        model = build(self.checkpoint.config, dtype, self.checkpoint.source)
        return Forward(self.checkpoint, model, dtype=dtype, device=self.device, all_tokens=self.all_tokens)

    def layer_tensors(self, index: int) -> tuple[str, ...]:
        """Disk names of the tensors of layer ``index``."""
        return tuple(name for source in self.sources(index) for name in source.disk)

    def embed(self, ids: Tensor) -> Tensor:
        """What the first layer is given for ``ids``: [B, T] int64. Returns [B, T, hidden] in the run's dtype."""
        self._need("embedding")
        return self._stack.embed(ids.to(self.device))

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [B, T, vocab] of the last layer's output ``hidden``: [B, T, hidden]; norm and soft caps are the model's own."""
        self._need("head")
        return self._stack.logits(self.entering(hidden))

    def observe_head(self, hidden: Tensor, on_input: Callable[[Tensor], None]) -> None:
        """``on_input(X)`` with what the output embedding reads, X [n_tokens, hidden]. No logits are computed."""

        def catch(x: Tensor) -> Tensor:
            on_input(x.flatten(0, -2))
            return x[..., :1]

        self._stack.logits(self.entering(hidden), catch)

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states between layers."""
        return int(self._model.config.get_text_config().hidden_size)

    @property
    def vocab_size(self) -> int:
        """Number of logits of a position."""
        return int(self._model.config.get_text_config().vocab_size)

    @property
    def head_weight(self) -> str | None:
        """Disk name of the output embedding's weight; None where it is the input embedding's."""
        if self._stack.head is None or self._model.config.get_text_config().tie_word_embeddings:
            return None
        return self._names.disk.get(f"{self._module_name(self._stack.head)}.weight")

    @property
    def head_in_features(self) -> int:
        """Width of what the output embedding reads."""
        if self._stack.head is None:
            raise UnsupportedError(f"{type(self._model).__name__} has no output embedding")
        return int(self._stack.head.weight.shape[-1])

    def on_read(self, weight: str, change: Callable[[Tensor], Tensor]) -> bool:
        """From now on the linear with the ``weight`` (on disk) reads ``change(X)`` for X [..., in]; False where that cannot be had.

        An expert's linears that run as one (gate and up) read what the first of them was given a change for.
        """
        if weight in self._slices:
            index, parameter, expert = self._slices[weight]
            self._changes.setdefault(index, {}).setdefault((parameter, expert), change)
            return True
        targets = [name.removesuffix(".weight") for name, disk in self._names.disk.items() if disk == weight and name.endswith(".weight")]
        modules = [self._model.get_submodule(target) for target in targets]
        linears = [module for module in modules if not isinstance(module, nn.Embedding)]  # which an lm_head may be tied to
        for module in linears:
            module.register_forward_pre_hook(partial(_change, change))
        return bool(linears)

    def on_cache(self, attention: str, change: OnUpdate) -> bool:
        """From now on the module ``attention`` (on disk) computes with ``change(K, V)`` of its keys and values, [B, kv_heads, T, head_dim],
        as from a cache that rounds them; False where that cannot be had."""
        if all(cache.attention != attention for cache in self.caches):
            return False
        self._cache_changes[attention] = change
        return True

    @contextmanager
    def layer(self, index: int) -> Iterator[LoadedLayer]:
        """Layer ``index`` with its weights in memory; they are freed at the end of the context."""
        self._release()
        self._load(str(index))
        try:
            yield LoadedLayer(self, index, self._stack.layers[index])
        finally:
            self._drop(str(index))
            heap.trim()

    def close(self) -> None:
        """Free all weights."""
        self._release()
        self._drop("rest")

    # -- for LoadedLayer -------------------------------------------------------------------------------------------------------

    def call(self, index: int, ids: Tensor) -> Call:
        """The arguments of layer ``index`` for ``ids`` [B, T].

        They are kept for the last two shapes (a full batch and a last one), unless they depend on the tokens.
        """
        ids = ids.to(self.device)
        if self._by_tokens:
            self._need("embedding")
            return self._stack.calls(ids, None)[index]
        shape = tuple(ids.shape)
        if shape not in self._calls:
            while len(self._calls) > 1:
                self._calls.pop(next(iter(self._calls)))
            self._calls[shape] = self._stack.calls(ids, 0.0)
        return self._calls[shape][index]

    def entering(self, hidden: Tensor) -> Tensor:
        return hidden.to(device=self.device, dtype=self.dtype)

    @property
    def has_experts(self) -> bool:
        """Whether some taps are those of experts, which see only the tokens routed to them."""
        return any(readers.experts for readers in self._readers)

    def readers(self, index: int) -> Readers:
        """What reads what in layer ``index``."""
        return self._readers[index]

    def changes(self, index: int) -> Mapping[tuple[str, int], Callable[[Tensor], Tensor]]:
        """What is made of the inputs of layer ``index``'s experts, by parameter and expert."""
        return self._changes.get(index, {})

    def cache_change(self, cache: KvCache) -> OnUpdate | None:
        """What is made of the keys and values of ``cache``."""
        return self._cache_changes.get(cache.attention)

    def repeats(self, index: int) -> bool:
        """Whether layer ``index`` calls one of its linears more than once in a forward."""
        return self._stack.traces[index].repeats

    def model_names(self, index: int) -> list[str]:
        """The model's names of the tensors of layer ``index``."""
        return self._parts[str(index)]

    def sources(self, index: int) -> list[Source]:
        """Where the tensors of layer ``index`` come from."""
        return self._sources(self.model_names(index))

    def tensor(self, target: str) -> Tensor:
        """The model's tensor ``target`` as it is in memory."""
        return self._model.get_parameter_or_buffer(target).data

    def rebuild(self, source: Source, names: Iterable[str], weights: Mapping[str, Tensor]) -> None:
        """Make those of the model's tensors ``names`` that come from ``source``.

        Disk tensors are taken from ``weights`` where given, else from the checkpoint.
        """

        def read(name: str) -> Tensor:
            tensor = weights[name] if name in weights else self.checkpoint.read(name)
            return tensor.to(device=self.device, dtype=self._dtypes[source.target])

        made = source.load(read, self._model)
        for name in names:
            if self._names.of.get(name) is source:
                put(self._model, name, made[name if name in made else source.target])  # a tied name is not in made

    # -- weights in and out ----------------------------------------------------------------------------------------------------

    def _divide(self) -> dict[str, list[str]]:
        """The model's tensors by part: "embedding", "head", "0", "1", … for the layers, and "rest", which is always in memory."""
        prefixes = {f"{self._stack.name}.{i}.": str(i) for i in range(len(self._stack.layers))}
        prefixes |= {f"{self._module_name(self._stack.embedding)}.": "embedding"}
        if self._stack.head is not None:
            prefixes |= {f"{self._module_name(self._stack.head)}.": "head"}
        parts: dict[str, list[str]] = {part: [] for part in (*prefixes.values(), "head", "rest")}
        starts = {len(prefix) for prefix in prefixes}
        for name in self._dtypes:
            part = next((prefixes[name[:n]] for n in starts if name[:n] in prefixes), "rest")
            parts[part].append(name)
        return parts

    def _sources(self, names: Iterable[str]) -> list[Source]:
        """The sources of the model's tensors ``names``, each once."""
        of = self._names.of
        return list({id(of[name]): of[name] for name in names if name in of}.values())

    def _load(self, part: str) -> None:
        for source in self._sources(self._parts[part]):
            self.rebuild(source, self._parts[part], {})

    def _drop(self, part: str) -> None:
        # Some models ask their embedding for its device, so it stays on it.
        device = self.device if part == "embedding" else torch.device("meta")
        for name in self._parts[part]:
            drop(self._model, name, device)

    def _need(self, part: str) -> None:
        """Have the weights of ``part`` ("embedding" or "head") in memory, and not those of the other."""
        if self._loaded == part:
            return
        self._release()
        self._load(part)
        self._loaded = part

    def _release(self) -> None:
        if self._loaded is not None:
            self._drop(self._loaded)
        self._loaded = None

    def _move_buffers(self) -> None:
        for name, buffer in list(self._model.named_buffers()):
            put(self._model, name, buffer.to(self.device))

    def _read_by(self, index: int) -> Readers:
        module, trace = f"{self._stack.name}.{index}", self._stack.traces[index]
        return Readers(self._model, module, trace, self._names, self.checkpoint.specs, self.layer_tensors(index))

    def _module_name(self, module: nn.Module | None) -> str:
        return next(name for name, m in self._model.named_modules() if m is module)


def _change(change: Callable[[Tensor], Tensor], _module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (change(inputs[0]), *inputs[1:])
