"""Speed of the block ops against ggml_quantize_chunk, one thread each, in the same run.

    python tests/bench/bench_blocks.py PATH/TO/libggml-base.so [set …]

Each figure is the best of several runs on a [512, 4096] matrix of the test's Gaussian kind.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from stopwatch import best_seconds

from quantcli import ops
from support.block_inputs import KINDS, weightings
from support.ggml_peer import Ggml


def main(library: str, sets: list[str]) -> None:
    ggml = Ggml(library)
    ops.set_threads(1)
    W = torch.randn(512, 4096, generator=torch.Generator().manual_seed(0))
    print(f"{'kind':6} {'importance':10} {'ggml Mw/s':>10}" + "".join(f" {name + ' Mw/s':>14} {'ratio':>6}" for name in sets))  # noqa: T201
    for kind in KINDS:
        for weights, _ in weightings(kind, W.shape[1]):
            peer = best_seconds(lambda kind=kind, weights=weights: ggml.quantize(W, kind, weights))
            line = f"{kind:6} {'none' if weights is None else 'weighted':10} {W.numel() / peer / 1e6:10.1f}"
            for name in sets:
                ops.use(name)
                ours = best_seconds(lambda kind=kind, weights=weights: ops.quantize_blocks(W, kind, weights))
                line += f" {W.numel() / ours / 1e6:14.1f} {peer / ours:6.2f}"
            print(line)  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:] or [name for name in ops.available() if name != "reference"])
