"""Small tokenizers, and the keys of GGUF metadata that are made of them."""

from __future__ import annotations

import json
from pathlib import Path

from gguf import GGUFWriter
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from quantcli.formats.gguf.model.metadata import fields_of
from quantcli.formats.gguf.tokens.tokenizer import add_tokenizer


def byte_level(folder: Path, *, pre: object = None, ignore_merges: bool = False, **settings: object) -> Path:
    """A byte-level BPE with one merge, a special and a plain added token, and tokenizer_config.json of ``settings``."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, "he"])}
    bpe = Tokenizer(models.BPE(vocab, [("h", "e")], ignore_merges=ignore_merges))
    bpe.pre_tokenizer = pre or pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.add_special_tokens([AddedToken("<|end|>", special=True)])
    bpe.add_tokens([AddedToken("<tool>"), AddedToken("<|im_start|>")])
    bpe.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>", **settings}))
    (folder / "config.json").write_text("{}")
    return folder


def tokenizer_keys(folder: Path, vocab_size: int, pre: str | None = None, *, arch: str = "llama") -> dict:
    keys = GGUFWriter(None, arch)
    add_tokenizer(keys, folder, vocab_size, pre)
    return {key.removeprefix("tokenizer.").removeprefix("ggml."): field.value for key, field in fields_of(keys).items()}
