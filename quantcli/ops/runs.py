"""Runs of a code book: the signed points nearest to eight weights, in a metric that knows how the weights' errors add up.

ggml's IQ2 and IQ3 types take the magnitudes of a run of 8 (or 4) weights from a code book and store their signs beside it. With the scale s
of the run, signs σ and a point m, the error of a target t under H [8, 8] is (t − s·σ∘m)·H·(t − s·σ∘m)ᵀ: a constant, plus

    −2·s·(σ∘(t·H))·m + Σ_ij s²·σ_i·σ_j·H_ij·m_i·m_j

So with the signs given, all points are weighed in one product: their magnitudes and pairs of magnitudes with what each row makes of them.
Signs are the target's own; of eight whose number of minus signs must be even, the one that costs least is turned (as in ggml).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from quantcli.ops.block_codecs import CODECS
from quantcli.ops.block_grid import GridType

UNIT = 8
"""Weights whose signs belong together."""


def nearest_runs(T: Tensor, H: Tensor, scale: Tensor, kind: str) -> Tensor:
    """Codes [out, 8] int8, magnitudes with their signs, nearest to ``T`` [out, 8] float32 under ``H`` [8, 8]; ``scale``: [out], what a
    magnitude of 1 is worth. Of two runs of four the second makes up for the first."""
    codec = codec_of(kind)
    points, features = _table(kind)
    points, features = points.to(T.device), features.to(T.device)
    minus = (T < 0) ^ (scale < 0)[:, None]
    if codec.even_signs:
        odd = minus.sum(1) % 2 == 1
        least = (H.diagonal() * T.square()).argmin(1)
        minus[odd, least[odd]] ^= True
    sign = torch.where(minus, -1.0, 1.0)
    width = points.shape[1]
    codes = torch.empty_like(T)
    for start in range(0, UNIT, width):
        run = slice(start, start + width)
        target = T[:, run]
        if start:
            error = T[:, :start] - scale[:, None] * codes[:, :start]
            target = target + torch.linalg.solve(H[run, run], error @ H[:start, run], left=False)
        linear = -2 * scale[:, None] * sign[:, run] * (target @ H[run, run])
        pairs = torch.triu_indices(width, width, device=T.device)
        twice = torch.where(pairs[0] == pairs[1], 1.0, 2.0) * H[run, run][pairs[0], pairs[1]]
        square = scale.square()[:, None] * sign[:, run][:, pairs[0]] * sign[:, run][:, pairs[1]] * twice
        best = (torch.cat((linear, square), 1) @ features).argmin(1)
        codes[:, run] = sign[:, run] * points[best]
    return codes.to(torch.int8)


def codec_of(kind: str) -> GridType:
    """The codec of a type with a code book."""
    codec = CODECS[kind]
    assert isinstance(codec, GridType)
    return codec


@cache
def _table(kind: str) -> tuple[Tensor, Tensor]:
    """Magnitudes [n_points, run] float32, and of each point its magnitudes and the products of every two: [run·(run + 3)/2, n_points]."""
    codec = codec_of(kind)
    points = torch.tensor(codec.magnitudes).float()[codec.book.levels.long()]
    first, second = torch.triu_indices(points.shape[1], points.shape[1])
    return points, torch.cat((points, points[:, first] * points[:, second]), 1).t().contiguous()
