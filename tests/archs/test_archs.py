"""Architectures: names map both ways, rows are reordered as rotary embeddings need, unknown models have no literal."""

from __future__ import annotations

import gguf
import pytest
import torch

from quantcli import archs
from quantcli.archs import Key
from quantcli.archs.llama import ARCH
from quantcli.archs.mixtral import ARCH as MIXTRAL
from quantcli.archs.shared.transformations import CUTS, ROW_ORDERS
from quantcli.formats.gguf.model import metadata, rope
from quantcli.registry import find, names

CONFIG = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize("name", names("archs"))
def test_every_architecture_is_consistent(name: str) -> None:
    arch = find("archs", name).ARCH
    linears = {linear.name for linear in arch.linears}
    assert {linear.tap for linear in arch.linears} <= linears
    assert set(arch.rows) <= linears
    assert len(set(arch.gguf_names.values())) == len(arch.gguf_names)
    assert set(arch.also.values()) <= set(arch.gguf_names)
    unknown = {linear for linear in linears if f"{arch.layer}.{linear}" not in arch.gguf_names and f"{linear}.weight" not in arch.cuts}
    assert not unknown or arch.experts  # llama.cpp may know no dense layers among those with experts
    assert set(arch.rows.values()) <= set(ROW_ORDERS)
    assert {cut.how for cut in (*arch.experts.values(), *arch.cuts.values())} <= set(CUTS)
    assert set(arch.computed) <= set(rope.COMPUTED)
    assert {key for key in arch.keys if isinstance(key, str)} <= set(metadata.GROUPS)
    assert {key.computed for key in arch.keys if isinstance(key, Key)} <= {None, *metadata.COMPUTED}
    for cut in arch.experts.values():
        assert all(f"{arch.layer}.{name}".removesuffix(".weight").removesuffix(".bias") in arch.gguf_names for name in cut.names)


def test_no_model_type_has_two_architectures() -> None:
    types = [model_type for name in names("archs") for model_type in find("archs", name).ARCH.model_types]
    assert len(types) == len(set(types))


@pytest.mark.parametrize("name", names("archs"))
def test_every_gguf_name_is_one_of_its_architecture_in_the_gguf_package(name: str) -> None:
    arch = find("archs", name).ARCH
    theirs = {word: kind for kind, word in gguf.MODEL_ARCH_NAMES.items()}[arch.gguf_arch]
    known = {gguf.TENSOR_NAMES[tensor].replace("{bid}", "{i}") for tensor in gguf.MODEL_TENSORS[theirs]}
    assert {target.removesuffix(".weight").removesuffix(".bias") for target in arch.gguf_names.values()} <= known


def test_a_model_type_finds_its_architecture_and_an_unknown_one_finds_none() -> None:
    assert archs.of(CONFIG) is ARCH
    assert archs.of({"model_type": "no such model"}) is None
    assert archs.of({}) is None
    assert archs.of_gguf("llama") is ARCH
    assert archs.of_gguf("bert") is None


def test_of_architectures_with_one_gguf_name_the_tensors_tell_which_it_is() -> None:
    assert archs.of_gguf("llama", ["token_embd.weight", "blk.0.ffn_up.weight"]) is ARCH
    assert archs.of_gguf("llama", ["token_embd.weight", "blk.0.ffn_up_exps.weight"]) is MIXTRAL


def test_a_text_model_inside_a_model_that_sees_has_the_same_names_and_words() -> None:
    for name in ("model.language_model.layers.3.mlp.up_proj.weight", "language_model.model.layers.3.mlp.up_proj.weight"):
        assert ARCH.gguf_name(name) == "blk.3.ffn_up.weight"
        assert ARCH.tap(name) == name.replace("up_proj.weight", "gate_proj")
    config = {"model_type": "sees", "text_config": {"model_type": "llama", "hidden_size": 8}}
    assert ARCH.usual(config)["hidden_size"] == 8


def test_experts_share_a_gguf_name_and_have_taps_of_their_own() -> None:
    name = "model.layers.2.block_sparse_moe.experts.5.w3.weight"
    assert MIXTRAL.gguf_name(name) == "blk.2.ffn_up_exps.weight"
    assert MIXTRAL.tap(name) == "model.layers.2.block_sparse_moe.experts.5.w1"
    assert MIXTRAL.hf_name("blk.2.ffn_up_exps.weight") == "model.layers.2.block_sparse_moe.experts.{e}.w3.weight"
    assert archs.slice_of(name) == 5
    assert archs.slice_of("model.layers.2.mlp.up_proj.weight") is None


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
