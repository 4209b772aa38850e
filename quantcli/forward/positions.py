"""How many positions a model has learned, or keeps a table of: beyond them it cannot be run, unlike one that rotates by any position."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.forward.skeleton import build, decoder_layers, drop, put, zero_pages

PROBED_TOKENS = 3


def table_rows(checkpoint: Checkpoint) -> int | None:
    """The most tokens that the model of ``checkpoint`` takes at once, where a table of positions ends; None where it has none."""
    return rows_of(build(checkpoint.config, torch.float32, checkpoint.source))


def rows_of(model: Any) -> int | None:
    """The same of an empty ``model``: of the tables that a short forward looks up by position before the first layer, and of buffers."""
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:  # a model of two, as CLIP
        return None
    if model.config.is_encoder_decoder or model.main_input_name != "input_ids":  # which is not run layer by layer
        return None
    name = next(name for name, module in model.named_modules() if module is embedding)
    return min([*_embedded(model, name), *_buffered(model)], default=None)


def _embedded(model: Any, embedding: str) -> list[int]:
    """Of each embedding whose indices rise by one from token to token, the tokens of one kind being the same: its rows from the first."""
    _, layers = decoder_layers(model, embedding)
    inside = {id(parameter) for parameter in layers.parameters()}
    outside = [name for name, parameter in model.named_parameters() if id(parameter) not in inside]
    seen: list[tuple[Tensor, int]] = []
    config = model.config.get_text_config()
    ids = torch.full((1, PROBED_TOKENS), int(getattr(config, "pad_token_id", None) == 0))  # padding has no position of its own
    with _zeros(model, outside), _entered(layers), torch.no_grad(), _Lookups(seen), suppress(_Entered):
        model(input_ids=ids, use_cache=False)
    steps = [(index.flatten()[-PROBED_TOKENS:], rows) for index, rows in seen if index.numel() >= PROBED_TOKENS]
    return [rows - int(index[0]) for index, rows in steps if bool((index.diff() == 1).all())]


def _buffered(model: Any) -> list[int]:
    """The rows of each buffer [positions, …] that the config's number of positions gave its size (sines and cosines made beforehand)."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return [buffer.shape[0] for _, buffer in model.named_buffers() if buffer.ndim > 1 and buffer.shape[0] == limit]


class _Entered(Exception):
    """Ends a forward before the first layer."""


class _Lookups(TorchFunctionMode):
    """While it is entered, ``seen`` gets the indices of each embedding that is looked up, and how many rows that has."""

    def __init__(self, seen: list[tuple[Tensor, int]]) -> None:
        super().__init__()
        self._seen = seen

    @override
    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is nn.functional.embedding:
            self._seen.append((args[0].detach().clone(), args[1].shape[0]))
        return func(*args, **(kwargs or {}))


@contextmanager
def _entered(layers: nn.ModuleList) -> Iterator[None]:
    """Within the context, the first of ``layers`` raises :class:`_Entered`."""

    def stop(*_args: Any, **_kwargs: Any) -> Any:
        raise _Entered

    layers[0].forward = stop
    try:
        yield
    finally:
        del layers[0].forward


@contextmanager
def _zeros(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Within the context, the parameters ``names`` are zeros that take no memory."""
    for name in names:
        put(model, name, zero_pages(model.get_parameter(name)))
    try:
        yield
    finally:
        for name in names:
            drop(model, name, torch.device("meta"))
