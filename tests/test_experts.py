"""Experts: each has its own taps and tokens, fused on disk or not; nothing is skipped in silence."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import write_tokenizer
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

from quantcli.checkpoint import Checkpoint
from quantcli.forward import Forward

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32},
    "qwen2_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 64,
        "mlp_only_layers": [0],
    },
    "deepseek_v3": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        "q_lora_rank": 32,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
        "head_dim": 8,
    },
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 32},
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 8},
}
HIDDEN = torch.randn(1, 32, 64, generator=torch.Generator().manual_seed(6))
IDS = torch.randint(3, 512, (4, 32), generator=torch.Generator().manual_seed(5))

SaveModel = Callable[..., Path]


@pytest.fixture
def save_model(tmp_path: Path, tiny_tokenizer: Tokenizer) -> SaveModel:
    """``save_model("mixtral", fused=False, **config) -> folder``: the same random model, its experts one by one or in one tensor."""

    def save(model_type: str, *, fused: bool = False, unreached: tuple[int, ...] = (), **options: Any) -> Path:
        config = transformers.AutoConfig.for_model(model_type, **{**SMALL, **FAMILIES[model_type], **options})
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            parameter.data.normal_(0, 0.2).add_("norm" in name)
        for expert in unreached:
            for module in model.modules():
                if type(module).__name__.endswith("Router"):
                    close(module, expert)
        folder = tmp_path / f"{model_type}-{'fused' if fused else 'one-by-one'}"
        model.save_pretrained(folder, save_original_format=not fused)
        write_tokenizer(folder, tiny_tokenizer)
        return folder

    return save


def close(router: Any, expert: int) -> None:
    """No token goes to ``expert``: its row is minus the sum of the others, whose best is always above it."""
    others = [e for e in range(len(router.weight)) if e != expert]
    router.weight.data[expert] = -router.weight.data[others].sum(0)


def inputs_by_hand(folder: Path, ids: Tensor, *, every: bool = False) -> dict[tuple[int, int, str], Tensor]:
    """(layer, expert, "in" | "down") → what it reads: from what transformers' own modules were given, expert by expert."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
    given: dict[int, tuple[Any, Tensor, Tensor]] = {}
    for name, module in model.named_modules():
        if type(module).__name__.endswith("Experts"):
            i = int(name.split(".")[2])
            module.register_forward_pre_hook(lambda m, args, i=i: given.update({i: (m, args[0], args[1])}))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    found: dict[tuple[int, int, str], Tensor] = {}
    for i, (module, hidden, index) in given.items():
        for e in range(module.num_experts):
            X = hidden if every else hidden[torch.where((index == e).T)[1]]  # first choices come first
            gate, up = functional.linear(X, module.gate_up_proj[e]).chunk(2, -1)
            found[i, e, "in"], found[i, e, "down"] = X, (functional.silu(gate) * up).detach()
    return found


def measured(folder: Path, ids: Tensor, **options: Any) -> tuple[dict[str, str], dict[str, Tensor], Tensor]:
    """The taps of every weight, what each tap read, and the logits of the walk that observed it."""
    seen: dict[str, list[Tensor]] = {}
    with Checkpoint.open(str(folder)) as checkpoint:
        forward = Forward(checkpoint, **options)
        hidden = forward.embed(ids)
        for i in range(len(forward.layers)):
            with forward.layer(i) as layer:
                hidden = layer.observe(hidden, ids, lambda tap, X: seen.setdefault(tap, []).append(X.clone()))
        return forward.taps, {tap: torch.cat(Xs) for tap, Xs in seen.items()}, forward.head(hidden)


def expert_of(tap: str) -> tuple[int, int, str] | None:
    """(layer, expert, "in" | "down") of an expert's tap."""
    words = tap.split(".")
    if "experts" not in words:
        return None
    return int(words[2]), int(words[-2]), "down" if words[-1] in ("w2", "down_proj") else "in"


@pytest.mark.parametrize("fused", [False, True], ids=["one-by-one", "fused"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_each_expert_reads_the_tokens_routed_to_it(save_model: SaveModel, model_type: str, fused: bool) -> None:
    folder = save_model(model_type, fused=fused)
    expected = inputs_by_hand(folder, IDS)
    taps, seen, logits = measured(folder, IDS)
    got = {key: X for tap, X in seen.items() if (key := expert_of(tap))}
    assert got.keys() == {key for key, X in expected.items() if len(X)}
    for key, X in got.items():
        assert torch.equal(X, expected[key]), key
    assert len({tap for tap in taps.values() if expert_of(tap)}) == len(expected)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
    with torch.no_grad():
        assert torch.equal(logits, model(input_ids=IDS, use_cache=False).logits)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_with_all_tokens_each_expert_reads_every_one_and_the_output_stays(save_model: SaveModel, model_type: str) -> None:
    folder = save_model(model_type)
    expected = inputs_by_hand(folder, IDS, every=True)
    _, seen, logits = measured(folder, IDS, all_tokens=True)
    got = {key: X for tap, X in seen.items() if (key := expert_of(tap))}
    assert got.keys() == expected.keys()
    for key, X in got.items():
        assert torch.equal(X, expected[key]), key
    assert torch.equal(logits, measured(folder, IDS)[2])


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_fused_source_has_the_names_shapes_and_values_of_one_stored_one_by_one(save_model: SaveModel, model_type: str) -> None:
    with Checkpoint.open(str(save_model(model_type, fused=True))) as fused, Checkpoint.open(str(save_model(model_type))) as published:
        assert any(len(spec.shape) == 3 for spec in fused.specs.values())
        view = Forward(fused).checkpoint
        assert {name: (s.dtype, s.shape, s.nbytes) for name, s in view.specs.items()} == {
            name: (s.dtype, s.shape, s.nbytes) for name, s in published.specs.items()
        }
        for name in published.specs:
            assert torch.equal(view.read(name), published.read(name)), name


@pytest.mark.parametrize("model_type", ["qwen2_moe", "deepseek_v3"])
def test_routers_and_gates_of_shared_experts_have_no_tap(save_model: SaveModel, model_type: str) -> None:
    with Checkpoint.open(str(save_model(model_type))) as checkpoint:
        forward = Forward(checkpoint)
        last = {name.split(".mlp.")[1] for name in forward.untapped}
        assert last == {"gate.weight"} | ({"shared_expert_gate.weight"} if model_type == "qwen2_moe" else set())
        assert any("shared_expert" in name for name in forward.taps)


def test_an_experts_weight_that_was_set_is_the_one_that_runs_and_what_was_got_before_stays(save_model: SaveModel) -> None:
    name = "model.layers.0.block_sparse_moe.experts.2.w3.weight"
    with Checkpoint.open(str(save_model("mixtral"))) as checkpoint:
        forward = Forward(checkpoint)
        with forward.layer(0) as layer:
            before, first = layer(HIDDEN, IDS[:1]), layer.get(name)
            original = first.clone()
            layer.set(name, torch.zeros_like(first))
            second = layer.get(name)
            assert not torch.equal(layer(HIDDEN, IDS[:1]), before)
            layer.set(name, first)
            assert torch.equal(layer(HIDDEN, IDS[:1]), before)
            assert torch.equal(first, original)
            assert not second.any()
