"""A plain GGUF export for tests: what the pipeline does, without passes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from quantcli import conversions, ops
from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.formats import Request, gguf
from quantcli.formats.gguf.types import filetypes
from quantcli.formats.gguf.types.chooser import DENSE
from quantcli.ops.blocks import KINDS
from quantcli.planning.arrange import cut_for
from quantcli.tensors import QuantizedTensor, Scheme

LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}


def export(source: Checkpoint, path: Path, file_type: str, metadata: Mapping[str, Any] | None = None, **options: Any) -> Path:
    """``source`` as a file of ``file_type`` at ``path``."""
    source = cut_for(source, gguf.FORMAT)
    schemes = filetypes.mix(file_type, source.specs, source.config, options=options)
    context = gguf.FORMAT.layout(source, schemes, Request(options=options, mix=file_type))
    outputs = [out for name, spec in source.specs.items() for out in context.outputs(spec, schemes.get(name))]
    with context.writer(path, outputs, metadata or {}) as writer:
        for name in source.specs:
            for part, data in context.parts(name, coded(source, name, schemes.get(name))).items():
                writer.put(part, data)
        writer.commit()
    return path


def coded(source: Checkpoint, name: str, scheme: Scheme | None) -> torch.Tensor | QuantizedTensor:
    """The source's own codes where ``scheme`` holds them."""
    have = source.schemes.get(name)
    if have is not None and scheme is not None and conversions.exactness(have, scheme, source.specs[name].shape[-1]) == conversions.EXACT:
        return conversions.convert(source.quantized(name), scheme)[0]
    return quantized(source.read(name), scheme)


def quantized(tensor: torch.Tensor, scheme: Scheme | None) -> torch.Tensor | QuantizedTensor:
    if scheme is None or scheme.qtype.upper() in DENSE:
        return tensor
    importance = torch.ones(tensor.shape[-1]) if KINDS[scheme.qtype].needs_importance else None
    return QuantizedTensor(scheme, tuple(tensor.shape), {"blocks": ops.quantize_blocks(tensor.float(), scheme.qtype, importance)})


def edit_config(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder
