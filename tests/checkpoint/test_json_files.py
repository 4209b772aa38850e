"""Untrusted JSON is an error with the file's name, never a crash and never a message that moves the cursor."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from quantcli.checkpoint import json_files
from quantcli.checkpoint.json_files import parse_json, read_json, shown, with_special_floats
from quantcli.errors import CheckpointError

PATH = Path("model/config.json")


def test_what_is_no_json_is_an_error_that_names_the_file() -> None:
    with pytest.raises(CheckpointError, match=r"model/config\.json: not valid JSON: duplicate key '\\x1b'") as caught:
        parse_json(PATH, b'{"\\u001b":2,"\\u001b":3}')
    assert str(caught.value).isprintable()


def test_a_file_that_people_write_has_the_last_of_two_keys_and_numbers_that_json_lacks_and_a_program_s_has_neither() -> None:
    assert parse_json(PATH, b'{"a":1,"a":Infinity}', unique=False) == {"a": math.inf}
    with pytest.raises(CheckpointError, match="Infinity is no number of JSON"):
        parse_json(PATH, b'{"a":Infinity}')


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
