"""Models that have learned a number of positions, or made a table of them, are found without their names, and never run beyond."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer

import quantcli as qc
from quantcli.errors import RecipeError, UnsupportedError
from quantcli.formats import open_checkpoint
from quantcli.forward.positions import rows_of
from quantcli.forward.skeleton import build
from quantcli.forward.stack import check_shape
from quantcli.planning.arrange import open_forward
from quantcli.statistics.stats_file import StatsFile
from support.tiny_models import TinyLlama, write_tokenizer

OPT = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "word_embed_proj_dim": 32}
BERT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "is_decoder": True}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 48, "bos_token_id": 0, "eos_token_id": 1}
STREAMS = {"hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 32}
STREAMS |= {"q_lora_rank": 32, "o_lora_rank": 16, "o_groups": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "vocab_size": 512}
STREAMS |= {"index_n_heads": 2, "index_head_dim": 32, "index_topk": 8, "sliding_window": 16, "qk_rope_head_dim": 16}
STREAMS |= {"partial_rotary_factor": 0.5, "max_position_embeddings": 256}
LLAMA = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 48}


@pytest.mark.parametrize(
    ("model_type", "config", "rows"),
    [
        ("opt", {**OPT, "max_position_embeddings": 48}, 48),  # whose table has two rows before the first position
        ("gpt2", GPT, 48),
        ("gptj", {**GPT, "rotary_dim": 8}, 48),  # sines and cosines, in every layer
        ("bert", {**BERT, "max_position_embeddings": 48}, 48),
        ("roberta", {**BERT, "max_position_embeddings": 50, "pad_token_id": 1}, 48),
        ("llama", LLAMA, None),
        ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 2, "seq_length": 48}, None),
    ],
)
def test_a_table_of_positions_is_found_whatever_it_is_called(model_type: str, config: dict[str, Any], rows: int | None) -> None:
    assert rows_of(build({"model_type": model_type, "vocab_size": 64, **config}, torch.float32, "here")) == rows


def saved(folder: Path, tokenizer: Tokenizer, config: Any) -> Path:
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    write_tokenizer(folder, tokenizer)
    return folder


@pytest.fixture
def opt(tmp_path: Path, tiny_tokenizer: Tokenizer) -> Path:
    return saved(tmp_path / "opt", tiny_tokenizer, transformers.OPTConfig(**OPT, vocab_size=512, max_position_embeddings=48))


@pytest.fixture
def gpt2(tmp_path: Path, tiny_tokenizer: Tokenizer) -> Path:
    return saved(tmp_path / "gpt2", tiny_tokenizer, transformers.GPT2Config(**GPT, vocab_size=512))


def test_windows_are_cut_to_the_positions_by_every_verb_and_by_default(opt: Path, tmp_path: Path) -> None:
    told: list[Any] = []
    measured = qc.calibrate(opt, tmp_path / "stats.safetensors", samples=4, device="cpu", on_event=told.append)
    assert measured.n_tokens == 4 * 48
    run = qc.quantize(opt, tmp_path / "fp8", "fp8-static", device="cpu", on_event=told.append)
    assert run.finished is not None
    assert qc.evaluate(opt, samples=2, seq_len=100, device="cpu", on_event=told.append).seq_len == 48
    cut = [event.text for event in told if isinstance(event, qc.Note) and event.is_warning and "are cut to 48 tokens" in event.text]
    assert [text.split("; ")[1] for text in cut] == ["2048 were asked for", "2048 were asked for", "100 were asked for"]


def test_a_rotary_model_is_run_beyond_what_it_was_made_for_with_a_warning(tiny_llama: TinyLlama) -> None:
    told: list[Any] = []
    scores = qc.evaluate(tiny_llama(hidden=64, intermediate=64, layers=1), samples=1, seq_len=2060, device="cpu", on_event=told.append)
    assert scores.seq_len == 2060
    assert any(isinstance(event, qc.Note) and "longer than the 2048 this model was made for" in event.text for event in told)


def test_windows_given_by_hand_beyond_the_positions_are_an_error(opt: Path) -> None:
    with open_checkpoint(str(opt)) as checkpoint:
        forward = open_forward(checkpoint)
        forward.embed(torch.zeros(1, 48, dtype=torch.int64))
        with pytest.raises(RecipeError, match="windows of 49 tokens are longer than the 48 positions"):
            forward.embed(torch.zeros(1, 49, dtype=torch.int64))


def test_linears_stored_the_other_way_round_are_measured_too(gpt2: Path, tmp_path: Path) -> None:
    measured = qc.calibrate(gpt2, tmp_path / "stats.safetensors", samples=4, seq_len=48, device="cpu")
    stats = StatsFile(tmp_path / "stats.safetensors")
    linears = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert {tap for tap in stats if "cache" not in tap} == {f"transformer.h.{i}.{name}" for i in range(2) for name in linears} | {"lm_head"}
    assert measured.taps == 9
    assert measured.tokens_per_input["transformer.h.0.mlp.c_proj"] == 4 * 48 / 128
    ids, X = torch.arange(40)[None], {}
    model = transformers.AutoModelForCausalLM.from_pretrained(gpt2, dtype=torch.float32)
    model.transformer.h[1].mlp.c_proj.register_forward_pre_hook(lambda _m, args: X.update(X=args[0]))
    model(input_ids=ids)
    with open_checkpoint(str(gpt2)) as checkpoint:
        forward, seen = open_forward(checkpoint), []
        hidden = forward.embed(ids)
        for i in range(2):
            with forward.layer(i) as layer:
                layer.inputs(hidden, ids, lambda tap, x: seen.append(x.clone()), ["transformer.h.1.mlp.c_proj"])
                hidden = layer(hidden, ids)
    torch.testing.assert_close(seen[0], X["X"][0])


def test_hidden_states_of_several_streams_are_refused_by_name() -> None:
    check_shape("M", torch.zeros(1, 2, 8))
    with pytest.raises(UnsupportedError, match=r"M has hidden states of 4 dimensions, \[1, 2, 4, 8\]"):
        check_shape("M", torch.zeros(1, 2, 4, 8))


def test_a_model_of_several_residual_streams_is_refused_before_it_is_run(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    folder = saved(tmp_path / "v4", tiny_tokenizer, transformers.AutoConfig.for_model("deepseek_v4", **STREAMS))
    with pytest.raises(UnsupportedError, match="hidden states of 4 dimensions"):
        qc.calibrate(folder, tmp_path / "stats.safetensors", samples=1, seq_len=16, device="cpu")
