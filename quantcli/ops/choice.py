"""Which of several grids leaves each group of weights the smallest output error: the clipping search.

For group g of a row, its weights w, its block B of H = E[x·xᵀ] and grid c of n (AWQ, arXiv 2306.00978, section 3.2, the loss of the group's
own output)::

    e_c = w − (scale_c·q_c + offset_c)          q_c: the nearest codes of w, as :meth:`Grid.encode` finds them
    c*  = the first c with the smallest e_cᵀ·B·e_c

The reference takes a product of every e_c with B. The kernel keeps B·q, and adds a column of B for each code that changes from one grid to
the next, so grids that follow closely cost little: with 4 bits and steps of one per cent, 3 of 100 codes change. It pays where groups are
short and codes few (:func:`_has_kernel`); elsewhere the reference runs, and its products are BLAS's. The two sum in other orders: where two
grids are as good as equal (to 1e-4 and less) they may choose differently. Kernels among themselves, on any device or number of threads, are
equal to the bit.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from quantcli.errors import KernelError
from quantcli.ops.dispatch import kernel, stream
from quantcli.tensors import Grid

KERNEL_SIZES = (32, 64, 128, 256)
"""Lengths of group that the kernels are made for; shorter groups are filled up with zeros."""

KERNEL_LEVELS = 32
"""Codes of more levels change from grid to grid nearly all at once."""


def choose_grid(W: Tensor, blocks: Tensor, scale: Tensor, offset: Tensor | None, lo: int, hi: int) -> Tensor:
    """The index of the best grid for each row and group: [out, n_groups] int32.

    A grid whose error is NaN is never chosen, but for the first.

    ``W``: [out, in] float32; ``blocks``: [n_groups, size, size] float32, symmetric, of H; ``scale``, ``offset`` (None is 0): [n, out,
    n_groups] float32, of n grids, nearby ones in a row; codes are integers ``lo … hi``.
    """
    _check(W, blocks, scale, offset)
    kernels, size = kernel(W), blocks.shape[1]
    if kernels is None or not _has_kernel(size, lo, hi):
        return choose_grid_reference(W, blocks, scale, offset, lo, hi)
    W, blocks = W.detach().contiguous(), blocks.contiguous()
    if fill := min(n for n in KERNEL_SIZES if n >= size) - size:
        W = pad(W.view(len(W), -1, size), (0, fill)).view(len(W), -1)
        blocks = pad(blocks, (0, fill, 0, fill))
    best = torch.empty(scale.shape[1:], dtype=torch.int32, device=W.device)
    kernels.choose_grid(W, blocks, scale.contiguous(), None if offset is None else offset.contiguous(), lo, hi, best, stream=stream(W))
    return best


def _has_kernel(size: int, lo: int, hi: int) -> bool:
    return size <= KERNEL_SIZES[-1] and hi - lo < KERNEL_LEVELS


def choose_grid_reference(W: Tensor, blocks: Tensor, scale: Tensor, offset: Tensor | None, lo: int, hi: int) -> Tensor:
    """The same in torch, grid by grid."""
    best = torch.zeros(scale.shape[1:], dtype=torch.int32, device=W.device)
    least = torch.full(best.shape, torch.inf, device=W.device)
    for c in range(len(scale)):
        grid = Grid(scale[c], None if offset is None else offset[c], lo, hi, blocks.shape[1])
        error = group_errors(W, grid, blocks)
        less = error < least
        least, best = torch.where(less, error, least), torch.where(less, c, best)
    return best


def group_errors(W: Tensor, grid: Grid, blocks: Tensor) -> Tensor:
    """E[‖(W_g − Ŵ_g)·x_g‖²] of each row and group of ``W`` [out, in] coded on ``grid``: [out, n_groups]."""
    E = (W - grid.decode(grid.encode(W))).view(len(W), len(blocks), -1).transpose(0, 1)  # [n_groups, out, size]
    return ((E @ blocks) * E).sum(2).T


def _check(W: Tensor, blocks: Tensor, scale: Tensor, offset: Tensor | None) -> None:
    if W.ndim != 2 or W.dtype != torch.float32:
        raise KernelError(f"choose_grid: W is {W.dtype} {list(W.shape)}; expected float32 [out, in]")
    if blocks.ndim != 3 or blocks.shape[1] != blocks.shape[2] or len(blocks) * blocks.shape[1] != W.shape[1]:
        raise KernelError(f"choose_grid: blocks is {list(blocks.shape)}; expected [n_groups, size, size] with {W.shape[1]} inputs in all")
    expected = (len(scale), len(W), len(blocks))
    for name, tensor in (("scale", scale), ("offset", offset)):
        if tensor is not None and tuple(tensor.shape) != expected:
            raise KernelError(f"choose_grid: {name} is {list(tensor.shape)}; expected [n, {len(W)}, {len(blocks)}], of n grids")
