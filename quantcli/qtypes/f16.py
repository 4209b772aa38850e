"""F16: IEEE half, 16 bpw; a value beyond ±65504 is an error rather than infinity."""

from __future__ import annotations

from typing import Any

from quantcli.qtypes._dense import DenseType

OPTIONS: dict[str, Any] = {}

_TYPE = DenseType("F16")

layout = _TYPE.layout
fit = _TYPE.fit
pack = _TYPE.pack
unpack = _TYPE.unpack
encode = _TYPE.encode
