"""The block ops in torch: ggml's arithmetic step by step, with the block index as its lane.

``x`` is [block, n]: row ``i`` holds element ``i`` of every block, so that a sum over ``i`` runs in ggml's order for each of them.
Codes are [block, n] int32 and centred on zero where the type is signed; bytes are [row_bytes, n] int32 in 0 … 255.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(slots=True)
class Found:
    """What a search finds in every block: the stored parameters (``d`` float32 until it is stored) and how to code where they are zero."""

    d: Tensor
    inverse: Tensor
    scale: Tensor | None = None
    dmin: Tensor | None = None
    min: Tensor | None = None


def nearest_int(x: Tensor) -> Tensor:
    """ggml's rounding to nearest even through the low bits of x + 1.5·2²³, int32; NaN gives what its bits give (0)."""
    return ((x + 12582912.0).view(torch.int32) & 0x007FFFFF) - 0x00400000


def truncate(x: Tensor) -> Tensor:
    """float32 → int32 towards zero; NaN and values outside int32 give the smallest, as on x86."""
    inside = x.abs() < 2147483648.0
    return torch.where(inside, torch.where(inside, x, 0.0).to(torch.int32), -(2**31))


def round_half_away(x: Tensor) -> Tensor:
    return truncate(x + torch.copysign(torch.tensor(0.49999997), x))


def halves(x: Tensor) -> Tensor:
    """IEEE half bits of float32 ``x``, int32 in 0 … 65535."""
    return x.half().view(torch.int16).int() & 0xFFFF


def from_halves(bits: Tensor) -> Tensor:
    return bits.to(torch.int16).view(torch.float16).float()


def signed_byte(x: Tensor) -> Tensor:
    return (x & 255 ^ 128) - 128


class Q8_0:
    @staticmethod
    def search(x: Tensor, importance: Tensor | None, power: Tensor) -> Found:
        d = x.abs().amax(0) / 127
        return Found(d=halves(d), inverse=torch.where(d == 0, 0.0, 1 / d))
