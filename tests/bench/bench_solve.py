"""The solvers' kernels against their torch references, on one thread: python tests/bench/bench_solve.py

Prints one line an op: seconds of both, their ratio, and whether the results are equal. Inputs come from the tests.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from quantcli import ops
from support.kernel_cases import factor_of, importance_of, random

Run = Callable[[], tuple[Tensor, ...]]


def timed(kernel: str, run: Run, repeats: int) -> tuple[float, tuple[Tensor, ...]]:
    """The best wall time of ``repeats`` runs, in seconds, and the result."""
    ops.use(kernel)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        result = run()
        best = min(best, time.perf_counter() - start)
    return best, result


def compare(name: str, run: Run) -> None:
    slow, expected = timed("reference", run, 1)
    for kernel in ops.available()[1:]:
        fast, found = timed(kernel, run, 3)
        equal = all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        print(f"{name:<36} {kernel:<9} {fast:8.4f} s  reference {slow:8.3f} s  ratio {slow / fast:6.1f}  equal {equal}")  # noqa: T201


def main() -> None:
    ops.set_threads(1)
    W, importance = random(4096, 4096), importance_of(4096)
    for sym in (True, False):
        options = {"bits": 4, "group_size": 128, "sym": sym, "search": True}
        name = f"fit_affine 4096x4096 {'sym' if sym else 'asym'}"
        compare(name, lambda options=options: ops.fit_affine(W, importance, **options))
    chunk, U = W[:, :128].contiguous(), factor_of(128)[1]
    scale, zero = ops.fit_affine(chunk, None, bits=4, group_size=128, sym=False, search=True)
    group = torch.zeros(128, dtype=torch.int32)
    compare("gptq_chunk 4096x128", lambda: ops.gptq_chunk(chunk, U, scale, -(scale * zero), group, 0, 15))
    codes = torch.randint(0, 8, (4096, 4096), dtype=torch.uint8)
    compare("pack_bits 4096x4096, 3 bits", lambda: (ops.pack_bits(codes, 3),))


if __name__ == "__main__":
    main()
