"""GGUF files written again with something changed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantcli.formats.gguf.file import container, headers


def rewrite(
    path: Path,
    target: Path,
    *,
    drop: str = "",
    fields: Mapping[str, Any] | None = None,
    dtype: dict[str, str] | None = None,
    data: dict[str, int] | None = None,
) -> Path:
    """The file at ``path`` again, with a tensor dropped, metadata replaced, or a tensor's type renamed (its data then zeros, or a byte of
    ``data`` over and over)."""
    read = headers.read_header(path)
    specs = [spec for name, spec in read.specs.items() if name != drop]
    specs = [container.tensor_spec(s.name, (dtype or {}).get(s.name, s.dtype), s.shape) for s in specs]
    kept = {key: field for key, field in read.fields.items() if key not in (fields or {})}
    head, offsets, size = headers.header(kept | dict(fields or {}), specs)
    out = bytearray(head + bytes(size - len(head)))
    for spec in specs:
        start, end = offsets[spec.name], offsets[spec.name] + spec.nbytes
        if spec == read.specs[spec.name]:
            out[start:end] = path.read_bytes()[read.offsets[spec.name] :][: spec.nbytes]
        else:
            out[start:end] = bytes([(data or {}).get(spec.name, 0)]) * spec.nbytes
    target.write_bytes(out)
    return target
