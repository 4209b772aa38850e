"""F16: IEEE half, 16 bpw; a value beyond ±65504 is an error rather than infinity."""

from __future__ import annotations

from quantcli.qtypes.shared.dense import DenseType

QTYPE = DenseType("f16")
