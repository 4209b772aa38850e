"""The files that define a tokenizer, parsed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantcli.formats.gguf.model.metadata import read_object
from quantcli.formats.gguf.tokens.tekken import ROLES, as_tokenizer_json


@dataclass(frozen=True)
class Files:
    """A tokenizer's files, parsed ({} where there is none): ``settings`` is tokenizer_config.json over special_tokens_map.json, ``parsed``
    tokenizer.json, ``config`` config.json with the keys of its text model.
    """

    folder: Path
    settings: Mapping[str, Any]
    parsed: Mapping[str, Any]
    config: Mapping[str, Any]

    @classmethod
    def of(cls, folder: Path, vocab_size: int) -> Files:
        settings = read_object(folder / "special_tokens_map.json") | read_object(folder / "tokenizer_config.json")
        parsed = read_object(folder / "tokenizer.json")
        config = read_object(folder / "config.json")
        config = {**(config.get("text_config") or {}), **config}
        has_tekken = not parsed and not (folder / "tokenizer.model").is_file() and (folder / "tekken.json").is_file()
        if has_tekken:
            settings, parsed = ROLES | settings, as_tokenizer_json(read_object(folder / "tekken.json"), vocab_size)
        return cls(folder, settings, parsed, config)

    def added(self) -> dict[int, Mapping[str, Any]]:
        """tokenizer.json's added tokens by id."""
        return {token["id"]: token for token in self.parsed.get("added_tokens", [])}

    def configured(self) -> dict[int, Mapping[str, Any]]:
        """tokenizer_config.json's."""
        return {int(id): token for id, token in (self.settings.get("added_tokens_decoder") or {}).items()}
