"""The one JSON parser: what is no JSON, or more than any file has, is one short error; all else is what Python's own parser reads."""

from __future__ import annotations

import ast
import json
import math
import time
import tracemalloc
from pathlib import Path

import pytest

from quantcli import strict_json
from quantcli.cli import main
from quantcli.strict_json import NotJson, parse
from support.tiny_models import TinyLlama

ROOT = Path(__file__).parents[1] / "quantcli"

HOSTILE: dict[str, tuple[bytes, str]] = {
    "an end too early": (b"{", "Expecting property name"),
    "bytes of no character": (b'{"a":"\xff"}', "not UTF-8 text: invalid start byte at byte 6"),
    "half a character in UTF-8's own form": (b'"\xed\xa0\x80"', "not UTF-8 text"),
    "UTF-16": ('{"a":1}'.encode("utf-16"), "not UTF-8 text"),
    "lists in lists": (b"[" * 200_000, "nested too deeply"),
    "objects in objects, closed": (b'{"a":' * 101 + b"1" + b"}" * 101, "nested too deeply: more than 100 levels"),
    "a key twice": (b'{"a":1,"\\u001b[0m":2,"\\u001b[0m":3}', r"duplicate key '\\x1b\[0m'"),
    "an integer of 4,301 digits": (b'{"a":' + b"9" * 4301 + b"}", "an integer of 4301 digits"),
    "an integer that is no float": (b"1" + b"0" * 309, "an integer of 310 digits"),
    "a million objects": (b"[" + b"{}," * 1_000_001 + b"{}]", "more than any such file has"),
    "millions of lists": (b"[" + b"[]," * 6_000_001 + b"[]]", "more than any such file has"),
    "half a surrogate pair": (b'{"a":["x\\ud83d"]}', r"half of a surrogate pair \('\\ud83d'\)"),
    "the other half, as a key": (b'{"\\uDE00":1}', "half of a surrogate pair"),
    "more after the end": (b"{} {}", "Extra data"),
    "a control character": (b'"\x01"', "Invalid control character"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_text_is_one_short_error(kind: str) -> None:
    text, words = HOSTILE[kind]
    begin = time.process_time()
    with pytest.raises(NotJson, match=words) as caught:
        parse(text)
    assert time.process_time() - begin < 2
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) <= 200


def test_all_other_text_is_read_as_python_reads_it() -> None:
    text = '{"a": [1, -2.5e3, true, null, "\\ud83d\\ude00 ü"], "model_max_length": 1000000000000000019884624838656, "b": {"c": {}}}'
    assert parse(text.encode()) == json.loads(text)
    assert parse(b"\xef\xbb\xbf" + text.encode()) == json.loads(text)
    deep = b'{"a":' * 99 + b"1" + b"}" * 99
    assert parse(deep) == json.loads(deep)
    assert parse(b'{"a":1,"a":2}', unique=False) == {"a": 2}


def test_numbers_that_json_lacks_are_read_only_where_they_are_meant() -> None:
    assert parse(b"[-Infinity]") == [-math.inf]
    for word in (b"NaN", b"Infinity", b"-Infinity"):
        with pytest.raises(NotJson, match=f"{word.decode()} is no number of JSON"):
            parse(b"[" + word + b"]", special=False)


def test_a_text_that_is_too_much_is_refused_before_it_becomes_objects() -> None:
    text = b"[" + b"{}," * 3_000_000 + b"{}]"
    tracemalloc.start()
    with pytest.raises(NotJson):
        parse(text)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def test_nobody_parses_json_in_another_way() -> None:
    found = [
        path.relative_to(ROOT).as_posix()
        for path in sorted(ROOT.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text("utf8")))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("json.load", "json.loads", "json.JSONDecoder")
    ]
    assert found == [Path(strict_json.__file__).name]


@pytest.mark.parametrize("kind", ["bytes of no character", "lists in lists", "an integer of 4,301 digits", "half a surrogate pair"])
@pytest.mark.parametrize(
    "file",
    ["config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "modules.json"],
)
def test_a_model_s_file_of_hostile_json_ends_with_its_name(
    file: str, kind: str, tiny_llama: TinyLlama, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_llama(layers=1, shards=2)
    (folder / file).write_bytes(HOSTILE[kind][0])
    for verb in (
        ["inspect", folder],
        ["export", folder, "Q8_0", "-o", tmp_path / "a.gguf"],
        ["quantize", folder, "--method", "rtn", "-o", tmp_path / "a"],
    ):
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in verb])
        told = capfd.readouterr().err
        assert ended.value.code in (0, 3), told
        assert "Traceback" not in told
        if ended.value.code == 3:
            assert file in told


@pytest.mark.parametrize("kind", [kind for kind in HOSTILE if kind not in ("a key twice", "a million objects", "millions of lists")])
@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_a_line_of_hostile_json_in_a_dataset_ends_with_its_number(
    kind: str, ending: str, tiny_llama: TinyLlama, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text, data = HOSTILE[kind][0], tmp_path / f"data.{ending}"
    good, row = b'{"text": "one two three"}', b'{"text": "a", "b": ' + text + b"}"
    data.write_bytes(good + b"\n" + row + b"\n" if ending == "jsonl" else b"[" + good + b"," + row + b"]")
    with pytest.raises(SystemExit) as ended:
        main(["calibrate", str(tiny_llama(layers=1)), "--dataset", str(data), "-o", str(tmp_path / "s.safetensors"), "--samples", "1"])
    told = capfd.readouterr().err
    assert ended.value.code == 3
    assert ("data.jsonl:2:" if ending == "jsonl" else "data.json:") in told
    assert "Traceback" not in told


def test_in_a_dataset_the_last_of_two_keys_counts_and_a_field_that_is_not_read_may_be_no_number(tmp_path: Path) -> None:
    from quantcli.text.documents import Dataset

    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "old", "score": NaN, "text": "new"}\n')
    assert list(Dataset.open(str(path)).source.in_order()) == ["new"]
