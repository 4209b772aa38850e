"""Speed of the small floats' ops against torch's own operations, one thread each, in the same run.

    python tests/bench/bench_minifloat.py [set …]

Each figure is the best of several runs on a bfloat16 matrix of [2048, 4096]; torch's is that of the references, which a program without
kernels runs. Decoding pays for fresh pages of float32.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from stopwatch import best_seconds
from torch import Tensor

from quantcli import ops
from quantcli.ops.minifloat import (
    dequantize_fp4,
    dequantize_fp8,
    fit_fp4,
    quantize_fp4,
    quantize_fp8,
    tile_absmax,
)


def cases(W: Tensor) -> dict[str, Callable[[], object]]:
    """What is measured, by name."""
    found: dict[str, Callable[[], object]] = {}
    for name, tile in (("row", (1, W.shape[1])), ("block", (128, 128)), ("g32", (1, 32))):
        scale = tile_absmax(W, tile) / 448
        data = quantize_fp8(W, scale, tile)
        found[f"absmax {name}"] = lambda tile=tile: tile_absmax(W, tile)
        found[f"fp8 {name}"] = lambda tile=tile, scale=scale: quantize_fp8(W, scale, tile)
        found[f"fp8 {name} decode"] = lambda tile=tile, scale=scale, data=data: dequantize_fp8(data, scale, tile)
    for kind, group in (("mxfp4", 32), ("nvfp4", 16)):
        step = tile_absmax(W, (1, group)) / 6
        packed = quantize_fp4(W, step)
        start = torch.full(step.shape, 100, dtype=torch.uint8)
        found[f"fp4 g{group}"] = lambda step=step: quantize_fp4(W, step)
        found[f"fp4 g{group} decode"] = lambda step=step, packed=packed: dequantize_fp4(packed, step)
        found[f"{kind} search"] = lambda start=start, kind=kind: fit_fp4(W, start, kind)
    return found


def main(sets: list[str]) -> None:
    ops.set_threads(1)
    W = torch.randn(2048, 4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    measured = cases(W)
    print(f"{'op':18} {'torch Mw/s':>10}" + "".join(f" {name + ' Mw/s':>14} {'ratio':>6}" for name in sets))  # noqa: T201
    for name, run in measured.items():
        ops.use("reference")
        peer = best_seconds(run, 2)
        line = f"{name:18} {W.numel() / peer / 1e6:10.1f}"
        for kernels in sets:
            ops.use(kernels)
            ours = best_seconds(run)
            line += f" {W.numel() / ours / 1e6:14.1f} {peer / ours:6.1f}"
        print(line)  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1:] or [name for name in ops.available() if name != "reference"])
