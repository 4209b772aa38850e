"""NF4 of a bfloat16 matrix, and back: the kernels of every instruction set against bitsandbytes' CPU path, in the same run.

    python tests/bench/bench_nf4.py [PYTHON_WITH_BITSANDBYTES]

One thread each, weights a second, best of several runs on [4096, 4096]; without a Python that has bitsandbytes its column is left out.
"""

from __future__ import annotations

import subprocess
import sys
from functools import partial

import torch
from stopwatch import best_seconds

from quantcli import ops
from quantcli.qtypes.fp4 import QTYPE as fp4
from quantcli.qtypes.nf4 import QTYPE as nf4
from quantcli.tensors import Scheme

SHAPE = (4096, 4096)

PEER = f"""
import time, torch
from bitsandbytes import functional as F
torch.set_num_threads(1)
W = (0.02 * torch.randn{SHAPE}).bfloat16()
for kind in ("nf4", "fp4"):
    for nested in (False, True):
        codes, state = F.quantize_4bit(W, quant_type=kind, compress_statistics=nested)
        state.dtype = torch.float32
        times = [], []
        for _ in range(3):
            start = time.perf_counter(); F.quantize_4bit(W, quant_type=kind, compress_statistics=nested)
            middle = time.perf_counter(); F.dequantize_4bit(codes, state)
            times[0].append(middle - start); times[1].append(time.perf_counter() - middle)
        print(min(times[0]), min(times[1]))
"""


def main(python: str | None) -> None:
    ops.set_threads(1)
    W = (0.02 * torch.randn(*SHAPE, generator=torch.Generator().manual_seed(0))).bfloat16()
    peer = subprocess.run([python, "-c", PEER], capture_output=True, text=True, check=True).stdout.splitlines() if python else []
    for i, (qtype, words) in enumerate((q, w) for q in (nf4, fp4) for w in ("b64", "b64-dq")):
        scheme = Scheme.parse(f"{qtype.name}-{words}")
        tensor = qtype.encode(W, scheme)
        theirs = [float(word) for word in peer[i].split()] if peer else []
        for kernel in ops.available()[1:]:
            ops.use(kernel)
            ours = [best_seconds(partial(qtype.encode, W, scheme)), best_seconds(partial(qtype.unpack, tensor))]
            for j, name in enumerate(("quantize", "dequantize")):
                ratio = f"  bitsandbytes {W.numel() / theirs[j] / 1e6:7.0f}  ratio {theirs[j] / ours[j]:5.1f}" if theirs else ""
                print(f"{scheme!s:<12} {name:<10} {kernel:<9} {W.numel() / ours[j] / 1e6:7.0f} M/s{ratio}")  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
