"""What can absorb a scale: found by trying, on every kind of layer; folding it leaves the function of the model as it was."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantcli.archs.llama import ARCH
from quantcli.formats import open_checkpoint
from quantcli.forward.absorb import Absorbers
from quantcli.passes.shared import basis
from quantcli.planning.arrange import open_forward
from quantcli.tensors import Absorber, Layer
from support.tiny_models import TinyLlama

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
GATED = {"mlp.down_proj": "mlp.up_proj"}
LLAMA = {
    "self_attn.q_proj": "input_layernorm",
    "self_attn.o_proj": "self_attn.v_proj",
    "mlp.gate_proj": "post_attention_layernorm",
    **GATED,
}
MODELS: dict[str, tuple[dict, dict[str, str]]] = {
    "llama": ({"attention_bias": True, "mlp_bias": True}, LLAMA),
    "mistral": ({"head_dim": 8, "sliding_window": 8}, LLAMA),
    "qwen2": ({}, LLAMA),
    "qwen3": ({"head_dim": 16}, LLAMA),
    "gemma2": ({"head_dim": 8}, {**LLAMA, "mlp.gate_proj": "pre_feedforward_layernorm"}),
    "olmo2": ({}, {"self_attn.o_proj": "self_attn.v_proj", **GATED}),  # no norm before its linears
    "phi3": (
        {},
        {
            "self_attn.qkv_proj": "input_layernorm",
            "self_attn.o_proj": "self_attn.qkv_proj",
            "mlp.gate_up_proj": "post_attention_layernorm",
            "mlp.down_proj": "mlp.gate_up_proj",
        },
    ),
    "phi": ({}, {"self_attn.q_proj": "input_layernorm", "self_attn.dense": "self_attn.v_proj"}),  # one norm for both; GELU
    "cohere": ({}, {"self_attn.q_proj": "input_layernorm", "self_attn.o_proj": "self_attn.v_proj", **GATED}),
    "opt": (
        {"ffn_dim": 48, "word_embed_proj_dim": 32},
        {
            "self_attn.q_proj": "self_attn_layer_norm",
            "self_attn.out_proj": "self_attn.v_proj",
            "fc1": "final_layer_norm",
            "fc2": "fc1",  # ReLU bends nothing
        },
    ),
}
"""Model type → options beside :data:`SMALL`, and tap → what absorbs its scales; a tap that is missing has nothing."""

FLOAT32_NORMS = ("gemma2", "cohere")
"""Their norms multiply by their weight in float32, even in a float64 model."""

FLOAT32_ROUTERS = ("deepseek_v3",)
"""Their routers multiply in float32."""


def model_of(model_type: str, folder: Path, **options: object) -> transformers.PreTrainedModel:
    """A random float64 model, saved to ``folder``."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **{**SMALL, **options})
    model = transformers.AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.copy_(torch.randn_like(tensor) * (0.2 if tensor.ndim > 1 else 0.1) + (1.0 if tensor.ndim == 1 else 0.0))
    model.save_pretrained(folder)
    return model


def found_in(folder: Path) -> tuple[dict[str, Absorber], dict[str, str]]:
    with open_checkpoint(str(folder)) as source:
        forward = open_forward(source)
        absorbers = Absorbers(forward)
        return {tap: absorber for i in range(len(forward.layers)) for tap, absorber in absorbers.of(i).items()}, forward.taps


def folded(weights: Mapping[str, Tensor], absorbers: dict[str, Absorber], taps: dict[str, str]) -> dict[str, Tensor]:
    """``weights`` with random scales folded at every tap."""
    unit = Layer("", dict(weights), {}, dict(taps), absorbers=absorbers)
    unit.taps |= {name: tap for absorber in absorbers.values() for name, tap in absorber.readers.items()}
    generator = torch.Generator().manual_seed(1)
    for tap, absorber in absorbers.items():
        if tap in unit.scales:
            continue
        s = torch.rand(len(absorber.channel), generator=generator, dtype=torch.float64) * 4 + 0.1
        basis.fold(unit, tap, basis.shared(s, absorber, "mean"))
    return unit.tensors


@pytest.mark.parametrize("model_type", MODELS)
def test_every_op_that_can_absorb_a_scale_is_found_and_no_other(model_type: str, tmp_path: Path) -> None:
    options, expected = MODELS[model_type]
    model_of(model_type, tmp_path, **options)
    absorbers, _ = found_in(tmp_path)
    suffixes = {tap.partition(".0.")[2]: absorber.names[0].partition(".0.")[2] for tap, absorber in absorbers.items() if ".0." in tap}
    assert suffixes == {tap: f"{absorber}.weight" for tap, absorber in expected.items()}
    assert len(absorbers) == 2 * len(expected)


@pytest.mark.parametrize("model_type", MODELS)
def test_folding_scales_changes_nothing(model_type: str, tmp_path: Path) -> None:
    model = model_of(model_type, tmp_path, **MODELS[model_type][0])
    ids = torch.arange(2, 34).view(2, 16)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        tensors = folded(model.state_dict(), *found_in(tmp_path))
        assert not all(torch.equal(tensors[name], tensor) for name, tensor in model.state_dict().items())
        model.load_state_dict(tensors)
        after = model(input_ids=ids).logits
    tolerance = 1e-5 if model_type in FLOAT32_NORMS else 1e-10
    torch.testing.assert_close(after, before, rtol=0, atol=tolerance * float(before.abs().max()))


def test_the_literal_of_llama_says_what_trying_finds(tiny_llama: TinyLlama) -> None:
    absorbers, _ = found_in(tiny_llama(layers=1))
    layer = "model.layers.0."
    assert {linear.tap: linear.absorber for linear in ARCH.linears} == {
        tap.removeprefix(layer): absorber.names[0].removeprefix(layer).removesuffix(".weight") for tap, absorber in absorbers.items()
    }


def test_each_head_of_a_group_reads_the_rows_of_its_own_values(tiny_llama: TinyLlama) -> None:
    absorbers, _ = found_in(tiny_llama(layers=1, hidden=64, heads=4, kv_heads=2))
    channel = absorbers["model.layers.0.self_attn.o_proj"].channel
    assert channel.tolist() == [*range(16), *range(16), *range(16, 32), *range(16, 32)]


EXPERTS: dict[str, tuple[dict, set[str]]] = {
    "mixtral": ({"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "intermediate_size": 32}, {"gate.weight"}),
    "qwen3_moe": ({"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 16, "head_dim": 8}, {"gate.weight"}),
    "qwen2_moe": (
        {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 32},
        {"gate.weight", "shared_expert_gate.weight", "shared_expert.gate_proj.weight", "shared_expert.up_proj.weight"},
    ),
    "deepseek_v3": (
        {
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "n_shared_experts": 1,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 0,
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
        },
        {"gate.weight", "shared_experts.gate_proj.weight", "shared_experts.up_proj.weight"},
    ),
}
"""Model type → options, and what reads the norm before the experts beside them. Some down_proj are as wide as the norm."""


@pytest.mark.parametrize("model_type", EXPERTS)
def test_the_norm_before_experts_takes_one_scale_for_all_that_reads_it(model_type: str, tmp_path: Path) -> None:
    options, beside = EXPERTS[model_type]
    model_of(model_type, tmp_path, **options)
    absorbers, taps = found_in(tmp_path)
    for layer in ("model.layers.0.", "model.layers.1."):
        norm = f"{layer}post_attention_layernorm.weight"
        groups = {tap: absorber for tap, absorber in absorbers.items() if absorber.names == (norm,)}
        readers = next(iter(groups.values())).readers
        assert all(absorber.readers == readers for absorber in groups.values())
        assert groups.keys() == set(readers.values())
        first = {name for name in taps if name.startswith(layer) and ".experts." in name and name.split(".")[-2][:2] not in ("w2", "do")}
        others = {name.split(".", 4)[4] for name in readers.keys() - first}
        assert first <= readers.keys()
        assert others == beside
        assert all(taps.get(name, tap) == tap for name, tap in readers.items())
    downs = {tap for tap in absorbers if tap.endswith((".w2", ".down_proj"))}
    assert downs == {tap for tap in taps.values() if tap.endswith((".w2", ".down_proj"))}
    assert absorbers.keys() >= {tap for tap in taps.values() if ".mlp." in tap or ".block_sparse_moe." in tap}


def logits_of(folder: Path) -> Tensor:
    """Of the model in ``folder``, in float64, experts one by one."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager")
    with torch.no_grad():
        return model(input_ids=torch.arange(2, 34).view(2, 16)).logits


@pytest.mark.parametrize("model_type", EXPERTS)
def test_folding_scales_before_experts_changes_nothing(model_type: str, tmp_path: Path) -> None:
    model_of(model_type, tmp_path, **EXPERTS[model_type][0])
    before, was = logits_of(tmp_path), load_file(tmp_path / "model.safetensors")
    unit = folded(was, *found_in(tmp_path))
    save_file({name: tensor.contiguous() for name, tensor in unit.items()}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert sum(not torch.equal(unit[name], was[name]) for name in was if ".experts." in name) == len([n for n in was if ".experts." in n])
    tolerance = 1e-5 if model_type in FLOAT32_ROUTERS else 1e-10
    torch.testing.assert_close(logits_of(tmp_path), before, rtol=0, atol=tolerance * float(before.abs().max()))


def test_a_norm_before_experts_that_something_unseen_reads_too_is_left_alone(tmp_path: Path) -> None:
    model_of("mixtral", tmp_path, **EXPERTS["mixtral"][0])
    with open_checkpoint(str(tmp_path)) as source:
        forward = open_forward(source)
        forward.untapped = ()  # as if the router were no matrix of the file
        absorbers = Absorbers(forward).of(0)
    assert not any("post_attention_layernorm" in absorber.names[0] for absorber in absorbers.values())
    assert "model.layers.0.self_attn.q_proj" in absorbers
