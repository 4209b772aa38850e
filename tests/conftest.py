"""Fixtures that every test may use: small random models in the form Hugging Face publishes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from support.tiny_models import TinyLlama, byte_level_bpe, llama_config, llama_groups, write_shards, write_tokenizer


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Tokenizer:
    """A byte-level BPE of 512 tokens with <|begin_of_text|> = 0 and <|end_of_text|> = 1."""
    return byte_level_bpe(512)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> TinyLlama:
    """A factory of random Llama-architecture folders; each call writes a fresh one, so a test may damage it.

    ``tiny_llama(hidden=256, intermediate=512, layers=2, heads=4, kv_heads=2, vocab=512, dtype="bfloat16", tied=False, bias=False,
    shards=1, seed=0)``. ``kv_heads < heads`` is grouped-query attention; ``shards`` > 1 gives an index (at most layers + 2 files).
    The same options and seed give the same bytes.
    """

    def make(
        *,
        hidden: int = 256,
        intermediate: int = 512,
        layers: int = 2,
        heads: int = 4,
        kv_heads: int = 2,
        vocab: int = 512,
        dtype: str = "bfloat16",
        tied: bool = False,
        bias: bool = False,
        shards: int = 1,
        seed: int = 0,
    ) -> Path:
        folder = tmp_path_factory.mktemp("tiny-llama")
        config = llama_config(hidden, intermediate, layers, heads, kv_heads, vocab, dtype, tied, bias)
        (folder / "config.json").write_text(json.dumps(config, indent=2))
        (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 1}))
        write_tokenizer(folder, tiny_tokenizer)
        write_shards(folder, llama_groups(config), getattr(torch, dtype), shards, seed)
        return folder

    return make
