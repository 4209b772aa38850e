"""A tokenizer that transformers cannot read is told of as such, whatever it trips over."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import quantcli as qc
from quantcli.errors import CheckpointError
from quantcli.forward import tokenizer
from support.tiny_models import TinyLlama


def class_is_an_object(words: dict[str, Any]) -> None:
    words["tokenizer_class"] = {}


def id_is_a_fraction(words: dict[str, Any]) -> None:
    words["model"]["vocab"]["a"] = 374.0


def length_is_a_text(words: dict[str, Any]) -> None:
    words["model_max_length"] = "2048"


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("tokenizer_config.json", class_is_an_object),
        ("tokenizer_config.json", length_is_a_text),
        ("tokenizer.json", id_is_a_fraction),
    ],
)
def test_values_of_other_kinds_are_an_error_with_the_folder(tiny_llama: TinyLlama, file: str, damage: Callable[[Any], None]) -> None:
    folder: Path = tiny_llama(layers=1, hidden=64, intermediate=64)
    words = json.loads((folder / file).read_text())
    damage(words)
    (folder / file).write_text(json.dumps(words))
    with qc.open(folder) as checkpoint, pytest.raises(CheckpointError, match="no tokenizer that transformers can read"):
        tokenizer(checkpoint)
