"""The slow truth: what the fast code must equal, written the longest way and sharing nothing with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from quantcli.tensors import Grid


def obq(W: Tensor, H: Tensor, encode_decode: Callable[[int, Tensor], Tensor], order: Sequence[int]) -> Tensor:
    """Optimal brain quantization of ``W`` [out, in] under ``H`` [in, in] in a fixed order, with an explicit inverse, in float64.

    ``encode_decode(q, w)`` rounds column ``q``, whose weights at that time are ``w`` [out] float64, onto its grid. In every row:
    quantize w_q, move the weights still to come by −(w_q − ŵ_q) / [H⁻¹]_qq · [H⁻¹]_q,:, eliminate q from H⁻¹ (OBQ, arXiv 2208.11580,
    eqs. 2 and 4). Damp ``H`` before. Returns Ŵ [out, in] float64.
    """
    W, H_inv = W.double().clone(), torch.linalg.inv(H.double())
    todo = list(order)
    while todo:
        q = todo.pop(0)
        rounded = encode_decode(q, W[:, q].clone()).double()
        error = W[:, q] - rounded
        for k in todo:
            W[:, k] -= error / H_inv[q, q] * H_inv[q, k]
        W[:, q] = rounded
        H_inv = H_inv - torch.outer(H_inv[:, q], H_inv[q, :]) / H_inv[q, q]
    return W


def gptaq(W: Tensor, H: Tensor, dXXT: Tensor, alpha: float, encode_decode: Callable[[int, Tensor], Tensor], order: Sequence[int]) -> Tensor:
    """:func:`obq` with asymmetric calibration (arXiv 2504.02692), for ``dXXT`` [in, in], mean of (x₀ − x)·xᵀ.

    In every row, when w_q has been quantized, the weights still to come, F, also move by α·w_q·M_q,F·(H_FF)⁻¹: the least squares answer to
    the output w_q·(x₀ − x)_q that is missing. Each (H_FF)⁻¹ is inverted anew.
    """
    W, H, M = W.double().clone(), H.double(), dXXT.double()
    todo = list(order)
    while todo:
        left = torch.linalg.inv(H[todo][:, todo])
        q = todo.pop(0)
        rounded = encode_decode(q, W[:, q].clone()).double()
        missing = W[:, q]
        error = missing - rounded
        if todo:
            step = alpha * M[q, todo] @ torch.linalg.inv(H[todo][:, todo])
            W[:, todo] += torch.outer(missing, step) - torch.outer(error, left[0, 1:] / left[0, 0])
        W[:, q] = rounded
    return W


def affine_error(w: np.ndarray, h: np.ndarray, scale: float, zero: int, levels: int) -> float:
    """Σ h·(w − ŵ)² of one group, each weight given the better of all codes 0 … levels."""
    total = 0.0
    for weight, weight_importance in zip(w.astype(np.float64), h.astype(np.float64), strict=True):
        total += weight_importance * min((weight - scale * (code - zero)) ** 2 for code in range(levels + 1))
    return total


def brute_force_affine(w: np.ndarray, h: np.ndarray, bits: int, sym: bool) -> tuple[float, int, float]:
    """The best (scale, zero, error) of one tiny group: every zero point with every float16 scale from max|w| / 4^bits to 2·max|w|."""
    levels, largest = 2**bits - 1, np.abs(w).max()
    low, high = (int(np.float16(edge).view(np.uint16)) for edge in (largest / 4**bits, 2 * largest))
    scales = np.arange(low, high + 1, dtype=np.uint16).view(np.float16).astype(np.float64)[:, None]
    codes = np.arange(levels + 1)
    best = (0.0, 0, np.inf)
    for zero in [2 ** (bits - 1)] if sym else codes:
        values = scales * (codes - zero)  # [n_scales, levels + 1]
        errors = sum(b * ((a - values) ** 2).min(1) for a, b in zip(w.astype(np.float64), h.astype(np.float64), strict=True))
        i = int(errors.argmin())
        if errors[i] < best[2]:
            best = (float(scales[i, 0]), int(zero), float(errors[i]))
    return best


def pack_dense(codes: Sequence[int], bits: int) -> list[int]:
    """One row of codes as signed 32-bit words, a bit at a time: bit b of the row is bit b mod 32 of word b div 32."""
    words = [0] * (len(codes) * bits // 32)
    for i, code in enumerate(codes):
        for b in range(bits):
            place = i * bits + b
            if code & (1 << b):
                words[place // 32] |= 1 << (place % 32)
    return [word - (1 << 32) if word >= 1 << 31 else word for word in words]


def unpack_dense(words: Sequence[int], bits: int) -> list[int]:
    """The codes of one row of words, a bit at a time."""
    codes = [0] * (len(words) * 32 // bits)
    for i in range(len(codes)):
        for b in range(bits):
            place = i * bits + b
            if words[place // 32] >> (place % 32) & 1:
                codes[i] |= 1 << b
    return codes


def coordinate_descent(W: Tensor, codes: Tensor, grid: Grid, H: Tensor, sweeps: int) -> Tensor:
    """``codes`` of ``W`` [out, in] on ``grid``, each in turn the one of least (w − d)·H·(w − d)ᵀ while all others stay, in float64.

    Every code of the grid is tried for every weight, from left to right, ``sweeps`` times.
    """
    n_out, n_in = W.shape
    values = grid.book.double() if grid.book is not None else torch.arange(grid.lo, grid.hi + 1).double()
    scale, offset = (None if part is None else part.double() for part in grid.columns(torch.arange(n_in)))
    D, codes = grid.decode(codes).double(), codes.clone()
    for _ in range(sweeps):
        for row in range(n_out):
            for j in range(n_in):
                G = (W[row].double() - D[row]) @ H[:, j].double()
                decoded = scale[row, j] * values + (0 if offset is None else offset[row, j])
                step = decoded - D[row, j]
                best = int((step.square() * H[j, j].double() - 2 * step * G).argmin())
                D[row, j], codes[row, j] = decoded[best], best if grid.book is not None else best + grid.lo
    return codes
