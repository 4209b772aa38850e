"""BF16: bfloat16, 16 bpw, rounded to nearest even."""

from __future__ import annotations

from quantcli.qtypes.shared.dense import DenseType

QTYPE = DenseType("bf16")
