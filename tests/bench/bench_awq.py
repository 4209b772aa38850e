"""What AWQ's search is made of, against the same in plain torch operations, on one thread and in the same run.

    python tests/bench/bench_awq.py [--device cuda] [--inputs 2048] [--rows 1024] [scheme …]

One line a step: seconds of both, their ratio, and how what they find compares. The search of a tap does the first two 20 times on 256 rows;
the clipping goes over all rows once. Fits are the kernel's in both columns.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
from stopwatch import best_seconds
from torch import Tensor

from quantcli import ops, qtypes
from quantcli.passes import awq
from quantcli.passes.shared import basis
from quantcli.tensors import Grid, Scheme, output_error

T = TypeVar("T")
SCHEMES = ("int4-g128-asym", "int4-g128-sym", "int4-g32-asym", "int3-g64-asym", "q4_1")


def problem(rows: int, inputs: int, device: str) -> tuple[Tensor, Tensor]:
    """W [rows, inputs], and H of correlated inputs, some of them loud."""
    g = torch.Generator().manual_seed(0)
    X = torch.randn(2048, inputs, generator=g)
    X = X + X @ (torch.randn(inputs, inputs, generator=g) / inputs**0.5)
    X[:, ::97] *= 12
    return torch.randn(rows, inputs, generator=g).to(device), (X.T @ X / len(X)).to(device)


def plain_errors(W: Tensor, scheme: Scheme, s: Tensor, importance: Tensor) -> Tensor:
    scaled, qtype = W * s, qtypes.of(scheme.qtype)
    return (scaled - qtype.unpack(qtype.encode(scaled, scheme, importance))) / s


def plain_clipped(W: Tensor, grid: Grid, scheme: Scheme, H: Tensor) -> Grid:
    ops.use("reference")
    found = awq.clipped(W, grid, scheme, H)
    ops.use(None)
    return found


def clipping_error(W: Tensor, H: Tensor, grid: Grid) -> float:
    """The error of each group in its own output, summed."""
    E = (W - grid.decode(grid.encode(W))).view(len(W), -1, grid.group_size)
    return sum(float(output_error(E[:, g], H[a : a + E.shape[2], a : a + E.shape[2]])) for g, a in enumerate(range(0, len(H), E.shape[2])))


def compare(name: str, ours: Callable[[], T], plain: Callable[[], T], value: Callable[[T], float]) -> None:
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None

    def seconds(run: Callable[[], T]) -> float:
        return best_seconds(lambda: (run(), wait()), 3)

    fast, slow = seconds(ours), seconds(plain)
    print(f"{name:<26} {fast:8.4f} s  plain {slow:8.4f} s  ratio {slow / fast:5.1f}  result {value(ours()) / value(plain()):.6f}")  # noqa: T201


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--inputs", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("schemes", nargs="*", default=SCHEMES)
    words = parser.parse_args()
    ops.set_threads(1)
    W, H = problem(words.rows, words.inputs, words.device)
    few, importance = W[: basis.SAMPLED_ROWS].contiguous(), H.diagonal().contiguous()
    s = importance**0.25
    compare("output error", partial(output_error, few, H), lambda: ((few @ H) * few).sum(), float)
    for scheme in map(Scheme.parse, words.schemes):
        seen = importance / s.square()
        ours, plain = partial(qtypes.of(scheme.qtype).errors_in, s, [few], scheme, seen), partial(plain_errors, few, scheme, s, seen)
        compare(f"errors {scheme}", lambda ours=ours: ours()[0], plain, lambda E: float(E.square().sum()))
        grid = qtypes.of(scheme.qtype).fit(W, scheme, importance)
        clips = (partial(clip, W, grid, scheme, H) for clip in (awq.clipped, plain_clipped))
        compare(f"clipping {scheme}", *clips, lambda found: clipping_error(W, H, found))


if __name__ == "__main__":
    main()
