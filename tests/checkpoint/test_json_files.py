"""Untrusted JSON is an error with the file's name, never a crash and never a message that moves the cursor."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from quantcli.checkpoint import json_files
from quantcli.checkpoint.json_files import parse_json, read_json, shown, with_special_floats
from quantcli.errors import CheckpointError

PATH = Path("model/config.json")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"{", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a":1,"\\u001b[0m":2,"\\u001b[0m":3}', r"duplicate key '\\x1b\[0m'"),
        (b"9" * 5000, "not valid JSON"),
        (b"[" + b"{}," * 1_000_001 + b"{}]", "more than any model has"),
    ],
)
def test_bad_text_is_an_error_that_names_the_file(text: bytes, words: str) -> None:
    with pytest.raises(CheckpointError, match=rf"model/config\.json: .*{words}") as caught:
        parse_json(PATH, text)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


def test_the_last_of_two_equal_keys_may_win() -> None:
    assert parse_json(PATH, b'{"a":1,"a":2}', unique=False) == {"a": 2}


def test_a_missing_file_and_one_that_is_too_large_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match=r"x\.json: cannot be read: No such file"):
        read_json(tmp_path / "x.json")
    (tmp_path / "x.json").write_text("[1]")
    assert read_json(tmp_path / "x.json") == [1]
    monkeypatch.setattr(json_files, "MAX_BYTES", 2)
    with pytest.raises(CheckpointError, match="3 bytes of JSON are more"):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize("value", ["a\x1b[2J", "ü\ud800", "x" * 1000, ["\n"] * 1000, {"a": "\n"}, 1.5, None, True])
def test_a_shown_value_is_short_and_printable(value: object) -> None:
    assert shown(value).isprintable()
    assert len(shown(value)) <= 81


def test_tagged_numbers_are_the_numbers_that_json_lacks() -> None:
    def tag(word: object) -> dict:
        return {"__float__": word}

    read = with_special_floats({"limit": [0.0, tag("Infinity")], "low": {"at": tag("-Infinity")}, "none": tag("NaN")})
    assert read["limit"] == [0.0, math.inf]
    assert read["low"] == {"at": -math.inf}
    assert math.isnan(read["none"])
    others = {"word": tag("many"), "number": tag(1.0), "list": tag([]), "more": {**tag("NaN"), "x": 1}, "text": "NaN"}
    assert with_special_floats(others) == others
