"""Documents from files and datasets by name: what a record may be, what is wrong with a bad one, and that large ones are only sampled."""

from __future__ import annotations

import json
import random
import re
import sys
import time
import tracemalloc
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from quantcli.errors import CheckpointError, RecipeError
from quantcli.text.documents import Conversation, Dataset, Document, files, tables
from quantcli.text.documents.records import Unreadable

MIB = 1 << 20


def documents(word: object) -> list[Document]:
    return list(Dataset.open(str(word)).source.in_order())


def drawn(word: object, seed: int = 0, n: int | None = None) -> list[Document]:
    return list(islice(Dataset.open(str(word)).source.drawn(random.Random(seed)), n))


def turns(*contents: str) -> tuple[dict[str, str], ...]:
    return tuple({"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, contents, strict=False))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file is large, and a block a few lines."""
    monkeypatch.setattr(files, "WHOLE_BYTES", 0)
    monkeypatch.setattr(files, "BLOCK_BYTES", 100)
    monkeypatch.setattr(tables, "ROWS_A_ROUND", 7)
    monkeypatch.setattr(tables, "ROWS_AT_ONCE", 5)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "a"}, "a"),
        ({"content": "b", "id": 1}, "b"),
        ({"text": ""}, ""),
        ({"text": None, "content": "c"}, "c"),
        ({"messages": list(turns("q", "a"))}, turns("q", "a")),
        ({"text": "of another template", "messages": list(turns("q", "a"))}, turns("q", "a")),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, turns("q", "a")),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": None}]}, turns("q", None)),
        ({"conversations": list(turns("q", "a"))}, turns("q", "a")),
        ({"prompt": "q", "response": "a"}, turns("q", "a")),
        ({"instruction": "q", "input": "more", "output": "a"}, turns("q\n\nmore", "a")),
        ({"instruction": "q", "input": "", "output": "a"}, turns("q", "a")),
        ({"instruction": "q", "context": "more", "response": "a"}, turns("q\n\nmore", "a")),
    ],
)
def test_a_record_is_a_text_or_a_conversation(tmp_path: Path, row: dict[str, Any], expected: Any) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n\n")
    (document,) = documents(tmp_path / "a.jsonl")
    assert (document.messages if isinstance(document, Conversation) else document) == expected
    (tmp_path / "a.json").write_text(json.dumps([row], indent=1))
    (same,) = documents(tmp_path / "a.json")
    assert (same.messages if isinstance(same, Conversation) else same) == expected


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{broken", "not a line of JSON"),
        ('{"text": 3}', "text is 3, expected text"),
        ('{"messages": "hello"}', r"messages is 'hello', expected a list of \{role, content\}"),
        ('{"messages": [{"role": "user", "content": "a"}, {"text": "b"}]}', r"messages\[1\] is an object with text, expected"),
        ('{"messages": [{"role": "user", "content": 3}]}', r"messages\[0\]: content is 3, expected text"),
        ('{"conversations": [{"from": "gpt", "value": 3}]}', r"conversations\[0\]: value is 3, expected text"),
        ('{"conversations": [{"from": "bot", "value": "a"}]}', r"conversations\[0\] is from 'bot', expected one of human"),
        ('{"prompt": ["a"], "response": "b"}', r"prompt is \['a'\], expected text"),
    ],
)
def test_a_bad_record_is_an_error_with_file_line_and_what_was_expected(
    tmp_path: Path, request: pytest.FixtureRequest, line: str, words: str, large: bool
) -> None:
    if large:
        request.getfixturevalue("small")
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line)
    with pytest.raises(CheckpointError, match=rf"a\.jsonl:2: .*{words}" if "messages" not in line else rf"a\.jsonl:2: {words}"):
        documents(tmp_path / "a.jsonl")
    with pytest.raises(CheckpointError, match=r"a\.jsonl, byte 17: " if large else r"a\.jsonl:2: "):
        drawn(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"id": 3}, "no text; its fields are id, expected text"),
        ([1], "it is not a record but list"),
        (None, "it is not a record but NoneType"),
        ({"text": None, "id": 1}, r"its fields are text \(null\), id, expected text"),
        ({"prompt": "q"}, "its fields are prompt, expected text"),
        ({"input": "q", "output": "a"}, "its fields are input, output, expected text"),
        ({"prompt": "q", "response": None}, r"its fields are prompt, response \(null\), expected text"),
    ],
)
def test_a_record_without_a_text_says_where_it_is_and_what_it_has(row: Any, reason: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + json.dumps(row))
    fine, bad = documents(tmp_path / "a.jsonl")
    assert fine == "fine"
    assert isinstance(bad, Unreadable)
    assert re.search(rf"a\.jsonl:2: .*{reason}", bad.reason)


def test_a_json_file_may_be_lines_but_not_some_other_object(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"text": "a"}\n{"text": "b"}\n')
    assert documents(tmp_path / "a.json") == ["a", "b"]
    (tmp_path / "b.json").write_text('[{"text": "a"}, {"text": ')
    with pytest.raises(CheckpointError, match=r"b\.json: not a JSON list of records"):
        documents(tmp_path / "b.json")
    (tmp_path / "c.json").write_text('{\n "text": "a"\n}')
    with pytest.raises(CheckpointError, match=r"c\.json:1: not a line of JSON.*expected a record a line"):
        documents(tmp_path / "c.json")


def test_a_large_json_list_is_refused_with_a_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_JSON_BYTES", 10)
    (tmp_path / "a.json").write_text('[{"text": "a"}]')
    with pytest.raises(RecipeError, match=r"make it \.jsonl"):
        documents(tmp_path / "a.json")


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_sampling_a_large_file_gives_every_record_once_if_all_are_taken(small: None, tmp_path: Path, suffix: str) -> None:
    rows = [{"text": f"{i} " * (i % 50)} for i in range(300)]  # some longer than blocks, some empty
    path = tmp_path / f"a.{suffix}"
    if suffix == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        write_parquet(path, rows, 40)
    texts = [row["text"] for row in rows]
    assert documents(path) == texts
    assert sorted(map(str, drawn(path))) == sorted(texts)
    assert drawn(path, 1) == drawn(path, 1) != drawn(path, 2)


def test_a_few_records_of_a_large_file_come_from_all_over_it(small: None, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": f"{i:05d}"}) for i in range(5000)))
    taken = sorted(int(str(text)) for text in drawn(tmp_path / "a.jsonl", n=200))
    assert max(b - a for a, b in zip([0, *taken], [*taken, 5000], strict=True)) < 300


def test_stretches_of_a_large_text_are_its_words_and_cut_no_character(small: None, tmp_path: Path) -> None:
    words = [f"größe{i}…" for i in range(2000)]
    (tmp_path / "a.txt").write_text(" ".join(words), "utf8")
    taken = " ".join(map(str, drawn(tmp_path / "a.txt"))).split()
    assert set(taken) <= set(words)
    assert len(taken) == len(set(taken)) > 0.7 * len(words)
    assert "".join(map(str, documents(tmp_path / "a.txt"))) == " ".join(words)


def test_a_large_text_that_is_no_text_is_an_error(small: None, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00" * 100)
    for read in (drawn, documents):
        with pytest.raises(CheckpointError, match=r"a\.txt.*not UTF-8"):
            read(tmp_path / "a.txt")


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "parquet"])
def test_200_megabytes_are_sampled_in_a_moment_and_in_little_memory(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"large.{suffix}"
    rows = [{"text": f"record {i} " + "with words of no great interest " * 30} for i in range(1000)]
    if suffix == "parquet":
        write_parquet(path, rows, 1000, times=200)
    else:
        with path.open("w") as file:
            for _ in range(210):
                file.write("".join(json.dumps(row) + "\n" for row in rows))
    assert path.stat().st_size > 180 * MIB
    tracemalloc.start()
    started = time.process_time()
    n_chars = sum(len(str(document)) for document in drawn(path, n=500))
    seconds = time.process_time() - started
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n_chars > 400_000
    assert peak < 16 * MIB, f"{peak / MIB:.1f} MiB"
    assert seconds < 1, f"{seconds:.2f} s"


def write_parquet(path: Path, rows: list[dict[str, Any]], rows_a_group: int, *, times: int = 1) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.Table.from_pylist(rows)
    with parquet.ParquetWriter(path, table.schema, compression="none", use_dictionary=False) as writer:
        for _ in range(times):
            writer.write_table(table, row_group_size=rows_a_group)


def test_parquet_rows_are_documents_and_other_columns_are_not_read(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [{"id": 1, "text": "a"}, {"id": 2, "text": "b"}], 1)
    assert documents(tmp_path / "a.parquet") == ["a", "b"]
    assert Dataset.open(f"{tmp_path}/a.parquet").source.columns == ("text",)  # type: ignore[attr-defined]
    write_parquet(tmp_path / "b.parquet", [{"id": 1, "messages": list(turns("q", "a"))}], 1)
    assert documents(tmp_path / "b.parquet")[0].messages == turns("q", "a")  # type: ignore[union-attr]
    write_parquet(tmp_path / "c.parquet", [{"id": 1}], 1)
    with pytest.raises(CheckpointError, match=r"c\.parquet: no text; its columns are id, expected text"):
        documents(tmp_path / "c.parquet")
    write_parquet(tmp_path / "d.parquet", [{"messages": list(turns("a"))}, {"messages": [{"role": None, "content": "b"}]}], 1)
    with pytest.raises(CheckpointError, match=r"d\.parquet, row 1: messages\[0\] is an object with role, content, expected"):
        documents(tmp_path / "d.parquet")


def test_a_damaged_parquet_file_is_an_error(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [{"text": "word " * 500}], 1)
    data = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(data[:1000])
    (tmp_path / "c.parquet").write_bytes(b"PAR1" + b"\xff" * 1000 + data[1004:])
    for name in "bc":
        with pytest.raises(CheckpointError, match=rf"{name}\.parquet.*pyarrow"):
            documents(tmp_path / f"{name}.parquet")


@pytest.mark.parametrize(("word", "module"), [("a.parquet", "pyarrow"), ("org/name", "datasets")])
def test_a_missing_library_is_an_error_that_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str, module: str
) -> None:
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(RecipeError, match=r"quantcli\[data\]"):
        Dataset.open(word)


class Stream(list):
    """What ``datasets`` gives for ``streaming=True``, as far as it is used."""

    def shuffle(self, *, seed: int, buffer_size: int) -> Stream:
        return Stream(random.Random(seed).sample(self, len(self)))


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

    def load_dataset(repo: str, config: str | None, *, split: str, streaming: bool) -> Stream:
        calls.append((repo, config, split))
        assert streaming
        return Stream({"text": text} for text in "abcdef")

    fake = ModuleType("datasets")
    fake.load_dataset = load_dataset  # type: ignore[attr-defined]
    fake.get_dataset_split_names = lambda repo, config: ["test", "train"]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert documents(word) == list("abcdef")
    assert calls == [asked]
    assert sorted(map(str, drawn(word, 1))) == list("abcdef")
    assert drawn(word, 1) == drawn(word, 1) != drawn(word, 2)


def test_a_real_stream_of_datasets_is_drawn_from(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"text": f"row {i}"} for i in range(50)]).to_iterable_dataset()
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda repo, config: ["train"])
    monkeypatch.setattr(datasets, "load_dataset", lambda repo, config, split, streaming: rows)
    assert documents("org/name") == [f"row {i}" for i in range(50)]
    assert drawn("org/name", 1) == drawn("org/name", 1) != drawn("org/name", 2)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("absent.txt", None, "no such file"),
        ("a.txt", b"\xff\xfe", "not UTF-8"),
        ("a.csv", b"a,b", "must end in .txt, .jsonl, .json, .parquet"),
        ("b.txt=0", b"", "above zero"),
    ],
)
def test_a_file_that_cannot_be_used_is_an_error(tmp_path: Path, file: str, content: bytes | None, words: str) -> None:
    if content is not None:
        (tmp_path / file.split("=")[0]).write_bytes(content)
    with pytest.raises((CheckpointError, RecipeError), match=words):
        Dataset.open(f"{tmp_path}/{file}")
