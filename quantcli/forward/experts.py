"""Experts that transformers stores in one parameter: which rows are which disk tensor, and what each expert reads as the layer runs.

A layer's experts are parameters ``[n_experts, out, in]``, or gpt-oss's ``[n_experts, in, out]`` (gate and up in one, down), however the
file stores them. transformers' own loop over them (its implementation "eager", which :func:`quantcli.forward.skeleton.build` selects)
takes one expert's slice after the other: ``linear(X, parameter[e])``, or ``X @ parameter[e]``, with X the tokens routed to it. So an
expert's inputs are observed in these products, in any architecture, without a loop of our own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from quantcli.errors import CheckpointError, UnsupportedError
from quantcli.tensors import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Iterator

    from quantcli.forward.names import Source

OnProduct = Callable[[str, int, Tensor], Tensor | None]
"""``on_product(parameter, expert, X)`` with X [n_tokens, in]; what it returns is read in place of X, unless that is None."""

PROBE_ROWS = 2
"""Rows of the stand-ins by which a conversion is tried: two, so that rows which it would interleave are seen."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Where one disk tensor lies in its expert's slice of a parameter: every ``step``-th of the rows ``start … stop``, or columns where
    the slice is ``turned`` (transposed), [in, out]."""

    disk: str
    start: int
    stop: int
    step: int = 1
    turned: bool = False

    def of(self, part: Tensor) -> Tensor:
        """The disk tensor [out, in] as a view of ``part``, its expert's slice."""
        return (part.T if self.turned else part)[self.start : self.stop : self.step]


@dataclass(frozen=True, slots=True)
class Experts:
    """One parameter of a layer with a slice for each expert. ``rows``: of each expert, the disk tensors it is made of, from top to bottom;
    ``taps``: of each expert, the tap that its slice reads."""

    parameter: str
    rows: tuple[tuple[Rows, ...], ...]
    taps: tuple[str, ...]


def rows_of(source: Source, specs: Mapping[str, TensorSpec], shape: torch.Size, model: Any) -> tuple[tuple[Rows, ...], ...] | None:
    """Which rows of which expert each disk tensor of ``source`` becomes, for its parameter of ``shape`` [n_experts, out, in], or turned.

    Found by running the conversion on stand-ins of two rows and one column that carry their own number. None when the parameter is no
    stack of the disk tensors' rows.
    """
    if source.is_copy or any(len(specs[name].shape) != 2 for name in source.disk):
        return None
    number = {name: float(PROBE_ROWS * k) for k, name in enumerate(source.disk)}
    try:
        made = source.load(lambda name: torch.tensor([[number[name]], [number[name] + 1]]), model).get(source.target)
    except CheckpointError:
        return None
    if made is None or made.ndim != 3 or made.shape[0] != shape[0] or 1 not in made.shape[1:]:
        return None
    turned = made.shape[1] == 1
    n_rows, width = (shape[2], shape[1]) if turned else (shape[1], shape[2])
    if any(specs[name].shape[1] != width for name in source.disk):
        return None
    experts = tuple(_placed(made[e].flatten().tolist(), source.disk, specs, turned=turned) for e in range(len(made)))
    return experts if all(sum(specs[r.disk].shape[0] for r in rows) == n_rows for rows in experts) else None


def _placed(numbers: list[float], disk: list[str], specs: Mapping[str, TensorSpec], *, turned: bool) -> tuple[Rows, ...]:
    """One expert's disk tensors from the numbers of its stand-ins' rows: whole blocks, one below the other, or interleaved rows.
    Empty when they are neither."""
    n = len(numbers) // PROBE_ROWS
    blocks, turns = numbers[::PROBE_ROWS], numbers[:n]
    for firsts, seconds, step in ((blocks, numbers[1::PROBE_ROWS], 1), (turns, numbers[n:], n)):
        if any(first % PROBE_ROWS for first in firsts) or seconds != [first + 1 for first in firsts]:
            continue
        names = [disk[int(first) // PROBE_ROWS] for first in firsts]
        heights = [specs[name].shape[0] for name in names]
        if step == 1:
            ends = list(accumulate(heights))
            return tuple(Rows(name, end - height, end, 1, turned) for name, height, end in zip(names, heights, ends, strict=True))
        if len(set(heights)) == 1:
            return tuple(Rows(name, k, n * heights[0], n, turned) for k, name in enumerate(names))
    return ()


PRODUCTS = (functional.linear, torch.matmul, Tensor.matmul)
"""Functions of an input and a matrix by which experts are applied; the last is ``@``."""


class Products(TorchFunctionMode):
    """Calls ``on_product`` for every product of an input with one expert's slice of ``parameters``: name → [n_experts, out, in], or
    transposed."""

    def __init__(self, parameters: Mapping[str, Tensor], on_product: OnProduct) -> None:
        super().__init__()
        self._parameters = {name: p for name, p in parameters.items() if p.ndim == 3}
        self._on_product = on_product
        self.is_watching = True

    @override
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in PRODUCTS and self.is_watching:
            X, W = args[0], args[1] if len(args) > 1 else (kwargs or {})["weight"]
            if (found := self._slice(W)) is not None:
                changed = self._on_product(*found, X)
                args = args if changed is None else (changed, *args[1:])
        return func(*args, **(kwargs or {}))

    def _slice(self, W: Tensor) -> tuple[str, int] | None:
        """The parameter and the expert whose slice ``W`` is, by where it lies in memory."""
        for name, p in self._parameters.items():
            expert, rest = divmod(W.data_ptr() - p.data_ptr(), p.stride(0) * p.itemsize)
            if not rest and 0 <= expert < p.shape[0] and W.shape == p.shape[1:] and W.stride() == p.stride()[1:]:
                return name, expert
        return None


@contextmanager
def all_tokens(modules: Mapping[nn.Module, int], products: Products) -> Iterator[None]:
    """Within the context, each expert of ``modules`` (→ number of experts) first runs on every token, observed, and then on the routed
    tokens, unobserved, for the output."""

    def shown_all(module: nn.Module, n_experts: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden, index, weights = check_routed(module, args)
            for e in range(n_experts):
                type(module).forward(module, hidden, torch.full_like(index[:, :1], e), torch.zeros_like(weights[:, :1]))
            products.is_watching = False
            try:
                return type(module).forward(module, *args, **kwargs)
            finally:
                products.is_watching = True

        return forward

    for module, n_experts in modules.items():
        module.forward = shown_all(module, n_experts)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def check_routed(module: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [n_tokens, hidden], experts' numbers and their weights [n_tokens, top_k], as experts are called."""
    if len(args) == 3 and all(isinstance(x, Tensor) and x.ndim == 2 for x in args) and not args[1].is_floating_point():
        return args
    raise UnsupportedError(f"{type(module).__name__} is not called with experts' numbers and weights for each token; use moe: routed")
