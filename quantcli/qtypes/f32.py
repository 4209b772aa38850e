"""F32: float32, 32 bpw."""

from __future__ import annotations

from typing import Any

from quantcli.qtypes._dense import DenseType

OPTIONS: dict[str, Any] = {}

_TYPE = DenseType("F32")

layout = _TYPE.layout
fit = _TYPE.fit
pack = _TYPE.pack
unpack = _TYPE.unpack
encode = _TYPE.encode
