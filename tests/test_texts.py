"""Datasets by file and by name, and the token windows cut from them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import BOS, EOS
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from quantcli.errors import CheckpointError, RecipeError
from quantcli.texts import Dataset, default_eval_text, default_text, eval_windows, read, sha256, windows, windows_of

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


def test_a_text_shorter_than_one_window_is_one_shorter_window(plain: Any) -> None:
    ids = windows(["short text"], plain, n_samples=4, seq_len=512)
    assert ids.tolist() == [tokens_of(plain, "short text")]


def test_documents_are_read_only_as_far_as_they_are_needed(plain: Any) -> None:
    class Counting:
        bos_token_id, eos_token_id, n_texts = plain.bos_token_id, plain.eos_token_id, 0

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


def test_jsonl_rows_give_text_content_or_messages(tmp_path: Path) -> None:
    rows = [
        {"text": "a"},
        {"content": "b", "id": 1},
        {"messages": [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert Dataset.open(f"{tmp_path}/a.jsonl").documents == ["a", "b", "c\nd"]
    assert read(f"{tmp_path}/a.jsonl") == "a\n\nb\n\nc\nd"


@pytest.mark.parametrize(
    ("line", "words"), [("{broken", "a.jsonl:2: not a line of JSON"), ('{"id": 3}', "its fields are id"), ("[1]", "no record")]
)
def test_a_bad_jsonl_line_is_an_error_with_its_number(tmp_path: Path, line: str, words: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line)
    with pytest.raises(CheckpointError, match=words):
        Dataset.open(f"{tmp_path}/a.jsonl")


def test_parquet_rows_are_documents(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": ["a", "b"]}), tmp_path / "a.parquet")
    assert Dataset.open(f"{tmp_path}/a.parquet").documents == ["a", "b"]


@pytest.mark.parametrize(("word", "module"), [("a.parquet", "pyarrow"), ("org/name", "datasets")])
def test_a_missing_library_is_an_error_that_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str, module: str
) -> None:
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(RecipeError, match=r"quantcli\[data\]"):
        Dataset.open(word)


@pytest.mark.parametrize(
    ("word", "asked"),
    [
        ("org/name", ("org/name", None, "train")),
        ("org/name:test", ("org/name", None, "test")),
        ("org/name:en:dev=2", ("org/name", "en", "dev")),
    ],
)
def test_a_dataset_by_name_is_streamed_from_its_split(monkeypatch: pytest.MonkeyPatch, word: str, asked: tuple[Any, ...]) -> None:
    calls: list[tuple[Any, ...]] = []

    def load_dataset(repo: str, config: str | None, *, split: str, streaming: bool) -> list[dict[str, str]]:
        calls.append((repo, config, split))
        assert streaming
        return [{"text": "a"}, {"text": "b"}]

    fake = ModuleType("datasets")
    fake.load_dataset = load_dataset  # type: ignore[attr-defined]
    fake.get_dataset_split_names = lambda repo, config: ["test", "train"]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert Dataset.open(word).documents == ["a", "b"]
    assert calls == [asked]


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("absent.txt", None, "no such file"),
        ("a.txt", b"\xff\xfe", "not UTF-8"),
        ("a.csv", b"a,b", "must end in"),
        ("b.txt=0", b"", "above zero"),
    ],
)
def test_a_file_that_cannot_be_used_is_an_error(tmp_path: Path, file: str, content: bytes | None, words: str) -> None:
    if content is not None:
        (tmp_path / file.split("=")[0]).write_bytes(content)
    with pytest.raises((CheckpointError, RecipeError), match=words):
        Dataset.open(f"{tmp_path}/{file}")
