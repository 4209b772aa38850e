"""Small random models of the families that ``archs/`` knows, in the form in which they are published, and what is expected of them."""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data import topics
from typing import Any

import numpy as np
import sentencepiece
import torch
from safetensors.torch import load_file, save_file

from quantcli.formats.gguf.file.container import Field
from quantcli.formats.gguf.file.headers import read_header
from support.places import DATA
from support.tiny_models import byte_level_bpe, write_tokenizer

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
VOCABULARY = 384


@dataclass(frozen=True)
class Case:
    """A model: ``model_type`` with ``config`` beside :data:`SIZES`; ``published``: config.json's words as its publisher has them (None: not
    at all), ``fused``: experts saved as transformers 5 holds them; ``converted_as``: the case whose file ours must equal, where
    convert_hf_to_gguf cannot convert this one; ``unconverted``: why there is no such file at all;
    ``sentencepiece``: the kind of tokenizer, which decides by what road llama.cpp converts;
    ``differing``: keys that are not llama.cpp's → why; ``elsewhere``: keys that llama.cpp writes in another place among the others;
    ``packed``: experts in MXFP4; ``lost``: words of the config, or rotary parameters, that no key tells → what they come back as, which
    is what every published model has.
    """

    model_type: str
    config: Mapping[str, Any] = field(default_factory=dict)
    published: Mapping[str, Any] = field(default_factory=dict)
    fused: bool = False
    converted_as: str = ""
    unconverted: str = ""
    sentencepiece: bool = False
    differing: Mapping[str, str] = field(default_factory=dict)
    elsewhere: tuple[str, ...] = ()
    packed: bool = False
    lost: Mapping[str, Any] = field(default_factory=dict)

    @property
    def file_type(self) -> str:
        return "MXFP4_MOE" if self.packed else "BF16"


MOE = {"num_experts_per_tok": 2, "num_local_experts": 4}
QWEN_MOE = {"moe_intermediate_size": 48, "head_dim": 32, "norm_topk_prob": True, "num_experts_per_tok": 2, "num_experts": 4}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 128}
LLAMA2 = {"rope_parameters": None, "head_dim": None, "num_key_value_heads": None, "rope_theta": None, "attention_bias": None}

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA31 = {"rope_parameters": None, "rope_theta": 5e5, "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}}
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "tie_word_embeddings": True}
GEMMA3_PUBLISHED = {"rope_parameters": None, "layer_types": None, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
GEMMA3_PUBLISHED |= {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6, "tie_word_embeddings": None}
UNKNOWN = {"tokenizer.ggml.unknown_token_id": "the converter leaves out what tokenizer.model alone tells; llama.cpp then takes 0"}
EOT = UNKNOWN | {"tokenizer.ggml.eot_token_id": "the converter takes 107 for any Gemma 1; ours is the token that has the name"}
PREFIX = ("tokenizer.ggml.add_space_prefix",)
GRANITE = {"attention_multiplier": 0.2, "embedding_multiplier": 6.0, "residual_multiplier": 0.3, "logits_scaling": 2.0}
PHI = {"partial_rotary_factor": 0.75, "num_attention_heads": 4, "original_max_position_embeddings": 256}
LONGROPE = PHI | {"max_position_embeddings": 512, "partial_rotary_factor": 1.0}
LONGROPE["rope_parameters"] = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "long_factor": [1.0 + k for k in range(8)],
    "short_factor": [1.0 + k / 8 for k in range(8)],
    "original_max_position_embeddings": 256,
}

GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "tie_word_embeddings": True}
GPT_OSS = {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64, "sliding_window": 16}
GPT_OSS |= {
    "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64, "truncate": True}
}
DEEPSEEK = {
    "kv_lora_rank": 32,
    "q_lora_rank": 48,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "num_key_value_heads": 4,
}
DEEPSEEK |= {
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "n_shared_experts": 2,
}
DEEPSEEK |= {"n_group": 1, "topk_group": 1}

FALCON_LOST = {"max_position_embeddings": 2048}
LOST_NORMS = "its stablelm.py gathers the heads' norms and then returns them from a generator, so that they are lost"

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
    "llama, linear": Case("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "llama, yarn": Case("llama", {"rope_parameters": YARN}),
    "llama 3.1 as published": Case("llama", {"head_dim": 32}, LLAMA31),
    "smollm2": Case("llama", {"tie_word_embeddings": True, "num_attention_heads": 8, "num_key_value_heads": 4}),
    "smollm3": Case("smollm3", {"num_hidden_layers": 4, "tie_word_embeddings": True}),
    "gemma": Case("gemma", {"head_dim": 32, "tie_word_embeddings": True}, sentencepiece=True, differing=EOT, elsewhere=PREFIX),
    "gemma2": Case("gemma2", {**GEMMA, "sliding_window": 16}, sentencepiece=True, differing=UNKNOWN, elsewhere=PREFIX),
    "gemma3": Case("gemma3_text", {**GEMMA, "num_hidden_layers": 7, "sliding_window": 16}),
    "gemma3 as published": Case("gemma3_text", {**GEMMA, "num_hidden_layers": 7, "sliding_window": 16}, GEMMA3_PUBLISHED),
    "granite": Case("granite", GRANITE),
    "olmo2": Case("olmo2"),
    "olmo3": Case("olmo3", {"num_hidden_layers": 4, "sliding_window": 16}),
    "phi3": Case("phi3", PHI | {"sliding_window": 128}),
    "phi4": Case("phi3", PHI),
    "phi3, longrope": Case("phi3", LONGROPE, elsewhere=("phi3.rope.scaling.attn_factor",)),
    "glm4": Case("glm4", {"head_dim": 16}),
    "gpt2": Case("gpt2", GPT2, {"n_ctx": 256}),
    "falcon 7b": Case("falcon", {"num_key_value_heads": None, "multi_query": True}, {"num_kv_heads": 1}, lost=FALCON_LOST),
    "falcon 40b": Case("falcon", {"num_key_value_heads": None, "new_decoder_architecture": True, "num_kv_heads": 2}, lost=FALCON_LOST),
    "gpt-oss": Case("gpt_oss", GPT_OSS, lost={"truncate": False}),
    "gpt-oss, mxfp4": Case("gpt_oss", GPT_OSS, packed=True, lost={"truncate": False}),
    "deepseek v2": Case("deepseek_v2", DEEPSEEK),
    "deepseek v3": Case("deepseek_v3", DEEPSEEK | {"n_group": 2}, {"scoring_func": "sigmoid"}),
    "deepseek v3, fused": Case(
        "deepseek_v3", DEEPSEEK | {"n_group": 2}, {"scoring_func": "sigmoid"}, fused=True, converted_as="deepseek v3"
    ),
    "stablelm": Case("stablelm", {"use_qkv_bias": True}),
    "stablelm 2 12b": Case("stablelm", {"qk_layernorm": True, "use_parallel_residual": True}, unconverted=LOST_NORMS),
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
    if case.packed:
        pack_as_mxfp4(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if case.sentencepiece:
        write_sentencepiece(folder)
        return folder
    tokenizer = byte_level_bpe(VOCABULARY - 2)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|user|>"])  # transformers adds the first to a Qwen, llama.cpp wants both of a GLM
    write_tokenizer(folder, tokenizer)
    if case.model_type == "phi3":
        publish(folder / "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer"})  # by which llama.cpp tells Phi-4's
    return folder


def pack_as_mxfp4(folder: Path) -> None:
    """The gpt-oss in ``folder`` as it is published: its experts in random MXFP4 (quantcli/formats/mxfp4.py has the layout)."""
    random = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[name] = tensor
            continue
        n, columns, rows = tensor.shape
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (n, rows, columns // 32, 16), generator=random, dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(120, 126, (n, rows, columns // 32), generator=random, dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    dense = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    publish(folder / "config.json", {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": dense}})


def write_sentencepiece(folder: Path) -> None:
    """tokenizer.model of at most :data:`VOCABULARY` pieces, with bytes for what it lacks."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in topics.topics.values() for line in text[:2000].splitlines() if line.strip()),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=VOCABULARY,
        model_type="bpe",
        byte_fallback=True,
        add_dummy_prefix=False,
        character_coverage=0.98,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GemmaTokenizer", "add_bos_token": True, "unk_token": "<unk>"})
    )


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


def options(name: str) -> dict[str, str]:
    """What an export of case ``name`` is given: the pre-tokenizer that tests/support/llamacpp_peer.py gives the converter."""
    return {} if CASES[name].sentencepiece else {"pre_tokenizer": "gpt-2"}


def golden(name: str) -> Path:
    """Where llama.cpp's own file of case ``name`` is written down (tests/data/make_families.py)."""
    case = CASES[CASES[name].converted_as or name]
    slug = "-".join(re.findall(r"\w+", next(key for key, value in CASES.items() if value is case)))
    return DATA / "families" / f"{slug}.json"


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
