"""Static input scales: stored in the file, for engines that quantize a linear's input."""

from __future__ import annotations

import torch
from torch import Tensor

FP8_MAX = 448.0
FP4_MAX = 6.0


def static_scale(act: str, reach: float) -> Tensor:
    """``input_scale`` F32 [1] of the scheme's ``act``; ``reach`` is the largest magnitude that its codes represent
    (:mod:`quantcli.statistics.ranges`).

    ``int8-tensor`` and ``fp8-tensor``: x ≈ scale·q, so the range over the largest code. ``nvfp4-g16``: the global scale, by which each
    group's own scale is multiplied before it is stored in FP8 (compressed-tensors divides by it): 448·6 over the range.
    """
    range_ = torch.tensor([reach]).clamp_min(torch.finfo(torch.float32).tiny)
    if act == "nvfp4-g16":
        return FP8_MAX * FP4_MAX / range_
    return range_ / (127.0 if act.startswith("int8") else FP8_MAX)
