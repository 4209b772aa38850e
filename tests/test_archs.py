"""Architectures: names map both ways, rows are reordered as rotary embeddings need, unknown models have no literal."""

from __future__ import annotations

import gguf
import pytest
import torch

from quantcli import archs
from quantcli.archs.llama import ARCH
from quantcli.registry import find, names

CONFIG = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize("name", names("archs"))
def test_every_architecture_is_consistent(name: str) -> None:
    arch = find("archs", name).ARCH
    linears = {linear.name for linear in arch.linears}
    assert {linear.tap for linear in arch.linears} <= linears
    assert set(arch.rotary) <= linears
    assert len(set(arch.gguf_names.values())) == len(arch.gguf_names)
    assert all(f"{arch.layer}.{linear}" in arch.gguf_names for linear in linears)


def test_a_model_type_finds_its_architecture_and_an_unknown_one_finds_none() -> None:
    assert archs.of(CONFIG) is ARCH
    assert archs.of({"model_type": "no such model"}) is None
    assert archs.of({}) is None
    assert archs.of_gguf("llama") is ARCH
    assert archs.of_gguf("bert") is None


def test_names_are_those_of_the_gguf_package() -> None:
    theirs = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 12)
    for module in ARCH.gguf_names:
        name = module.replace("{i}", "11") + ".weight"
        assert ARCH.gguf_name(name) == theirs.get_name(name, try_suffixes=(".weight",))


def test_names_map_back() -> None:
    for module in ARCH.gguf_names:
        for suffix in ("weight", "bias"):
            name = f"{module.replace('{i}', '7')}.{suffix}"
            assert ARCH.hf_name(ARCH.gguf_name(name)) == name


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.experts.up_proj.weight",
        "lm_head.scales",
        "model.layers.x.mlp.up_proj.weight",
        "model.layers.01.mlp.up_proj.weight",
    ],
)
def test_a_tensor_the_architecture_lacks_has_no_gguf_name(name: str) -> None:
    assert ARCH.gguf_name(name) is None


def test_rotary_rows_interleave_the_halves_of_each_head() -> None:
    order = ARCH.row_order("model.layers.0.self_attn.q_proj.weight", 32, CONFIG)
    assert order.view(4, 8)[1].tolist() == [8, 12, 9, 13, 10, 14, 11, 15]
    assert sorted(order.tolist()) == list(range(32))


def test_keys_are_reordered_by_their_own_head_count_and_biases_like_weights() -> None:
    order = ARCH.row_order("model.layers.0.self_attn.k_proj.bias", 16, CONFIG)
    assert order[:8].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert torch.equal(order, ARCH.row_order("model.layers.5.self_attn.k_proj.weight", 16, CONFIG))
    without = {"model_type": "llama", "num_attention_heads": 4}
    assert ARCH.row_order("model.layers.0.self_attn.k_proj.weight", 16, without)[:4].tolist() == [0, 2, 1, 3]


def test_other_rows_stay() -> None:
    assert ARCH.row_order("model.layers.0.self_attn.v_proj.weight", 32, CONFIG) is None
    assert ARCH.row_order("lm_head.weight", 32, CONFIG) is None
