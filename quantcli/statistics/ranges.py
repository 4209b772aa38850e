"""The range of a static input scale: the largest input seen, or less where clipping the few largest costs less than a wide step.

Inputs are counted by the top bits of their float32 magnitude, 256 bins an octave from 2⁻¹⁶ to 2¹⁶: no range need be known in advance, and
counts of batches add up. A bin is at most a quarter as wide as a rounding step, so bins can stand for inputs. Over them::

    minmax      the largest |x|
    percentile  the least r with all but 1 of 10,000 inputs within it
    mse         the r of the least Σ (x − x̂)²
    entropy     the r of the least KL(P ‖ Q), P being the inputs with those beyond r moved to r, Q what is left of their distribution
                when each code's inputs are spread evenly over the bins it came from (Migacz, "8-bit inference with TensorRT", GTC 2017)

Measurements: docs/log.md. Cost: one pass over each input, to compare with in² multiplications for H, and 32 KiB a tap.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantcli.errors import RecipeError
from quantcli.ops.activations import E4M3_LARGEST, round_inputs

OCTAVES = (-16, 16)
BITS = 8
"""Bits of the mantissa that select a bin."""

N_BINS = (OCTAVES[1] - OCTAVES[0]) << BITS
METHODS = ("minmax", "percentile", "mse", "entropy")

WITHIN = 0.9999
LARGEST_CODE = {"int8-tensor": 127.0, "fp8-tensor": E4M3_LARGEST}
N_CANDIDATES = 128
LEAST = 2.0**-5
"""The smallest range that is tried, as a share of the largest input."""


def count(X: Tensor) -> Tensor:
    """How many of ``X``, any shape, float32, lie in each bin of |x|: [N_BINS] int64. Inputs outside of all bins count in the nearest."""
    bits = X.detach().abs().reshape(-1).view(torch.int32)
    index = (bits >> (23 - BITS)) - ((127 + OCTAVES[0]) << BITS)
    return torch.bincount(index.clamp_(0, N_BINS - 1), minlength=N_BINS)


def edges(device: torch.device | str = "cpu") -> Tensor:
    """Where each bin begins, and the end of the last: [N_BINS + 1] float32; the first begins at 0."""
    bits = (torch.arange(N_BINS + 1, device=device) + ((127 + OCTAVES[0]) << BITS)) << (23 - BITS)
    found = bits.to(torch.int32).view(torch.float32)
    found[0] = 0
    return found


def find_range(method: str, act: str, absmax: Tensor, histogram: Tensor | None) -> float:
    """The largest magnitude that the codes of the scheme's ``act`` must represent.

    ``absmax``: [in]; ``histogram``: [N_BINS] share of the inputs in each bin, not needed for minmax. NVFP4's groups have scales of their
    own, which the one found here only multiplies: it is always minmax's.
    """
    peak = float(absmax.max())
    if method == "minmax" or act not in LARGEST_CODE or not peak:
        return peak
    if histogram is None:
        raise RecipeError(f"input_range {method} needs a histogram of the inputs, which these statistics lack; use minmax")
    share = histogram.double().cpu()
    if method == "percentile":
        within = share.cumsum(0) >= WITHIN * share.sum()
        return min(peak, float(edges()[1:][within][0]))
    candidates = peak * torch.logspace(0, float(torch.tensor(LEAST).log10()), N_CANDIDATES)
    cost = {"mse": _squared_error, "entropy": _divergence}[method]
    costs = [cost(share, float(r), act) for r in candidates]
    return float(candidates[min(range(N_CANDIDATES), key=costs.__getitem__)])


def _rounded(values: Tensor, r: float, act: str) -> Tensor:
    return round_inputs(values[None], act, torch.tensor([r / LARGEST_CODE[act]]))[0]


def _squared_error(share: Tensor, r: float, act: str) -> float:
    limits = edges()
    middle = (limits[1:] + limits[:-1]) / 2
    return float((share * (middle - _rounded(middle, r, act)).double().square()).sum())


def _divergence(share: Tensor, r: float, act: str) -> float:
    """KL(P ‖ Q) over the bins up to ``r``."""
    limits = edges()
    n = max(1, int((limits[1:] <= r).sum()))
    within, width = share[:n], (limits[1 : n + 1] - limits[:n]).double()
    P = within.clone()
    P[-1] += share[n:].sum()
    codes = torch.unique_consecutive(_rounded((limits[1 : n + 1] + limits[:n]) / 2, r, act), return_inverse=True)[1]
    filled = width * (within > 0)
    of_code = torch.zeros(2, int(codes.max()) + 1, dtype=torch.float64).index_add_(1, codes, torch.stack((within, filled)))
    Q = filled * (of_code[0] / of_code[1].clamp_min(torch.finfo(torch.float64).tiny))[codes]
    P, Q = P / P.sum(), Q / Q.sum()
    known = (P > 0) & (Q > 0)
    return float((P[known] * (P[known] / Q[known]).log()).sum()) if bool((Q[P > 0] > 0).all()) else float("inf")
