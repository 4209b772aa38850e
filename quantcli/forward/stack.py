"""Runs the model's own forward with stubs in place of its layers, to find what it passes to each layer and does with the result.

So masks, rotary tables, layer types, embedding scales and soft caps are the model's own, whatever the architecture. The linears that
share an input (a *tap*) are found in one forward of two tokens, each layer with zeros for weights.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quantcli.errors import QuantcliError, UnsupportedError
from quantcli.forward.cache import found_in
from quantcli.forward.classes import is_causal
from quantcli.forward.experts import Products
from quantcli.forward.skeleton import decoder_layers, drop, put, zero_pages

Run = Callable[..., Any]

_DATA_FREE = "recipes without calibration (nf4, fp8-dynamic) work"
_TOGETHER = "they cannot be run one at a time; quantcli cannot calibrate this architecture yet"


@dataclass(frozen=True, slots=True)
class Call:
    """The arguments of one layer besides the hidden states: masks, rotary tables, positions."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def split(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
        """The hidden states, and the rest of what a decoder layer was called with."""
        if args:
            return args[0], cls(args[1:], dict(kwargs))
        return kwargs["hidden_states"], cls((), {k: v for k, v in kwargs.items() if k != "hidden_states"})

    def run(self, forward: Run, hidden: Tensor) -> Any:
        return forward(hidden, *self.args, **self.kwargs)

    def tensors(self) -> list[Tensor]:
        """Every tensor among the arguments, in a fixed order."""
        return list(_tensors((self.args, self.kwargs)))


@dataclass(frozen=True, slots=True)
class Trace:
    """What one short forward shows of a layer.

    ``n_outputs``: length of the tuple that it returns, or None for the bare hidden states; ``taps``: each linear → the first linear that
    reads the same input, by module name within the layer; ``repeats``: a linear is called more than once in a forward; ``experts``:
    each parameter that holds a linear of every expert → the first one whose slice reads the same input; ``caches``: each module that
    keeps keys and values → heads, width of a key's and of a value's.
    """

    n_outputs: int | None
    taps: dict[str, str]
    repeats: bool
    experts: dict[str, str]
    caches: dict[str, tuple[int, int, int]]

    def output(self, hidden: Tensor) -> Any:
        """``hidden`` in the form in which the layer returns it."""
        return hidden if self.n_outputs is None else (hidden, *(None for _ in range(self.n_outputs - 1)))


class Stack:
    """The decoder or encoder layers of ``model``, an empty one, between its embedding and its head.

    ``name``: the stack's module name; ``head``: the output embedding of a causal LM, None for every other model, of which only the base
    model is run; ``traces``: one for each layer, filled by :meth:`trace`.
    """

    def __init__(self, model: Any, *, has_head: bool = True) -> None:
        """``has_head``: whether the checkpoint has the weights of a causal LM's output embedding."""
        self.model = model
        self._is_causal = is_causal(model.config.model_type, type(model).__name__)
        self.head: nn.Linear | None = model.get_output_embeddings() if has_head and self._is_causal else None
        self._runner: Any = model if self.head is not None else model.base_model
        self._check_runs()
        try:
            self.embedding: nn.Embedding = model.get_input_embeddings()
        except NotImplementedError as error:  # transformers' answer for a model of several inputs
            raise UnsupportedError(f"{type(model).__name__} has no embedding of tokens; quantcli runs text only; {_DATA_FREE}") from error
        self.name, self.layers = decoder_layers(model, self.module_name(self.embedding))
        parameters = inspect.signature(self._runner.forward).parameters
        self._options = {"use_cache": False} if self._is_causal or "use_cache" in parameters else {}
        self.traces: list[Trace] = []

    def _check_runs(self) -> None:
        """Raise :class:`UnsupportedError` for a model, other than a causal LM, whose layers do not follow each other from tokens on."""
        if self._is_causal:
            return
        if self._runner.config.is_encoder_decoder:
            raise UnsupportedError(
                f"{type(self.model).__name__} has an encoder and a decoder that reads the encoder's output; quantcli cannot run their "
                f"layers one at a time, so it neither calibrates nor evaluates this model; {_DATA_FREE}"
            )
        if self._runner.main_input_name != "input_ids":
            raise UnsupportedError(
                f"{type(self.model).__name__} reads {self._runner.main_input_name}, not tokens; quantcli calibrates and evaluates "
                f"on text only; {_DATA_FREE}"
            )

    def module_name(self, module: nn.Module) -> str:
        """The name of ``module`` in the model."""
        names: Iterator[str] = (name for name, m in self.model.named_modules() if m is module)
        return next(names)

    def trace(self, device: torch.device) -> bool:
        """Fill ``traces``; returns whether the layers' arguments depend on the tokens. Raises :class:`UnsupportedError`."""
        seen: dict[tuple[Any, ...], Trace] = {}
        passed: list[Tensor] = []  # what the layer before returned

        def stub(layer: nn.Module) -> Run:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden, call = Call.split(args, kwargs)
                if passed and hidden is not passed[-1]:
                    raise UnsupportedError(f"{type(self.model).__name__} changes the hidden states between its layers; {_TOGETHER}")
                check_shape(type(self.model).__name__, hidden)
                key = _signature(layer)
                if key not in seen:
                    with _zeros(layer, device):
                        seen[key] = _trace(layer, call, hidden, returns_more=self._is_causal)
                self.traces.append(seen[key])
                passed.append(hidden.clone())
                return seen[key].output(passed[-1])

            return forward

        ids = torch.zeros(1, 2, dtype=torch.int64, device=device)
        try:
            self._forward(ids, [stub(layer) for layer in self.layers], 0.0, _no_head)
        except QuantcliError:
            raise
        except Exception as error:  # whatever a model's own code raises when its layers are called in a way it does not know
            raise UnsupportedError(f"{type(self.model).__name__} cannot be run layer by layer: {error}") from error
        if len(self.traces) != len(self.layers):
            raise UnsupportedError(f"{type(self.model).__name__} runs {len(self.traces)} of its {len(self.layers)} layers; {_TOGETHER}")
        pairs = zip(self.calls(ids, 0.0), self.calls(ids + 1, 1.0), strict=True)
        return any(not torch.equal(x, y) for a, b in pairs for x, y in zip(a.tensors(), b.tensors(), strict=True))

    def calls(self, ids: Tensor, embedded: float | None) -> list[Call]:
        """Each layer's arguments for ``ids`` [B, T], whose embeddings are all ``embedded``, or (None) the model's own."""
        calls: list[Call] = []

        def stub(trace: Trace) -> Run:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden, call = Call.split(args, kwargs)
                calls.append(call)
                return trace.output(hidden)

            return forward

        self._forward(ids, [stub(trace) for trace in self.traces], embedded, _no_head)
        return calls

    def embed(self, ids: Tensor) -> Tensor:
        """The input of the first layer for ``ids`` [B, T]: [B, T, hidden]. Needs the embedding's weights."""
        entered: list[Tensor] = []

        def first(*args: Any, **kwargs: Any) -> Any:
            entered.append(Call.split(args, kwargs)[0])
            return self.traces[0].output(entered[0])

        self._forward(ids, [first, *self._passing()[1:]], None, _no_head)
        return entered[0]

    def logits(self, hidden: Tensor, head: Run | None = None) -> Tensor:
        """Logits [B, T, vocab] of the last layer's output ``hidden`` [B, T, hidden]; ``head`` replaces the output embedding."""

        def last(*_args: Any, **_kwargs: Any) -> Any:
            return self.traces[-1].output(hidden)

        ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
        logits: Tensor = self._forward(ids, [*self._passing()[:-1], last], 0.0, head).logits
        return logits

    def _passing(self) -> list[Run]:
        return [partial(_pass, trace) for trace in self.traces]

    def _forward(self, ids: Tensor, layers: Sequence[Run], embedded: float | None, head: Run | None) -> Any:
        """The model's own forward over ``ids`` with functions in place of the layers, and of the head where given."""
        forwards: dict[nn.Module, Run] = dict(zip(self.layers, layers, strict=True))
        if embedded is not None:
            forwards[self.embedding] = partial(self._constant, embedded)
        if head is not None and self.head is not None:
            forwards[self.head] = head
        with torch.no_grad(), _replaced(forwards):
            return self._runner(input_ids=ids, **self._options)

    def _constant(self, value: float, ids: Tensor) -> Tensor:
        weight = self.embedding.weight
        return torch.full((*ids.shape, weight.shape[1]), value, dtype=weight.dtype, device=ids.device)


def check_shape(model: str, hidden: Tensor) -> None:
    """Raise :class:`UnsupportedError` unless the hidden states between layers are one vector for each token."""
    if hidden.ndim != 3:
        raise UnsupportedError(
            f"{model} has hidden states of {hidden.ndim} dimensions, {list(hidden.shape)} for two tokens, where one vector a token is "
            "expected (several residual streams); quantcli cannot run this architecture layer by layer yet: use a recipe without "
            "calibration (nf4, fp8-dynamic, rtn-int4)"
        )


def is_linear(module: nn.Module) -> bool:
    """Whether ``module`` multiplies its input by a weight, whichever way that is stored."""
    return isinstance(module, nn.Linear) or is_turned(module)


def is_turned(module: nn.Module) -> bool:
    """Whether ``module`` is a linear whose weight is stored [in, out] (GPT-2)."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def _routers(layer: nn.Module, parameters: Collection[str]) -> list[str]:
    """The linears in the experts' module whose few outputs choose or weigh the experts, by module name; these stay dense.

    ``parameters``: names of those that hold experts.
    """
    found = []
    for parameter in parameters:
        block = parameter.rpartition(".")[0].rpartition(".")[0]
        few = {1, layer.get_parameter(parameter).shape[0]}
        candidates = layer.get_submodule(block).named_modules(prefix=block) if block else layer.named_children()
        found += [name for name, m in candidates if isinstance(m, nn.Linear) and m.out_features in few]
    return found


def _no_head(hidden: Tensor) -> Tensor:
    return hidden[..., :1]


def _pass(trace: Trace, *args: Any, **kwargs: Any) -> Any:
    return trace.output(Call.split(args, kwargs)[0])


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for key in value:
            yield from _tensors(value[key])
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


@contextmanager
def _replaced(forwards: Mapping[nn.Module, Run]) -> Iterator[None]:
    """Within the context, each module's ``forward`` is the given function; attributes that some models read from their layers stay."""
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module in forwards:
            del module.forward


@contextmanager
def _zeros(layer: nn.Module, device: torch.device) -> Iterator[None]:
    """Within the context, the parameters of ``layer`` are zeros."""
    names = [name for name, _ in layer.named_parameters()]
    for name, param in list(layer.named_parameters()):
        put(layer, name, zero_pages(param).to(device))
    try:
        yield
    finally:
        for name in names:
            drop(layer, name, torch.device("meta"))


def _signature(layer: nn.Module) -> tuple[Any, ...]:
    """Equal for layers of the same modules and shapes: their taps are the same, so only one of them is traced."""
    modules = tuple((name, type(m), _switches(m)) for name, m in layer.named_modules())
    return modules, tuple((name, tuple(p.shape)) for name, p in layer.named_parameters())


def _switches(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    """The attributes by which two modules of one class may take different paths: booleans and strings, not numbers such as its index."""
    return tuple((name, value) for name, value in vars(module).items() if isinstance(value, (bool, str)))


def _trace(layer: nn.Module, call: Call, hidden: Tensor, *, returns_more: bool) -> Trace:
    """Run ``layer`` and record which linears, and which experts' slices, read the same tensor.

    ``returns_more``: whether it may return tensors beside the hidden states, which the model then does not hand to its other layers.

    The same means the same memory in the same version; inputs are held until the end, so that no memory is used again.
    """
    fed: dict[str, list[tuple[int, ...]]] = {}
    sliced: dict[tuple[str, int], list[tuple[int, ...]]] = {}
    held: list[Tensor] = []

    def key(x: Tensor) -> tuple[int, ...]:
        held.append(x)
        return (x.data_ptr(), x.numel(), x.shape[-1], x._version)

    def watch(name: str, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        fed.setdefault(name, []).append(key(inputs[0]))

    def watch_slice(parameter: str, expert: int, X: Tensor) -> None:
        sliced.setdefault((parameter, expert), []).append(key(X))

    handles = [m.register_forward_pre_hook(partial(watch, name)) for name, m in layer.named_modules() if is_linear(m)]
    n_tensors = len(call.tensors())
    try:
        with Products(dict(layer.named_parameters()), watch_slice):
            output = call.run(partial(type(layer).forward, layer), hidden)
    finally:
        for handle in handles:
            handle.remove()
    caches = found_in(layer, lambda: call.run(partial(type(layer).forward, layer), hidden))
    others = () if isinstance(output, Tensor) else output[1:]
    if len(call.tensors()) != n_tensors or (not returns_more and next(_tensors(others), None) is not None):
        raise UnsupportedError(f"{type(layer).__name__} passes more than hidden states to the layers after it; {_TOGETHER}")
    for name in _routers(layer, {parameter for parameter, _ in sliced}):
        fed.pop(name, None)
    first: dict[tuple[tuple[int, ...], ...], str] = {}
    taps = {name: first.setdefault(tuple(keys), name) for name, keys in fed.items()}
    experts = {name: first.setdefault((*keys, (expert,)), name) for (name, expert), keys in sliced.items()}
    repeats = any(len(keys) > 1 for keys in (*fed.values(), *sliced.values()))
    return Trace(None if isinstance(output, Tensor) else len(output), taps, repeats, experts, caches)
