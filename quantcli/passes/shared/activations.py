"""Static input scales: stored in the file, for engines that quantize a linear's input."""

from __future__ import annotations

import torch
from torch import Tensor

FP8_MAX = 448.0
FP4_MAX = 6.0

LEAST_RANGE = 2.0**-64
"""A smaller range counts as this one: its scale, and the inverse of that, are numbers in every dtype with float32's exponent."""

RANGE_OF_ZEROS = 1.0
"""The range of inputs that were always zero: any will do for them, and this one is of the size that others have."""


def static_scale(act: str, reach: float) -> Tensor:
    """``input_scale`` F32 [1] of the scheme's ``act``; ``reach`` is the largest magnitude that its codes represent
    (:mod:`quantcli.statistics.ranges`).

    ``int8-tensor`` and ``fp8-tensor``: x ≈ scale·q, so the range over the largest code. ``nvfp4-g16``: the global scale, by which each
    group's own scale is multiplied before it is stored in FP8 (compressed-tensors divides by it): 448·6 over the range. Always finite
    and above zero; a range of zero counts as :data:`RANGE_OF_ZEROS`.
    """
    range_ = torch.tensor([reach if reach else RANGE_OF_ZEROS]).clamp_min(LEAST_RANGE)
    if act == "nvfp4-g16":
        return FP8_MAX * FP4_MAX / range_
    return range_ / (127.0 if act.startswith("int8") else FP8_MAX)
