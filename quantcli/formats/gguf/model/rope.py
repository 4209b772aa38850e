"""Llama 3's and Phi-3's rotary scaling: the tables of factors a GGUF file holds, and the parameters they came from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from quantcli.errors import CheckpointError, UnsupportedError
from quantcli.formats.gguf.model.metadata import head_dim, rope_parameters, rotary_width

TENSOR = "rope_freqs.weight"
LONGROPE = {"long": "rope_factors_long.weight", "short": "rope_factors_short.weight"}

PUBLISHED = ((8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192))
"""(factor, low_freq_factor, high_freq_factor, original_max_position_embeddings) of Llama 3.1 and of 3.2."""
TOLERANCE = 1e-5


def llama3_tensors(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The table of a model with Llama 3's scaling, none for others. ``config``: with the usual keys."""
    rope = rope_parameters(config)
    if rope["rope_type"] != "llama3":
        return {}
    if (context := config.get("max_position_embeddings")) is not None:  # transformers takes it where the config does not tell the old one
        rope.setdefault("original_max_position_embeddings", context)
    return {TENSOR: llama3_factors(rope, head_dim(config))}


def llama3_factors(rope: Mapping[str, Any], head_dim: int) -> Tensor:
    """What each rotary frequency is divided by: [head_dim / 2] float32.

    ``rope``: HF's rope_parameters. 1 for short waves, ``factor`` for long ones, and between them
    ``1 / ((1 − s)/factor + s)`` with ``s = (old_context/wavelength − low) / (high − low)``.
    """
    theta, factor = rope.get("rope_theta", 10000.0), rope.get("factor", 8.0)
    low, high = rope.get("low_freq_factor", 1.0), rope.get("high_freq_factor", 4.0)
    old_context = rope.get("original_max_position_embeddings", 8192)
    frequency = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    wavelength = 2 * math.pi / frequency
    s = (old_context / wavelength - low) / (high - low)
    factors: Tensor = 1 / ((1 - s) / factor + s)
    factors[wavelength < old_context / high] = 1.0
    factors[wavelength > old_context / low] = factor
    return factors


def llama3_parameters(factors: Tensor, theta: float) -> dict[str, Any]:
    """HF's rope_parameters of the table ``factors`` [head_dim / 2]; :class:`UnsupportedError` when it is no Llama 3 table.

    Only the ratios of low, high and old context show in a table; when it is none of the published ones, low is taken as 1.
    """
    head_dim = 2 * factors.numel()
    for guess in (*PUBLISHED, *_solve(factors, theta, head_dim)):
        keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        rope = {"rope_type": "llama3", "rope_theta": theta, **dict(zip(keys, guess, strict=True))}
        if torch.allclose(llama3_factors(rope, head_dim), factors.float(), rtol=TOLERANCE):
            return rope
    raise UnsupportedError("rope_freqs.weight: these rotary factors do not come from Llama 3's rule; quantcli knows no other")


def _solve(factors: Tensor, theta: float, head_dim: int) -> list[tuple[float, float, float, int]]:
    """Parameters by a straight line: ``s`` is linear in the frequency, and two points between 1 and ``factor`` give it."""
    factor = float(factors.max())
    between = (factors > 1) & (factors < factor)
    if factor <= 1 or int(between.sum()) < 2:
        return []
    frequency = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim))[between]
    s = (1 / factors[between].double() - 1 / factor) / (1 - 1 / factor)
    slope = float((s[0] - s[-1]) / (frequency[0] - frequency[-1]))
    intercept = float(s[0] - slope * frequency[0])
    if intercept >= 0:
        return []
    high = round(1 - 1 / intercept, 4)
    return [(factor, 1.0, high, round(slope * 2 * math.pi * (high - 1)))]


def longrope_tensors(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The two tables of a model with Phi-3's scaling, none for others. ``config``: with the usual keys."""
    rope, width = rope_parameters(config), rotary_width(config)
    tables = {length: rope.get(f"{length}_factor") for length in LONGROPE}
    if not tables["long"]:
        return {}
    if any(table is None or len(table) != width / 2 for table in tables.values()):
        raise CheckpointError(f"config.json: longrope's long_factor and short_factor need {width // 2} numbers each")
    return {LONGROPE[length]: torch.tensor(table, dtype=torch.float32) for length, table in tables.items()}


def longrope_parameters(tables: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Any]:
    """HF's rope_parameters of the tables :data:`LONGROPE`; ``config``: as far as the file's metadata gives it."""
    n, before = rotary_width(config) // 2, config.get("original_max_position_embeddings")
    for name, table in tables.items():
        if tuple(table.shape) != (n,) or not table.isfinite().all():
            raise CheckpointError(f"tensor '{name}' is {list(table.shape)}, expected {n} finite factors, one for each rotary frequency")
    if before is None:
        raise CheckpointError("rope.scaling.original_context_length is missing in the metadata, and the file has the tables of longrope")
    factors = {f"{length}_factor": [float(str(x)) for x in tables[name].numpy()] for length, name in LONGROPE.items()}
    return {**config["rope_parameters"], "rope_type": "longrope", **factors, "original_max_position_embeddings": before}


COMPUTED: dict[str, Callable[[Mapping[str, Any]], dict[str, Tensor]]] = {"llama3": llama3_tensors, "longrope": longrope_tensors}
"""What an architecture's literal names → config with the usual keys → the tensors, by GGUF name, that follow from it."""
