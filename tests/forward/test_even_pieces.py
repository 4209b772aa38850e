"""Activation functions have the same values on any number of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from quantcli.forward.even_pieces import EvenPieces

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "sigmoid": torch.sigmoid,
    "gelu": functional.gelu,
    "gelu-tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "softplus": functional.softplus,
    "mish": functional.mish,
    "elu": lambda x: functional.elu(x, 0.5),
    "sigmoid of a method": lambda x: x.sigmoid(),
}


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("shape", [(1000, 172), (3, 33333)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_activation_has_the_values_of_one_thread(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = (3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype)
    torch.set_num_threads(1)
    alone = FUNCTIONS[name](x)
    for n_threads in (1, 2, 3, 5):
        torch.set_num_threads(n_threads)
        with EvenPieces():
            found = FUNCTIONS[name](x)
        assert torch.equal(found, alone), n_threads
        assert (found.dtype, found.shape) == (alone.dtype, alone.shape)


def test_torch_itself_gives_other_values_on_three_threads() -> None:
    """Why there are pieces at all: where this fails, torch has mended it and they can go."""
    x = 3 * torch.randn(1000, 172, generator=torch.Generator().manual_seed(0))
    values = []
    for n_threads in (1, 3):
        torch.set_num_threads(n_threads)
        values.append(functional.silu(x))
    assert not torch.equal(*values)
