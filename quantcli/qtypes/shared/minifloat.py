"""What the small floats share as qtypes: books of their numbers, bytes from a book's codes, and E8M0 scales."""

from __future__ import annotations

import torch
from torch import Tensor

from quantcli.errors import NumericsError, RecipeError
from quantcli.ops.minifloat import FP4_LEVELS, pack_fp4, tile_absmax
from quantcli.tensors import Scheme


def signed_book(magnitudes: Tensor) -> Tensor:
    """A :class:`Grid` book, ascending and with one zero, of a float's ``magnitudes`` [n], which ascend as their bits do: [2n − 1]."""
    return torch.cat((-magnitudes[1:].flip(0), magnitudes))


def float_bits(codes: Tensor, n: int, sign_bit: int) -> Tensor:
    """The bits of ``codes`` uint8 or int8, indices into the book of ``n`` magnitudes: uint8, with ``sign_bit`` (8, 128) where negative."""
    signed = codes.to(torch.int16) - (n - 1)
    return (signed.abs() | (signed < 0) * sign_bit).to(torch.uint8)


def fp4_book(device: torch.device) -> Tensor:
    """The book of E2M1: its 15 numbers."""
    return signed_book(torch.tensor(FP4_LEVELS, device=device))


def fp4_packed(codes: Tensor) -> Tensor:
    """``codes`` [out, in], indices into :func:`fp4_book`, as pairs of E2M1: uint8 [out, in/2]."""
    return pack_fp4(float_bits(codes, len(FP4_LEVELS), 8))


def finite_absmax(W: Tensor, tile: tuple[int, int]) -> Tensor:
    """The largest |w| of each tile: float32 [tiles down, tiles across]; :class:`NumericsError` for NaN or Inf."""
    absmax = tile_absmax(W, tile)
    if not bool(absmax.isfinite().all()):
        raise NumericsError("the weights have NaN or Inf; check the source checkpoint")
    return absmax


def check_matrix(shape: tuple[int, ...], scheme: Scheme) -> None:
    """Raise :class:`RecipeError` unless ``shape`` is [out, in]."""
    if len(shape) != 2:
        raise RecipeError(f"{scheme} codes matrices [out, in], got shape {list(shape)}; exclude this tensor")


def check_search(scheme: Scheme) -> bool:
    """Whether scales are searched for; :class:`RecipeError` for an unknown search."""
    if (search := scheme.get("search", "mse")) not in ("mse", "minmax"):
        raise RecipeError(f"{scheme}: search is '{search}'; expected mse or minmax")
    return bool(search == "mse")
