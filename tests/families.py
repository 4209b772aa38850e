"""Small random models of the families that ``archs/`` knows, in the form in which they are published, and what is expected of them."""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import byte_level_bpe, write_tokenizer

from quantcli.formats.gguf.container import Field, read_header

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
VOCABULARY = 320


@dataclass(frozen=True)
class Case:
    """A model: ``model_type`` with ``config`` beside :data:`SIZES`; ``published``: config.json's words as its publisher has them (None: not
    at all), ``fused``: experts saved as transformers 5 holds them; ``converted_as``: the case whose file ours must equal, where
    convert_hf_to_gguf cannot convert this one."""

    model_type: str
    config: Mapping[str, Any] = field(default_factory=dict)
    published: Mapping[str, Any] = field(default_factory=dict)
    fused: bool = False
    converted_as: str = ""


MOE = {"num_experts_per_tok": 2, "num_local_experts": 4}
QWEN_MOE = {"moe_intermediate_size": 48, "head_dim": 32, "norm_topk_prob": True, "num_experts_per_tok": 2, "num_experts": 4}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 128}
LLAMA2 = {"rope_parameters": None, "head_dim": None, "num_key_value_heads": None, "rope_theta": None, "attention_bias": None}

CASES: dict[str, Case] = {
    "llama": Case("llama"),
    "llama 2 as published": Case("llama", {"num_key_value_heads": 4}, LLAMA2 | {"rope_scaling": None}),
    "llama 3.2": Case("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True, "head_dim": 32}),
    "mistral": Case("mistral", {"head_dim": 32, "sliding_window": None}),
    "mixtral": Case("mixtral", MOE),
    "mixtral, fused": Case("mixtral", MOE, fused=True, converted_as="mixtral"),
    "qwen2": Case("qwen2", {"tie_word_embeddings": True}),
    "qwen3": Case("qwen3", {"head_dim": 32}),
    "qwen3_moe": Case("qwen3_moe", QWEN_MOE),
    "qwen3_moe, fused": Case("qwen3_moe", QWEN_MOE, fused=True),
}


def make(name: str, folder: Path) -> Path:
    """The random model of case ``name`` in ``folder``, with a tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    case = CASES[name]
    folder.mkdir(parents=True)
    config = AutoConfig.for_model(case.model_type, **{**SIZES, "vocab_size": VOCABULARY, **case.config})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for key, p in model.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
            p.copy_(random_like(key, p, generator, is_offset="gemma" in case.model_type))
    model.to(torch.bfloat16).save_pretrained(folder, save_original_format=not case.fused)
    publish(folder / "config.json", case.published)
    (folder / "generation_config.json").unlink(missing_ok=True)
    tokenizer = byte_level_bpe(VOCABULARY - 1)
    tokenizer.add_special_tokens(["<|endoftext|>"])  # which transformers would add to a Qwen that lacks it
    write_tokenizer(folder, tokenizer)
    return folder


def random_like(name: str, p: torch.Tensor, generator: torch.Generator, *, is_offset: bool) -> torch.Tensor:
    """Norms near what leaves their input alone; small biases; matrices that keep the size of what they read."""
    values = torch.randn(p.shape, generator=generator)
    if "norm" in name:
        return 0.1 * values + (0.0 if is_offset or name.endswith("bias") else 1.0)
    return 0.1 * values if p.dim() == 1 else values / p.shape[-1] ** 0.5


def publish(path: Path, words: Mapping[str, Any]) -> None:
    config = json.loads(path.read_text())
    for word, value in words.items():
        config.pop(word, None)
        if value is not None:
            config[word] = value
    path.write_text(json.dumps(config, indent=1))


def golden(name: str) -> Path:
    """Where llama.cpp's own file of case ``name`` is written down (tests/data/make_families.py)."""
    case = CASES[CASES[name].converted_as or name]
    slug = "-".join(re.findall(r"\w+", next(key for key, value in CASES.items() if value is case)))
    return Path(__file__).parent / "data/families" / f"{slug}.json"


def manifest(path: Path) -> dict[str, dict[str, list]]:
    """What the GGUF file at ``path`` holds. Keys: [type, value], a long array's value by its hash; tensors: [type, shape, hash].

    The keys ``quantcli.*`` and what the tokenizer is made of are left out: those have tests of their own.
    """
    container = read_header(path)
    data = path.read_bytes()
    fields = {key: described(field) for key, field in container.fields.items() if not key.startswith(("quantcli.", "tokenizer."))}
    tensors = {
        name: [spec.dtype, list(spec.shape), digest(data[container.offsets[name] :][: spec.nbytes])]
        for name, spec in container.specs.items()
    }
    return {"fields": fields, "tensors": tensors}


def described(field: Field) -> list:
    if field.element is None:
        return [field.type.name, field.value]
    return [f"{field.element.name}[]", np.asarray(field.value).tolist()]


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def as_text(found: dict[str, dict[str, list]]) -> str:
    """JSON with a line for each key and tensor."""
    parts = {
        word: ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in entries.items()) for word, entries in found.items()
    }
    return "{\n" + ",\n".join(f' "{word}": {{\n{text}\n }}' for word, text in parts.items()) + "\n}\n"
