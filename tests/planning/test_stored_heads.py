"""A head that config.json ties to the embedding and the file stores all the same: its numbers decide, for every verb and format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import quantcli as qc
from quantcli.checkpoint import heads
from quantcli.formats import open_checkpoint
from quantcli.planning.arrange import arrange, open_forward
from quantcli.recipe import PassSpec
from quantcli.walk.evaluate import compare
from support.runs import run
from support.tiny_models import TinyLlama

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
IDS = torch.arange(64).view(2, 32)


def with_head(folder: Path, change: Any) -> Path:
    """The tied model in ``folder`` with a stored head: what ``change`` makes of the embedding."""
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {HEAD: change(weights[EMBEDDING]).contiguous()}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def rolled(embedding: Tensor) -> Tensor:
    return torch.roll(embedding, 1, 0)


@pytest.fixture
def other(tiny_llama: TinyLlama) -> Path:
    return with_head(tiny_llama(hidden=64, intermediate=128, layers=1, tied=True), rolled)


@pytest.fixture
def same(tiny_llama: TinyLlama) -> Path:
    return with_head(tiny_llama(hidden=64, intermediate=128, layers=1, tied=True), torch.clone)


def planned_notes(events: list[Any]) -> list[str]:
    return [note for note in events[0].notes if HEAD in note]


@pytest.mark.parametrize("recipe", ["fp8-dynamic", "nf4", "hf", "q8_0"])
def test_a_head_that_differs_is_kept_and_the_output_is_untied(other: Path, tmp_path: Path, recipe: str) -> None:
    target = tmp_path / ("out.gguf" if recipe == "q8_0" else "out")
    plain = qc.Recipe("copy", "hf", (PassSpec("rtn"),)) if recipe == "hf" else recipe
    events = run(other, target, plain)
    assert len(planned_notes(events)) == 1
    assert "holds other numbers than model.embed_tokens.weight" in planned_notes(events)[0]
    with open_checkpoint(str(target)) as output, open_checkpoint(str(other)) as source:
        assert output.config["tie_word_embeddings"] is False
        assert torch.allclose(output.read(HEAD).float(), source.read(HEAD).float(), atol=0.05)
        assert (compare(output, source, IDS).top1_agreement or 0.0) > 0.9
    if recipe == "q8_0":
        assert "output.weight" in {tensor.name for tensor in gguf.GGUFReader(target).tensors}


@pytest.mark.parametrize("recipe", ["fp8-dynamic", "q8_0"])
def test_a_head_that_repeats_the_embedding_stays_tied(same: Path, tmp_path: Path, recipe: str) -> None:
    target = tmp_path / ("out.gguf" if recipe == "q8_0" else "out")
    assert planned_notes(run(same, target, recipe)) == []
    with open_checkpoint(str(target)) as output:
        assert output.config["tie_word_embeddings"] is True
    if recipe == "q8_0":
        assert "output.weight" not in {tensor.name for tensor in gguf.GGUFReader(target).tensors}


@pytest.mark.parametrize("row", [0, 300, 511])
def test_one_other_number_is_found_a_few_rows_at_a_time(tiny_llama: TinyLlama, monkeypatch: pytest.MonkeyPatch, row: int) -> None:
    monkeypatch.setattr(heads, "MAX_COMPARED_BYTES", 4 * 64 * 7)  # seven rows: the last part is shorter

    def changed(embedding: Tensor) -> Tensor:
        head = embedding.clone()
        head[row, 5] += 1
        return head

    folder = with_head(tiny_llama(hidden=64, intermediate=128, layers=1, tied=True), changed)
    with open_checkpoint(str(folder)) as source:
        assert heads.own_head(source) == (HEAD, EMBEDDING)


def test_the_model_that_is_run_is_the_one_that_transformers_loads(other: Path) -> None:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32, trust_remote_code=False).eval()
    with open_checkpoint(str(other)) as source, torch.no_grad():
        forward = open_forward(source)
        assert forward.head_weight == HEAD
        assert torch.equal(theirs.lm_head.weight, source.read(HEAD).float())
        with forward.layer(0) as layer:
            hidden = layer(forward.embed(IDS), IDS)
        ours = forward.head(hidden)
        expected = theirs(input_ids=IDS).logits
    assert torch.allclose(ours, expected, atol=1e-4)


def test_a_text_model_inside_another_is_untied_too(other: Path) -> None:
    config = json.loads((other / "config.json").read_text())
    tied = config.pop("tie_word_embeddings")
    (other / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": tied, "text_config": config}))
    with qc.open(other) as checkpoint:
        shown = arrange(checkpoint, qc.Recipe("copy", "hf", (PassSpec("rtn"),))).source.config
    assert (shown["tie_word_embeddings"], shown["text_config"]["tie_word_embeddings"]) == (False, False)


def test_every_verb_says_which_head_counts(other: Path, tmp_path: Path) -> None:
    told: list[Any] = []
    text = tmp_path / "text.txt"
    text.write_text("The tokens of a text, one after the other. " * 200)
    qc.evaluate(other, data=str(text), samples=1, seq_len=32, device="cpu", on_event=told.append)
    stats = tmp_path / "stats.safetensors"
    qc.calibrate(other, stats, data=str(text), samples=1, seq_len=32, device="cpu", on_event=told.append)
    notes = [event.text for event in told if isinstance(event, qc.Note) and HEAD in event.text]
    assert len(notes) == 2
