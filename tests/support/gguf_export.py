"""Exports to GGUF for tests: the library's, with equal weights where a type needs an importance matrix."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import quantcli as qc
from quantcli import ops
from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.formats import gguf
from quantcli.formats.gguf.imatrix import imatrix
from quantcli.formats.gguf.imatrix.imatrix import Measured
from quantcli.formats.gguf.model.naming import gguf_names
from quantcli.formats.gguf.types.chooser import DENSE
from quantcli.planning.arrange import cut_for
from quantcli.recipe import Recipe
from quantcli.statistics.outliers import Protection
from quantcli.tensors import QuantizedTensor, Scheme

LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}


def export(source: Checkpoint, path: Path, file_type: str, *, is_weighed: bool = False, **options: Any) -> Path:
    """``source`` as a file of ``file_type`` at ``path``. ``is_weighed``: by an importance matrix in which all inputs count alike."""
    data = equal_weights(source, path.with_suffix(".imatrix.gguf")) if is_weighed else None
    return qc.export(source, path, file_type, data=data, options=options, device="cpu").path


def equal_weights(source: Checkpoint, path: Path) -> imatrix.Imatrix:
    """An importance matrix of ones for every matrix of ``source``, at ``path``."""
    source = cut_for(source, gguf.FORMAT)
    shapes = {target: source.specs[name].shape for name, target in gguf_names(source.specs, source.config).items()}
    matrices = {target: shape[-1] for target, shape in shapes.items() if len(shape) == 2}
    measured = {target: Measured([1], width, partial(torch.ones, 1, width)) for target, width in matrices.items()}
    imatrix.write(path, measured, datasets=[], n_chunks=1, chunk_size=1, own_fields={}, overwrite=False)
    return imatrix.read(path)


def quantized(tensor: torch.Tensor, scheme: Scheme | None, *, is_weighed: bool = False) -> torch.Tensor | QuantizedTensor:
    """``tensor`` in ``scheme``; ``is_weighed``: where all inputs count alike."""
    if scheme is None or scheme.qtype.upper() in DENSE:
        return tensor
    importance = torch.ones(tensor.shape[-1]) if is_weighed else None
    return QuantizedTensor(scheme, tuple(tensor.shape), {"blocks": ops.quantize_blocks(tensor.float(), scheme.qtype, importance)})


def measured(recipe: Recipe) -> Recipe:
    """``recipe`` as one that runs the model, for which a file is read under Hugging Face's names: it looks for outliers that none has."""
    return replace(recipe, protect_outliers=Protection(None, {"kurtosis": 1e9}))


def edit_config(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder
