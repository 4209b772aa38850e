"""Block LDLQ: GPTQ for types that code a run of weights at once, with the error of a whole block handed on to the blocks after it.

Tseng, Chee, Sun, Kuleshov, De Sa: "QuIP#: Even Better LLM Quantization with Hadamard Incoherence and Lattice Codebooks", arXiv 2402.04396,
section 4.1. With H⁻¹ = Uᵀ·U as in GPTQ and b a block of inputs (256, a super-block, whose scales are stored together)::

    Ŵ_b = encode(V_b)                      the type's own search, weighed by diag(H)
    E·U_bb = V_b − Ŵ_b                     one triangular solve
    V_:,k ← V_:,k − E·U_bk                 for the inputs k behind the block

Inside a block nothing is handed on here: that is left to the descent (:mod:`quantcli.passes.shared.descent`), which goes through runs of 8
weights. A block of one column is GPTQ.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quantcli.qtypes import QType
from quantcli.tensors import Grid, Scheme

BLOCK = 256
"""Inputs of a super-block."""


def solve_blocks(W: Tensor, qtype: QType, scheme: Scheme, importance: Tensor, U: Tensor) -> tuple[Tensor, Grid]:
    """Codes [out, in] and grid of ``W`` [out, in] float32, which is written to; ``importance``: [in], ``U``: [in, in] upper, both in the
    inputs' own order."""
    parts = []
    for start in range(0, W.shape[1], BLOCK):
        now = slice(start, start + BLOCK)
        coded = qtype.encode(W[:, now].contiguous(), scheme, importance[now].contiguous())
        parts.append(qtype.chosen(coded))
        E = torch.linalg.solve_triangular(U[now, now], W[:, now] - qtype.unpack(coded), upper=True, left=False)
        W[:, now.stop :].addmm_(E, U[now, now.stop :], alpha=-1)
    codes, grids = zip(*parts, strict=True)
    first = grids[0]
    joined = {name: torch.cat([grid.parts[name] for grid in grids], 1) for name in first.parts}
    return torch.cat(codes, 1), replace(first, scale=torch.cat([grid.scale for grid in grids], 1), parts=joined)
