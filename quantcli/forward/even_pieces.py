"""Activation functions in pieces of an even size, so that their values do not depend on the number of threads.

torch gives each thread an equal share of a tensor's elements. The last few of a share, fewer than a vector register holds, are computed
with the C library's exp or tanh instead of the vectorized one, which differs in the last bit. Where 3 threads cut, 2 do not: the inputs of
the next linear, its Hessian and so the codes would follow from ``--threads``. Here every cut lies at a multiple of :data:`ALONE` elements,
and the values are those of one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from typing_extensions import override

SHARE = 1 << 15
"""The fewest elements that torch gives to a thread (its grain size): as many for each thread are cut into shares of just that."""

ALONE = 1 << 14
"""Elements of which every function, gelu too, leaves all to one thread."""

NAMES = frozenset(
    {"silu", "sigmoid", "gelu", "tanh", "softplus", "mish", "elu", "selu", "celu", "logsigmoid", "exp", "exp2", "expm1", "erf"}
)
"""Functions of one element at a time whose vectorized and scalar code need not agree, by torch's names for them."""


class EvenPieces(TorchFunctionMode):
    """Within it, the functions of :data:`NAMES` run on a CPU tensor in pieces: while there is enough, of :data:`SHARE` elements a
    thread, and what is left over of :data:`ALONE` elements, one after the other."""

    @override
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if getattr(func, "__name__", "") in NAMES and args and is_cut(args[0]) and not given.get("inplace") and "out" not in given:
            return in_pieces(lambda x: func(x, *args[1:], **given), args[0])
        return func(*args, **given)


def is_cut(x: Any) -> bool:
    """Whether torch would share the elements of ``x`` among threads."""
    return isinstance(x, Tensor) and x.device.type == "cpu" and x.is_floating_point() and x.numel() > ALONE and torch.get_num_threads() > 1


def in_pieces(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``function`` of each element of ``x``, of its shape and dtype."""
    flat, out = x.contiguous().view(-1), torch.empty_like(x, memory_format=torch.contiguous_format)
    at_once, start = SHARE * torch.get_num_threads(), 0
    while start < len(flat):
        size = at_once if len(flat) - start >= at_once else ALONE
        out.view(-1)[start : start + size] = function(flat[start : start + size])
        start += size
    return out
