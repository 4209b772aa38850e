"""Layer by layer equals the whole model, bit for bit; taps by tracing; names on disk."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantcli.errors import CheckpointError, NumericsError, UnsupportedError
from quantcli.formats import open_checkpoint
from quantcli.forward import Forward, tokenizer
from quantcli.planning.arrange import open_forward
from quantcli.walk.evaluate import perplexity
from support import families
from support.tiny_models import TinyLlama
from support.whole_models import inputs_of

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 97,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PLAIN: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 8},
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 16},
    "phi3": {},
}
ODD: dict[str, dict[str, Any]] = {
    "gpt_neox": {},  # the head has another name on disk
    "lfm3": {},  # attention's gate has another name on disk
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_inner": 128},  # learned positions, no nn.Linear in the layers
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 32},  # an embedding narrower than the layers
    "gemma3_text": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},  # two rotary tables
    "gemma4_text": {"sliding_window": 8, "vocab_size_per_layer_input": 97},  # each layer is given an embedding of the tokens of its own
    "olmo_hybrid": {},  # three convolutions on disk are one in memory
}
EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}

SaveModel = Callable[..., Path]


@pytest.fixture
def save_model(tmp_path: Path) -> SaveModel:
    """``save_model("llama", dtype=torch.float32, **config) -> folder`` with a random model, saved by transformers itself."""

    def save(model_type: str, *, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
        defaults = SMALL | (PLAIN | ODD | EXPERTS).get(model_type, {})
        config = transformers.AutoConfig.for_model(model_type, **{**defaults, **options})
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        for name, parameter in model.named_parameters():
            parameter.data.normal_(0, 0.3).add_("norm" in name)
        folder = tmp_path / model_type
        model.save_pretrained(folder)
        return folder

    return save


@contextmanager
def opened(folder: Path, **options: Any) -> Iterator[Forward]:
    with open_checkpoint(str(folder)) as checkpoint:
        yield open_forward(checkpoint, **options)


def layer_by_layer(forward: Forward, ids: Tensor) -> Tensor:
    hidden = forward.embed(ids)
    for i in range(len(forward.layers)):
        with forward.layer(i) as layer:
            hidden = layer(hidden, ids)
    return forward.head(hidden)


def whole_model(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager")


def logits_of(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def random_ids(batch: int = 2, length: int = 24) -> Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(1))


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Damage the tensors of a folder with one shard."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("model_type", PLAIN)
def test_logits_equal_those_of_the_whole_model_bit_for_bit(save_model: SaveModel, model_type: str, dtype: torch.dtype, tied: bool) -> None:
    folder = save_model(model_type, dtype=dtype, tie_word_embeddings=tied)
    ids = random_ids()  # 24 tokens: three times the sliding windows
    with opened(folder, dtype=dtype) as forward:
        logits = layer_by_layer(forward, ids)
    expected = logits_of(whole_model(folder, dtype), ids)
    assert expected.std() > 0.01
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("model_type", ODD | EXPERTS)
def test_logits_equal_where_names_positions_or_arguments_are_unusual(save_model: SaveModel, model_type: str) -> None:
    folder = save_model(model_type)
    with opened(folder) as forward:
        logits = layer_by_layer(forward, random_ids())
        assert forward.unused == ()
    assert torch.equal(logits, logits_of(whole_model(folder), random_ids()))


def test_a_second_batch_of_another_shape_and_other_tokens_equals_too(save_model: SaveModel) -> None:
    folder = save_model("gemma2")
    model = whole_model(folder)
    with opened(folder) as forward:
        for shape in [(3, 20), (1, 9), (2, 5), (3, 20)]:
            ids = random_ids(*shape).flip(1)
            assert torch.equal(layer_by_layer(forward, ids), logits_of(model, ids))


def test_a_bfloat16_checkpoint_runs_in_float32_as_transformers_runs_it(tiny_llama: TinyLlama) -> None:
    folder = tiny_llama(hidden=64, intermediate=128, shards=3)
    ids = random_ids()
    with opened(folder) as forward:
        assert torch.equal(layer_by_layer(forward, ids), logits_of(whole_model(folder), ids))


def test_a_base_models_names_without_their_prefix_are_found(save_model: SaveModel) -> None:
    folder = save_model("llama", tie_word_embeddings=True)
    expected = logits_of(whole_model(folder), random_ids())

    def strip(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    rewrite(folder, strip)
    with opened(folder) as forward:
        assert forward.layers[1] == "layers.1"
        assert forward.layer_tensors(1)[0].startswith("layers.1.")
        assert torch.equal(layer_by_layer(forward, random_ids()), expected)


def test_the_embedding_is_found_under_the_heads_name_when_tied(save_model: SaveModel) -> None:
    folder = save_model("llama", tie_word_embeddings=True)
    expected = logits_of(whole_model(folder), random_ids())
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": tensors.pop("model.embed_tokens.weight")}))
    with opened(folder) as forward:
        assert torch.equal(layer_by_layer(forward, random_ids()), expected)


def test_taps_of_llama_are_the_inputs_of_qkv_o_gate_up_and_down(tiny_llama: TinyLlama) -> None:
    with opened(tiny_llama(hidden=64, intermediate=128, bias=True)) as forward:
        taps = {name: tap for name, tap in forward.taps.items() if name.startswith("model.layers.1.")}
    attention, mlp = "model.layers.1.self_attn.", "model.layers.1.mlp."
    assert taps == {
        f"{attention}q_proj.weight": f"{attention}q_proj",
        f"{attention}k_proj.weight": f"{attention}q_proj",
        f"{attention}v_proj.weight": f"{attention}q_proj",
        f"{attention}o_proj.weight": f"{attention}o_proj",
        f"{mlp}gate_proj.weight": f"{mlp}gate_proj",
        f"{mlp}up_proj.weight": f"{mlp}gate_proj",
        f"{mlp}down_proj.weight": f"{mlp}down_proj",
    }


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("gemma2", {"q_proj": "q_proj", "k_proj": "q_proj", "v_proj": "q_proj", "gate_proj": "gate_proj", "up_proj": "gate_proj"}),
        ("phi3", {"qkv_proj": "qkv_proj", "o_proj": "o_proj", "gate_up_proj": "gate_up_proj", "down_proj": "down_proj"}),
        ("gpt_neox", {"query_key_value": "query_key_value", "dense_h_to_4h": "dense_h_to_4h"}),
        ("phi", {"q_proj": "q_proj", "k_proj": "q_proj", "v_proj": "q_proj", "fc1": "q_proj"}),  # attention and MLP read one norm
    ],
)
def test_taps_are_the_shared_inputs_whatever_the_architecture(save_model: SaveModel, model_type: str, expected: dict[str, str]) -> None:
    with opened(save_model(model_type)) as forward:
        short = {name.split(".")[-2]: tap.split(".")[-1] for name, tap in forward.taps.items()}
    assert short.items() >= expected.items()


def test_each_weight_of_a_tap_reads_exactly_what_the_tap_reports(save_model: SaveModel) -> None:
    """The whole model with a hook on every linear is the judge."""
    folder = save_model("gemma2")
    ids = random_ids()
    inputs = {f"{name}.weight": X for name, X in inputs_of(whole_model(folder), ids).items()}
    seen: dict[str, Tensor] = {}
    with opened(folder) as forward:
        hidden = forward.embed(ids)
        for i in range(len(forward.layers)):
            with forward.layer(i) as layer:
                hidden = layer.observe(hidden, ids, lambda tap, X: seen.update({tap: X.clone()}))
        forward.observe_head(hidden, lambda X: seen.update({"lm_head": X}))
        taps = forward.taps | {"lm_head.weight": "lm_head"}
    assert taps.keys() == inputs.keys()
    for name, tap in taps.items():
        assert torch.equal(seen[tap], inputs[name]), name


@pytest.mark.parametrize("tied", [False, True])
def test_what_a_linear_reads_can_be_changed_for_it_alone(save_model: SaveModel, tied: bool) -> None:
    folder = save_model("llama", tie_word_embeddings=tied)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.randint(2, 97, (2, 9))
    with open_checkpoint(str(folder)) as checkpoint:
        forward = open_forward(checkpoint)
        head = "model.embed_tokens.weight" if tied else "lm_head.weight"
        for name, factor in (("model.layers.1.self_attn.k_proj.weight", 0.5), ("model.layers.2.mlp.down_proj.weight", 3.0), (head, 2.0)):
            assert forward.on_read(name, partial(torch.mul, factor))
            module = name.removesuffix(".weight") if "layers" in name else "lm_head"
            model.get_submodule(module).register_forward_pre_hook(lambda _module, inputs, factor=factor: (inputs[0] * factor,))
        assert not forward.on_read("model.layers.1.mlp.no_such.weight", torch.neg)
        hidden = forward.embed(ids)
        for i in range(len(forward.layers)):
            with forward.layer(i) as layer:
                hidden = layer(hidden, ids)
        with torch.no_grad():
            assert torch.equal(forward.head(hidden), model(input_ids=ids).logits)


@pytest.mark.parametrize("model_type", EXPERTS)
def test_only_routers_have_no_tap_and_are_listed(save_model: SaveModel, model_type: str) -> None:
    with opened(save_model(model_type)) as forward:
        assert [name.split(".")[-2] for name in forward.untapped] == ["gate"] * 3
        matrices = {n for i in range(3) for n in forward.layer_tensors(i) if len(forward.checkpoint.specs[n].shape) == 2}
        assert set(forward.taps) == matrices - set(forward.untapped)


def test_layers_and_their_tensors_have_their_names_on_disk(save_model: SaveModel) -> None:
    with opened(save_model("mixtral")) as forward:
        assert forward.layers == ("model.layers.0", "model.layers.1", "model.layers.2")
        names = forward.layer_tensors(1)
        assert "model.layers.1.block_sparse_moe.experts.3.w2.weight" in names
        with forward.layer(1) as layer:
            assert set(layer.tensors) == set(names)
            for name in names:
                assert torch.equal(layer.tensors[name], forward.checkpoint.read(name))


def test_a_layers_weights_are_gone_when_its_context_ends(save_model: SaveModel) -> None:
    with opened(save_model("llama")) as forward:
        layer_by_layer(forward, random_ids())
        with forward.layer(0):
            pass
        held = {name for name, p in forward._model.named_parameters() if p.device.type != "meta" and p.untyped_storage().nbytes() > 8}
    assert held == {"model.norm.weight"}


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.layers.1.self_attn.k_proj.weight"])
def test_a_weight_that_was_set_is_the_one_that_runs(save_model: SaveModel, name: str) -> None:
    folder = save_model("llama")
    ids, model = random_ids(), whole_model(folder)
    changed = torch.randn(model.get_parameter(name).shape, generator=torch.Generator().manual_seed(2))
    model.get_parameter(name).data.copy_(changed)
    with opened(folder) as forward:
        hidden = forward.embed(ids)
        for i in range(3):
            with forward.layer(i) as layer:
                if name in layer.tensors:
                    layer.set(name, changed)
                    assert torch.equal(layer.tensors[name], changed)
                hidden = layer(hidden, ids)
        assert torch.equal(forward.head(hidden), logits_of(model, ids))


def test_an_expert_that_was_set_is_the_one_that_runs(save_model: SaveModel) -> None:
    folder = save_model("mixtral")
    name = "model.layers.0.block_sparse_moe.experts.2.w3.weight"
    ids = random_ids()
    with opened(folder) as forward, forward.layer(0) as layer:
        changed = torch.zeros_like(layer.tensors[name])
        layer.set(name, changed)
        got = layer(torch.ones(2, 24, 64), ids)
    rewrite(folder, lambda tensors: tensors[name].zero_())
    with opened(folder) as forward, forward.layer(0) as layer:
        assert torch.equal(got, layer(torch.ones(2, 24, 64), ids))


def test_a_missing_tensor_is_an_error_that_names_it(save_model: SaveModel) -> None:
    folder = save_model("llama")
    rewrite(folder, lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight"))
    with pytest.raises(CheckpointError, match=re.escape("model.layers.2.mlp.up_proj.weight (shape [128, 64])")), opened(folder):
        pass


def test_a_tensor_of_the_wrong_shape_is_an_error_with_both_shapes(save_model: SaveModel) -> None:
    folder = save_model("llama")
    rewrite(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.k_proj.weight": torch.zeros(48, 64)}))
    with (
        pytest.raises(CheckpointError, match=re.escape("self_attn.k_proj.weight has shape [48, 64], config.json asks for [32, 64]")),
        opened(folder),
    ):
        pass


def test_a_missing_expert_is_an_error(save_model: SaveModel) -> None:
    folder = save_model("mixtral")
    rewrite(folder, lambda tensors: tensors.pop("model.layers.1.block_sparse_moe.experts.2.w1.weight"))
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts"), opened(folder) as forward, forward.layer(1):
        pass


def test_tensors_that_the_model_has_no_place_for_are_listed(save_model: SaveModel) -> None:
    folder = save_model("llama")
    rewrite(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}))
    with opened(folder) as forward:
        assert forward.unused == ("model.layers.0.self_attn.rotary_emb.inv_freq",)


def test_an_unknown_architecture_is_unsupported_and_its_code_is_not_run(save_model: SaveModel) -> None:
    folder = save_model("llama")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own-invention", "auto_map": {"AutoModelForCausalLM": "modeling_own.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_own.py").write_text("raise SystemExit('code of the model was run')\n")
    with pytest.raises(UnsupportedError, match=r"own-invention.*never run"), opened(folder):
        pass


def test_a_config_of_another_kind_of_model_is_refused_for_the_tensors_it_asks_for(save_model: SaveModel) -> None:
    folder = save_model("llama")
    (folder / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(CheckpointError, match=r"ViTModel expects embeddings\.cls_token"), opened(folder):
        pass


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": -64},
        {"num_attention_heads": 0},
        {"num_hidden_layers": 10**9},
        {"hidden_act": "own-invention"},
        {"head_dim": "wide"},
        {"vocab_size": 10**15},
    ],
)
def test_a_config_of_impossible_values_is_an_error_of_the_checkpoint(save_model: SaveModel, change: dict[str, Any]) -> None:
    folder = save_model("llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=re.escape(str(folder))), opened(folder):
        pass


@pytest.mark.parametrize("word", ["output_router_logits", "output_hidden_states", "output_attentions"])
def test_what_a_config_asks_for_beside_the_result_is_not_gathered(tmp_path: Path, word: str) -> None:
    folder = families.make("gpt-oss", tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {word: True}))
    ids = torch.arange(16)[None]
    with open_checkpoint(str(folder)) as source:
        assert math.isfinite(perplexity(source, ids).perplexity or math.nan)


def test_infinite_hidden_states_are_an_error_that_names_the_layer(save_model: SaveModel) -> None:
    folder = save_model("llama")
    rewrite(folder, lambda tensors: tensors["model.layers.1.mlp.down_proj.weight"].fill_(float("inf")))
    with pytest.raises(NumericsError, match=r"model\.layers\.1: "), opened(folder) as forward:
        layer_by_layer(forward, random_ids())


def test_the_tokenizer_is_the_checkpoints_own(tiny_llama: TinyLlama) -> None:
    with open_checkpoint(str(tiny_llama(hidden=64, intermediate=128))) as checkpoint:
        words = tokenizer(checkpoint)
    assert words.decode(words("some words of text")["input_ids"]) == "some words of text"


def test_a_folder_without_tokenizer_is_an_error(save_model: SaveModel) -> None:
    with open_checkpoint(str(save_model("llama"))) as checkpoint, pytest.raises(CheckpointError, match="no tokenizer"):
        tokenizer(checkpoint)


WALK = """
import sys
from pathlib import Path
import torch
from quantcli import heap
from quantcli.planning.arrange import open_forward
from quantcli.formats import open_checkpoint

torch.set_num_threads(1)
def peak_mb(): return heap.peak_bytes() / (1 << 20)
def walk(folder):
    ids = torch.zeros(1, 8, dtype=torch.int64)
    with open_checkpoint(folder) as checkpoint:
        forward = open_forward(checkpoint)
        traced = peak_mb()
        hidden = forward.embed(ids)
        for i in range(len(forward.layers)):
            with forward.layer(i) as layer:
                hidden = layer(hidden, ids)
        forward.head(hidden)
    return traced
walk(sys.argv[1])  # imports, and what libraries keep for themselves
before = peak_mb()
traced = walk(sys.argv[2])
print(traced - before, peak_mb() - before)
"""


def test_a_walk_holds_one_layer_at_a_time_and_a_trace_none(tiny_llama: TinyLlama) -> None:
    small = tiny_llama(hidden=64, intermediate=128)
    large = tiny_llama(hidden=1024, intermediate=4096, layers=8, kv_heads=4, dtype="bfloat16", shards=8)  # 64 MiB a layer in float32
    run = subprocess.run([sys.executable, "-c", WALK, str(small), str(large)], check=True, capture_output=True, text=True)
    traced, walked = map(float, run.stdout.split())
    assert traced < 16
    assert walked < 64 + 8 + 16  # a layer, its largest tensor as it is read, and what else there is
