"""Token windows: their shape, their order, their shares of several datasets, and the texts that they are cut from by default."""

from __future__ import annotations

import gc
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from quantcli.errors import CheckpointError, RecipeError
from quantcli.text.documents import Rows
from quantcli.text.texts import (
    default_eval_text,
    default_text,
    eval_windows,
    eval_windows_of,
    sha256,
    windows,
    windows_and_held_out,
    windows_of,
)
from support.tiny_models import BOS, EOS

DOCUMENTS = [f"document number {i} speaks of {'many ' * i}things" for i in range(30)]


@pytest.fixture(scope="module")
def plain(tiny_tokenizer: Tokenizer) -> Any:
    """A tokenizer that adds nothing by itself."""
    return PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer, bos_token=BOS, eos_token=EOS)


@pytest.fixture(scope="module")
def with_bos(tiny_tokenizer: Tokenizer) -> Any:
    """A tokenizer that puts BOS before a text, as Llama's does."""
    copy = Tokenizer.from_str(tiny_tokenizer.to_str())
    copy.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=copy, bos_token=BOS, eos_token=EOS)


def tokens_of(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_windows_have_the_asked_shape_and_end_documents_with_the_separator(plain: Any) -> None:
    ids = windows(DOCUMENTS, plain, n_samples=8, seq_len=32)
    assert ids.shape == (8, 32)
    assert ids.dtype == torch.int64
    assert (ids == plain.eos_token_id).any()
    assert not (ids == plain.bos_token_id).any()


def test_all_windows_together_are_the_joined_documents(plain: Any) -> None:
    text = "one long text " * 50
    ids = windows([text], plain, n_samples=1000, seq_len=16)
    tokens = tokens_of(plain, text)
    expected = {tuple(tokens[i : i + 16]) for i in range(0, len(tokens) - 15, 16)}
    assert {tuple(row) for row in ids.tolist()} == expected
    assert len(ids) == len(tokens) // 16


def test_the_seed_draws_documents_and_windows_and_repeats_itself(plain: Any) -> None:
    a, again, b = (windows(DOCUMENTS, plain, n_samples=4, seq_len=32, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(a, again)
    assert not torch.equal(a, b)


def test_windows_begin_with_bos_where_the_tokenizer_adds_it(with_bos: Any) -> None:
    ids = windows(DOCUMENTS, with_bos, n_samples=8, seq_len=32)
    assert (ids[:, 0] == with_bos.bos_token_id).all()
    assert not (ids[:, 1:] == with_bos.bos_token_id).any()


def test_windows_of_an_encoder_begin_with_cls_and_end_with_sep(tiny_tokenizer: Tokenizer) -> None:
    copy = Tokenizer.from_str(tiny_tokenizer.to_str())
    copy.post_processor = TemplateProcessing(single=f"{BOS} $A {EOS}", special_tokens=[(BOS, 0), (EOS, 1)])
    encoders = PreTrainedTokenizerFast(tokenizer_object=copy, cls_token=BOS, sep_token=EOS)
    for ids in (
        windows(DOCUMENTS, encoders, n_samples=8, seq_len=32),
        eval_windows(" ".join(DOCUMENTS), encoders, n_samples=8, seq_len=32),
    ):
        assert ids.shape[1] == 32
        assert (ids[:, 0] == 0).all()
        assert (ids[:, -1] == 1).all()
        assert not (ids[:, 1:] == 0).any()


def test_a_text_shorter_than_one_window_is_one_shorter_window(plain: Any) -> None:
    ids = windows(["short text"], plain, n_samples=4, seq_len=512)
    assert ids.tolist() == [tokens_of(plain, "short text")]


def test_documents_are_read_only_as_far_as_they_are_needed(plain: Any) -> None:
    class Counting:
        bos_token_id, eos_token_id, cls_token_id, sep_token_id = plain.bos_token_id, plain.eos_token_id, None, None
        n_texts = 0

        def __call__(self, text: str, **options: Any) -> Any:
            self.n_texts += 1
            return plain(text, **options)

    counting = Counting()
    windows(["some words " * 100] * 1000, counting, n_samples=4, seq_len=32)
    assert counting.n_texts <= 3


def test_eval_windows_are_consecutive_and_do_not_overlap(plain: Any) -> None:
    text = " ".join(DOCUMENTS)
    tokens = tokens_of(plain, text)
    ids = eval_windows(text, plain, n_samples=5, seq_len=32)
    assert ids.flatten().tolist() == tokens[:160]
    assert len(eval_windows(text, plain, n_samples=None, seq_len=32)) == len(tokens) // 32


def test_eval_windows_with_bos_hold_one_token_of_text_less(with_bos: Any) -> None:
    text = " ".join(DOCUMENTS)
    ids = eval_windows(text, with_bos, n_samples=3, seq_len=32)
    assert ids[:, 1:].flatten().tolist() == tokens_of(with_bos, text)[:93]
    assert (ids[:, 0] == with_bos.bos_token_id).all()


@pytest.mark.parametrize("texts", [[], [""], ["", ""]])
def test_an_empty_text_is_an_error(plain: Any, texts: list[str]) -> None:
    with pytest.raises(RecipeError, match="empty"):
        windows(texts, plain, n_samples=4, seq_len=32)


def test_the_fingerprint_follows_ids_and_shape() -> None:
    ids = torch.arange(24).view(4, 6)
    assert sha256(ids) == sha256(ids.clone().int())
    assert len({sha256(ids), sha256(ids + 1), sha256(ids.view(6, 4)), sha256(ids.flip(0))}) == 4


def test_the_default_text_is_long_and_is_noted(plain: Any) -> None:
    notes: list[str] = []
    ids = windows_of([], plain, 16, 128, note=notes.append)
    assert ids.shape == (16, 128)
    assert len(default_text()) > 300_000
    assert len(notes) == 1
    assert "own domain" in notes[0]


def test_the_default_text_to_measure_on_is_not_the_one_to_calibrate_on() -> None:
    seen, measured = default_text(), default_eval_text()
    assert len(measured) > 300_000
    passages = [p for p in measured.split("\n\n") if len(p) > 80]
    assert sum(p in seen for p in passages) < 0.01 * len(passages)


def test_fewer_windows_than_asked_are_noted(plain: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("few words " * 20)
    notes: list[str] = []
    ids = windows_of([str(tmp_path / "a.txt")], plain, 100, 16, note=notes.append)
    assert 1 <= len(ids) < 100
    assert f"{len(ids)} windows of 16 tokens; 100 of 16" in notes[0]


def test_weights_are_shares_of_the_windows(plain: Any, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f" {name}" * 4000)
    ids = windows_of([f"{tmp_path}/a.txt=3", f"{tmp_path}/b.txt"], plain, 20, 32)
    (a,), (b,) = (set(tokens_of(plain, f" {name} {name}")) for name in "ab")
    assert ids.shape == (20, 32)
    assert [int((ids == token).all(1).sum()) for token in (a, b)] == [15, 5]


def test_a_dataset_too_short_for_its_share_of_a_mix_is_an_error(plain: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("word " * 4000)
    (tmp_path / "b.txt").write_text("short")
    with pytest.raises(RecipeError, match=r"b\.txt has \d+ tokens"):
        windows_of([f"{tmp_path}/a.txt", f"{tmp_path}/b.txt"], plain, 20, 32)


def test_a_mix_is_the_same_for_the_same_seed_and_its_hash_tells_another(plain: Any, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(" ".join(f"{name}{i}" for i in range(4000)))
    words = [f"{tmp_path}/a.txt=3", f"{tmp_path}/b.txt"]
    first, again, other = (sha256(windows_of(words, plain, 20, 32, seed)) for seed in (1, 1, 2))
    assert first == again != other
    assert sha256(windows_of([words[0][:-1] + "1", words[1]], plain, 20, 32, 1)) != first


def test_the_text_to_measure_on_is_read_and_tokenized_only_as_far_as_it_is_needed(plain: Any, tmp_path: Path) -> None:
    rows = [f"row {i} has words of its own, such as {i * i}" for i in range(5000)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in rows))
    (tmp_path / "b.txt").write_text("\n".join(rows))
    for file, joined in (("a.jsonl", "\n\n".join(rows)), ("b.txt", "\n".join(rows))):
        expected = eval_windows(joined, plain, n_samples=None, seq_len=64)
        for n in (1, 7, len(expected), len(expected) + 5):
            assert torch.equal(eval_windows_of([f"{tmp_path}/{file}"], plain, n, 64), expected[:n])


def test_several_texts_to_measure_on_follow_one_another(plain: Any, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"text {name} " * 50)
    ids = eval_windows_of([f"{tmp_path}/a.txt", f"{tmp_path}/b.txt"], plain, 1, 10_000)
    assert ids[0].tolist() == tokens_of(plain, "text a " * 50 + "\n\n" + "text b " * 50)


def test_the_default_windows_to_measure_on_take_a_moment(plain: Any) -> None:
    """0.33 s of an idle machine's processor. The best of three, and thrice that: neighbours on the machine slow a processor down, too.

    The collector's walks over what other tests left in this process are none of it."""
    notes: list[str] = []
    seconds = []
    gc.collect()
    gc.freeze()
    try:
        for _ in range(3):
            started = time.process_time()
            ids = eval_windows_of([], plain, 64, 512, note=notes.append)
            seconds.append(time.process_time() - started)
    finally:
        gc.unfreeze()
    assert min(seconds) < 1
    assert ids.shape == (64, 512)
    assert "docstrings" in notes[0]


CHAT = "{% for m in messages %}<|begin_of_text|>{{ m['role'] }}: {{ m['content'] }}<|end_of_text|>{% endfor %}"


def write_chats(path: Path, n: int = 40) -> str:
    rows = [{"messages": [{"role": "user", "content": f"ask {i}"}, {"role": "assistant", "content": f"answer {i}"}]} for i in range(n)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_conversations_go_through_the_chat_template(with_bos: Any, tmp_path: Path) -> None:
    with_bos.chat_template = CHAT
    ids = windows_of([write_chats(tmp_path / "a.jsonl", 3)], with_bos, 1, 500)
    text = with_bos.decode(ids[0])
    for i in range(3):
        assert f"user: ask {i}<|end_of_text|><|begin_of_text|>assistant: answer {i}" in text
    assert "<|end_of_text|><|end_of_text|>" not in text, "the template ended its turn, so no separator is added"
    assert text.count("<|begin_of_text|>") == 4, "one before the window and one inside each conversation: those at their beginnings merge"


def test_a_model_without_a_template_gets_plain_text_and_a_note(plain: Any, tmp_path: Path) -> None:
    notes: list[str] = []
    ids = windows_of([write_chats(tmp_path / "a.jsonl", 3)], plain, 1, 500, note=notes.append)
    assert "ask 1\nanswer 1<|end_of_text|>" in plain.decode(ids[0])
    assert sum("no chat template" in note for note in notes) == 1


def test_a_conversation_that_the_template_refuses_is_plain_text_and_is_noted_once(with_bos: Any, tmp_path: Path) -> None:
    with_bos.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ raise_exception('users are not served') }}{% endif %}{% endfor %}"
    )
    notes: list[str] = []
    ids = windows_of([write_chats(tmp_path / "a.jsonl")], with_bos, 1, 32, note=notes.append)
    assert "answer" in with_bos.decode(ids[0])
    (note,) = notes
    assert "a.jsonl:" in note
    assert "users are not served" in note


def rows_file(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.mark.parametrize("verb", ["calibrate", "eval"])
def test_rows_without_a_text_are_skipped_counted_and_the_first_reason_is_told(plain: Any, tmp_path: Path, verb: str) -> None:
    good, bad = [{"text": text} for text in DOCUMENTS[:5]], [{"input": "a", "output": "b"}] * 35
    name, told = rows_file(tmp_path / "mixed.jsonl", *good, *bad), list[Rows]()
    if verb == "calibrate":
        ids = windows_of([name], plain, 100, 8, read=told.append)
        only = windows_of([rows_file(tmp_path / "good.jsonl", *good)], plain, 100, 8)
        assert ids.shape == only.shape
    else:
        eval_windows_of([name], plain, 100, 8, read=told.append)
    (rows,) = told
    assert (rows.dataset, rows.n_read, rows.n_skipped) == (name, 40, 35)
    assert "no text; its fields are input, output, expected text" in rows.first_skipped
    assert verb == "calibrate" or rows.first_skipped.startswith(f"{name}:6: ")


@pytest.mark.parametrize("read", [windows_of, eval_windows_of])
def test_a_dataset_without_any_text_is_an_error_with_the_first_reason(plain: Any, tmp_path: Path, read: Any) -> None:
    name = rows_file(tmp_path / "a.jsonl", *[{"prompt": "q"}] * 3)
    with pytest.raises(CheckpointError, match=r"a\.jsonl:\d: no text; its fields are prompt, expected text.*none of the 3 rows read"):
        read([name], plain, 4, 8)
    empty = rows_file(tmp_path / "b.jsonl", {"text": ""})
    with pytest.raises(RecipeError, match="the text to calibrate or measure on is empty"):
        read([empty], plain, 4, 8)


@pytest.mark.parametrize("read", [windows_of, eval_windows_of])
def test_a_text_of_one_token_is_too_little(plain: Any, tmp_path: Path, read: Any) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(RecipeError, match="windows of 1 token, and 2 or more are needed"):
        read([str(tmp_path / "a.txt")], plain, 4, 8)


@pytest.mark.parametrize("names", [1, 2])
def test_windows_held_out_are_others_and_leave_the_windows_as_they_are(with_bos: Any, tmp_path: Path, names: int) -> None:
    pieces = [{"text": default_text()[k : k + 300]} for k in range(0, 60_000, 300)]
    files = [rows_file(tmp_path / f"{i}.jsonl", *pieces[i::2]) for i in range(names)]
    ids, held_out = windows_and_held_out(files, with_bos, 6, 32, hold_out=True)
    assert torch.equal(ids, windows_of(files, with_bos, 6, 32))
    assert held_out is not None
    assert held_out.shape[1] == 32
    assert 1 <= len(held_out) <= 32
    assert (held_out[:, 0] == with_bos.bos_token_id).all()
    assert not {tuple(window) for window in ids.tolist()} & {tuple(window) for window in held_out.tolist()}


def test_where_a_text_has_no_more_windows_others_are_held_out(plain: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Hi")
    ids, held_out = windows_and_held_out([str(tmp_path / "a.txt")], plain, 4, 16, hold_out=True)
    assert ids.shape[1] < 16
    assert held_out is not None
    assert held_out.shape == (64, 16)
    assert windows_and_held_out([str(tmp_path / "a.txt")], plain, 4, 16)[1] is None
