"""The column loop of GPTQ inside a chunk: quantize a column, distribute its error over the columns after it. And that of a descent.

For column j = 0 … n−1 of a chunk, in every row (GPTQ, arXiv 2210.17323, algorithm 1; a lane is a row)::

    v = (w_j − offset) / scale          0 where scale is 0
    q = clamp(round(v), lo, hi)         or the book's nearest entry, a tie to the lower
    e_j = (w_j − (scale·q + offset)) / U_jj
    w_k = w_k − e_j·U_jk                for k > j

``U`` is the chunk's diagonal block of the upper Cholesky factor of H⁻¹ = UᵀU. The caller updates the columns after the chunk by one
product, ``W[:, rest] -= E @ U[chunk, rest]``.

Coordinate descent on codes that are there already is the same loop with another error (:mod:`quantcli.passes.shared.descent`): with D the
decoded weights so far, w_j what the best weight of column j would be, and U_jk = H_jk / H_kk, a column moves by e_j = ŵ_j − d_j, and the
best weight of each later column moves by −e_j·U_jk.

Products and differences are separate (no FMA), each w_k takes its updates in the order
of j, and rows never mix: the same bits on every width, device and number of threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantcli.errors import KernelError
from quantcli.ops.dispatch import kernel, stream


def gptq_chunk(
    W: Tensor,
    U: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    group: Tensor,
    lo: int,
    hi: int,
    book: Tensor | None = None,
    *,
    D: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Codes and scaled errors of one chunk. ``W`` is read, not written.

    ``W``: [out, n] float32, columns in the order of solving; ``U``: [n, n] float32, upper triangle read; ``scale``, ``offset``:
    [out, n_groups] float32, as in :class:`Grid` (offset None is 0); ``group``: [n] int, the group of each column; codes lie in
    ``lo … hi``, or are indices into the ascending ``book`` [hi + 1]. Returns codes [out, n] int8 (uint8 where ``hi`` > 127) and
    E [out, n] float32, the error of each column over U_jj. With ``D`` [out, n] float32 it is a step of descent: E is ŵ − D over U_jj.
    """
    _check(W, U, scale, offset, group, lo, hi, book, D)
    W = W.detach().contiguous()
    kernels = kernel(W)
    if kernels is None:
        return gptq_chunk_reference(W, U, scale, offset, group, lo, hi, book, D=D)
    mids = None if book is None else midpoints(book)
    codes = torch.empty(W.shape, dtype=torch.uint8 if hi > 127 else torch.int8, device=W.device)
    E = torch.empty_like(W)
    U, scale, group = U.contiguous(), scale.contiguous(), group.to(torch.int32).contiguous()
    offset = None if offset is None else offset.contiguous()
    D = None if D is None else D.contiguous()
    kernels.gptq_chunk(W, U, scale, offset, group, lo, hi, book, mids, codes, E, D, stream=stream(W))
    return codes, E


def gptq_chunk_reference(
    W: Tensor,
    U: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    group: Tensor,
    lo: int,
    hi: int,
    book: Tensor | None = None,
    *,
    D: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same in torch, column by column over all rows."""
    w = W.t().contiguous().clone()  # [n, out]: a column is one run of memory
    index = group.long()
    scales = scale.t()[index]  # [n, out]
    offsets = torch.zeros_like(scales) if offset is None else offset.t()[index]
    mids = None if book is None else midpoints(book)
    codes = torch.empty(w.shape, dtype=torch.uint8 if hi > 127 else torch.int8, device=W.device)
    E = torch.empty_like(w)
    for j in range(w.shape[0]):
        s, o = scales[j], offsets[j]
        v = torch.where(s == 0, 0.0, (w[j] - o) / s)
        q = v.round_().clamp_(lo, hi) if mids is None else torch.bucketize(v, mids)
        codes[j] = q
        value = q if book is None else book[q]
        decoded = s * value + o
        E[j] = (w[j] - decoded if D is None else decoded - D[:, j]) / U[j, j]
        w[j + 1 :] -= U[j, j + 1 :, None] * E[j]
    return codes.t().contiguous(), E.t().contiguous()


def midpoints(book: Tensor) -> Tensor:
    """Where the nearest entry of an ascending ``book`` [n] changes: [n − 1]."""
    return (book[1:] + book[:-1]) / 2


def _check(
    W: Tensor,
    U: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    group: Tensor,
    lo: int,
    hi: int,
    book: Tensor | None,
    D: Tensor | None,
) -> None:
    if W.ndim != 2 or W.dtype != torch.float32:
        raise KernelError(f"gptq_chunk: W is {W.dtype} {list(W.shape)}; expected float32 [out, n]")
    n_rows, n = W.shape
    if tuple(U.shape) != (n, n):
        raise KernelError(f"gptq_chunk: U is {list(U.shape)}; expected [{n}, {n}], the chunk's block of the factor")
    for name, tensor in (("scale", scale), ("offset", offset)):
        if tensor is not None and (tensor.ndim != 2 or tensor.shape != (n_rows, scale.shape[1])):
            raise KernelError(f"gptq_chunk: {name} is {list(tensor.shape)}; expected [{n_rows}, n_groups]")
    if tuple(group.shape) != (n,):
        raise KernelError(f"gptq_chunk: group is {list(group.shape)}; expected [{n}], one for each column of W")
    if n and not 0 <= int(group.min()) <= int(group.max()) < scale.shape[1]:
        raise KernelError(f"gptq_chunk: group runs from {int(group.min())} to {int(group.max())}; expected 0 to {scale.shape[1] - 1}")
    if not (-128 <= lo <= hi <= 127 or 0 <= lo <= hi <= 255):
        raise KernelError(f"gptq_chunk: codes {lo} to {hi} fit neither int8 nor uint8")
    if D is not None and (D.dtype != torch.float32 or D.shape != W.shape):
        raise KernelError(f"gptq_chunk: D is {D.dtype} {list(D.shape)}; expected float32 {list(W.shape)}, as W")
    if book is not None and (lo != 0 or tuple(book.shape) != (hi + 1,)):
        raise KernelError(f"gptq_chunk: book is {list(book.shape)} for codes {lo} to {hi}; expected codes from 0 and [hi + 1] entries")
