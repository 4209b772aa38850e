"""Small random models in the form Hugging Face publishes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from pydoc_data import topics

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
TinyLlama = Callable[..., Path]
"""``tiny_llama(hidden=…, …) -> folder``; see the fixture for the options."""


def byte_level_bpe(vocab_size: int) -> Tokenizer:
    """A byte-level BPE of at most ``vocab_size`` tokens trained on CPython's language reference: any byte string can be encoded."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([text[:2000] for text in topics.topics.values()], trainer)
    return bpe


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """tokenizer.json and tokenizer_config.json, with a chat template."""
    tokenizer.save(str(folder / "tokenizer.json"))
    words = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(words, indent=2))


def llama_config(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int, dtype: str, tied: bool, bias: bool
) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": bias,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "dtype": dtype,
        "eos_token_id": 1,
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": intermediate,
        "max_position_embeddings": 2048,
        "mlp_bias": bias,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": tied,
        "use_cache": True,
        "vocab_size": vocab,
    }


def llama_groups(config: dict) -> list[dict[str, tuple[int, ...]]]:
    """Shapes of the tensors by disk name, in the units a shard may hold: embedding, each layer, head."""
    hidden, wide, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = config["head_dim"] * config["num_key_value_heads"]
    groups: list[dict[str, tuple[int, ...]]] = [{"model.embed_tokens.weight": (vocab, hidden)}]
    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}"
        attention = {"q": (hidden, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, hidden)}
        mlp = {"gate": (wide, hidden), "up": (wide, hidden), "down": (hidden, wide)}
        linears = {f"{p}.self_attn.{k}_proj": s for k, s in attention.items()} | {f"{p}.mlp.{k}_proj": s for k, s in mlp.items()}
        group: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in linears.items()}
        if config["attention_bias"]:
            group |= {f"{name}.bias": shape[:1] for name, shape in linears.items()}
        group |= {f"{p}.input_layernorm.weight": (hidden,), f"{p}.post_attention_layernorm.weight": (hidden,)}
        groups.append(group)
    head: dict[str, tuple[int, ...]] = {"model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        head["lm_head.weight"] = (vocab, hidden)
    return [*groups, head]


def random_tensor(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Linears keep the variance of their input and have one input in sixteen that is larger, as trained models do; norms are near one."""
    values = torch.randn(shape, generator=generator)
    if "norm" in name:
        return 1 + 0.1 * values
    if len(shape) == 1:
        return 0.02 * values
    if "embed_tokens" in name:
        return values
    values[:, ::16] *= 3
    return values / shape[1] ** 0.5


def write_shards(folder: Path, groups: list[dict[str, tuple[int, ...]]], dtype: torch.dtype, n_shards: int, seed: int) -> None:
    """The model's tensors as model.safetensors, or as ``n_shards`` files and their index; never more than one shard in memory."""
    generator = torch.Generator().manual_seed(seed)
    n_shards = min(n_shards, len(groups))
    weight_map: dict[str, str] = {}
    total = 0
    for k in range(n_shards):
        file = "model.safetensors" if n_shards == 1 else f"model-{k + 1:05d}-of-{n_shards:05d}.safetensors"
        members = [item for j, group in enumerate(groups) if j * n_shards // len(groups) == k for item in group.items()]
        tensors = {name: random_tensor(name, shape, generator).to(dtype) for name, shape in members}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(t.nbytes for t in tensors.values())
    if n_shards > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
