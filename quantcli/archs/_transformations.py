"""The table of named transformations that architectures refer to: how a stored tensor is cut, and where GGUF has its rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor


def rotary(n_rows: int, n_heads: int) -> Tensor:
    """HF rotates the two halves of a head, llama.cpp neighbours: row ``2j + k`` of a head is HF's row ``k·(head_dim/2) + j``."""
    return torch.arange(n_rows).view(n_heads, 2, -1).transpose(1, 2).reshape(-1)


def rotary_queries(n_rows: int, config: Mapping) -> Tensor:
    return rotary(n_rows, config["num_attention_heads"])


def rotary_keys(n_rows: int, config: Mapping) -> Tensor:
    return rotary(n_rows, config.get("num_key_value_heads") or config["num_attention_heads"])


ROW_ORDERS: dict[str, Callable[[int, Mapping], Tensor]] = {"rotary queries": rotary_queries, "rotary keys": rotary_keys}
"""Name → (number of rows, config) → the HF row that each GGUF row holds: [n_rows] int64."""


def in_turn_by_rows(tensor: Tensor, n: int, config: Mapping) -> Sequence[Tensor]:
    """[n_experts, n·out, in] (biases: without in) → n tensors [n_experts, out, in]: the linears lie one below the other."""
    return tensor.chunk(n, dim=1)


CUTS: dict[str, Callable[[Tensor, int, Mapping], Sequence[Tensor]]] = {"stacked": in_turn_by_rows}
"""Name → (stored tensor, number of names, config) → a tensor for each name; one with ``{e}`` gets [n_experts, …], an expert a slice.

Views, where torch can give them: shapes are found by cutting a tensor that has no data.
"""
