"""F32: float32, 32 bpw."""

from __future__ import annotations

from quantcli.qtypes.shared.dense import DenseType

QTYPE = DenseType("f32")
