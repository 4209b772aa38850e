"""The table of named transformations that architectures refer to: how a stored tensor is cut, and where GGUF has its rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def rotary(n_rows: int, n_heads: int) -> Tensor:
    """HF rotates the two halves of a head, llama.cpp neighbours: row ``2j + k`` of a head is HF's row ``k·(head_dim/2) + j``."""
    return torch.arange(n_rows).view(n_heads, 2, -1).transpose(1, 2).reshape(-1)


def rotary_queries(n_rows: int, config: Mapping[str, Any]) -> Tensor:
    return rotary(n_rows, config["num_attention_heads"])


def rotary_keys(n_rows: int, config: Mapping[str, Any]) -> Tensor:
    return rotary(n_rows, config.get("num_key_value_heads") or config["num_attention_heads"])


def falcon_key_heads(config: Mapping[str, Any]) -> int:
    """One for all queries in the 7B, which sets ``multi_query``, whatever number stands beside that."""
    if config.get("multi_query") and not config.get("new_decoder_architecture"):
        return 1
    n_heads: int = config.get("num_key_value_heads") or config["num_attention_heads"]
    return n_heads


def queries_keys_values(n_rows: int, config: Mapping[str, Any]) -> Tensor:
    """Falcon has, for each group of heads, its queries, its key and its value; llama.cpp all queries, then all keys, then all values."""
    heads, groups = config["num_attention_heads"], falcon_key_heads(config)
    rows = torch.arange(n_rows).view(groups, heads // groups + 2, -1)
    return torch.cat((rows[:, :-2].reshape(-1), rows[:, -2].reshape(-1), rows[:, -1].reshape(-1)))


ROW_ORDERS: dict[str, Callable[[int, Mapping[str, Any]], Tensor]] = {
    "rotary queries": rotary_queries,
    "rotary keys": rotary_keys,
    "queries, keys, values": queries_keys_values,
}
"""Name → (number of rows, config) → the HF row that each GGUF row holds: [n_rows] int64."""


def in_turn_by_rows(tensor: Tensor, n: int, config: Mapping[str, Any]) -> Sequence[Tensor]:
    """[n_experts, n·out, in] (biases: without in) → n tensors [n_experts, out, in]: the linears lie one below the other."""
    return tensor.chunk(n, dim=1)


def turned(tensor: Tensor, n: int, config: Mapping[str, Any]) -> Sequence[Tensor]:
    """[…, in, out] → one tensor [… out, in]."""
    return [tensor.transpose(-1, -2)]


def apart(tensor: Tensor, n: int, config: Mapping[str, Any]) -> Sequence[Tensor]:
    """[n_experts, …] → one tensor: only its name is cut up by expert."""
    return [tensor]


def alternating(tensor: Tensor, n: int, config: Mapping[str, Any]) -> Sequence[Tensor]:
    """[n_experts, in, n·out], or a bias [n_experts, n·out] → n tensors [n_experts, out, in]: the outputs of the linears take turns."""
    rows = tensor.transpose(1, 2) if tensor.ndim == 3 else tensor
    return [rows[:, k::n] for k in range(n)]


def keys_and_values(tensor: Tensor, n: int, config: Mapping[str, Any]) -> Sequence[Tensor]:
    """DeepSeek's kv_b_proj [heads · (nope + value), rank] → keys [heads, rank, nope], turned to be applied to queries, and values
    [heads, value, rank]."""
    heads = tensor.view(config["num_attention_heads"], config["qk_nope_head_dim"] + config["v_head_dim"], -1)
    return [heads[:, : config["qk_nope_head_dim"]].transpose(1, 2), heads[:, config["qk_nope_head_dim"] :]]


def stacked(tensors: Sequence[Tensor], config: Mapping[str, Any]) -> Tensor:
    return torch.cat(list(tensors), dim=1)


def turned_back(tensors: Sequence[Tensor], config: Mapping[str, Any]) -> Tensor:
    return tensors[0].transpose(-1, -2)


def alone(tensors: Sequence[Tensor], config: Mapping[str, Any]) -> Tensor:
    return tensors[0]


def in_alternation(tensors: Sequence[Tensor], config: Mapping[str, Any]) -> Tensor:
    columns = [t.transpose(1, 2) if t.ndim == 3 else t for t in tensors]
    return torch.stack(columns, dim=-1).flatten(-2)


def heads_of_keys_and_values(tensors: Sequence[Tensor], config: Mapping[str, Any]) -> Tensor:
    keys, values = tensors
    return torch.cat((keys.transpose(1, 2), values), dim=1).flatten(0, 1)


CUTS: dict[str, Callable[[Tensor, int, Mapping[str, Any]], Sequence[Tensor]]] = {
    "stacked": in_turn_by_rows,
    "turned": turned,
    "apart": apart,
    "alternating": alternating,
    "keys and values": keys_and_values,
}
"""Name → (stored tensor, number of names, config) → a tensor for each name; one with ``{e}`` gets [n_experts, …], an expert a slice.

Views, where torch can give them: shapes are found by cutting a tensor that has no data.
"""

JOINS: dict[str, Callable[[Sequence[Tensor], Mapping[str, Any]], Tensor]] = {
    "stacked": stacked,
    "turned": turned_back,
    "apart": alone,
    "alternating": in_alternation,
    "keys and values": heads_of_keys_and_values,
}
"""The same names → (the tensors that the cut gives, config) → the stored tensor. Of some experts, or heads, it makes their part of it: the
parts of all lie one behind the other in its first dimension."""
