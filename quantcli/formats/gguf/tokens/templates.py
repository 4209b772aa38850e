"""Chat templates of a model folder: the usual one and those with a name (tool_use, rag, …)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gguf import GGUFWriter

from quantcli.errors import CheckpointError
from quantcli.formats.gguf.model.metadata import read_object

DEFAULT = "default"


def chat_templates(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Name → template, from the first place that has any: *.jinja files, as in transformers, tokenizer_config.json, chat_template.json."""
    files = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (main := folder / "chat_template.jinja").is_file():
        files = {DEFAULT: main, **files}
    if files:
        return {name: _text(path) for name, path in files.items()}
    found = settings.get("chat_template")
    if found is None:
        found = read_object(folder / "chat_template.json").get("chat_template")
    if found is None:
        return {}
    if isinstance(found, str):
        return {DEFAULT: found}
    if isinstance(found, list):
        found = {entry["name"]: entry["template"] for entry in found}
    if not isinstance(found, dict) or not all(isinstance(text, str) for pair in found.items() for text in pair):
        raise CheckpointError(f"{folder}: chat_template is neither a text nor texts by name; correct tokenizer_config.json")
    return found


def write_templates(keys: GGUFWriter, templates: Mapping[str, str]) -> None:
    """The usual template under llama.cpp's one key, the others under keys of their own and listed in order of their names."""
    named = {re.sub(r"[^A-Za-z0-9]", "_", name): text for name, text in templates.items() if name and name != DEFAULT}
    for name in sorted(named):
        keys.add_string(f"tokenizer.chat_template.{name}", named[name])
    if named:
        keys.add_array("tokenizer.chat_templates", sorted(named))
    if DEFAULT in templates:
        keys.add_string("tokenizer.chat_template", templates[DEFAULT])


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read as text ({error})") from error
