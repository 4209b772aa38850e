"""Whether a GGUF file has the tensors that its metadata promises, in the shapes that follow from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quantcli.archs import Architecture
from quantcli.errors import CheckpointError
from quantcli.formats.gguf.file.container import Container
from quantcli.formats.gguf.model.metadata import head_dim


def check_tensors(container: Container, arch: Architecture, config: Mapping[str, Any]) -> None:
    """Raise :class:`CheckpointError` unless every layer has every tensor that any layer has, in the shape the metadata implies, and the
    file the tensors outside of them. Which tensors a layer has may differ only where some layers have experts and others none.
    """
    n_layers, specs = config["num_hidden_layers"], container.specs
    tokens = container.fields.get("tokenizer.ggml.tokens")
    if tokens is not None and isinstance(tokens.value, Sequence) and len(tokens.value) != config["vocab_size"] > 0:
        raise CheckpointError(
            f"{container.path}: token_embd.weight has {config['vocab_size']} rows, tokenizer.ggml.tokens {len(tokens.value)} tokens; "
            "llama.cpp loads no such file: convert the model again from a folder in which they agree"
        )
    if n_layers > len(specs):
        raise CheckpointError(f"{container.path}: {len(specs)} tensors cannot make the {n_layers} layers the metadata promises")
    shapes = expected_shapes(arch, config)
    for module, pattern in arch.gguf_names.items():
        targets = [f"{pattern.replace('{i}', str(i))}.weight" for i in range(n_layers)] if "{i}" in pattern else [f"{pattern}.weight"]
        may_lack = not any(name in specs for name in targets) and "{i}" in pattern and n_layers > 1
        may_lack |= targets == ["output.weight"] or (bool(arch.experts) and ".ffn_" in pattern)
        shape = next((shape for ending, shape in shapes.items() if f".{module}".endswith(ending)), None)
        for name in targets:
            if name not in specs and not may_lack:
                raise CheckpointError(f"{container.path}: tensor '{name}' is missing, and the metadata promises {n_layers} layers")
            if name in specs and shape not in (None, specs[name].shape):
                raise CheckpointError(f"{container.path}: tensor '{name}' is {list(specs[name].shape)}, the metadata gives {shape}")


def expected_shapes(arch: Architecture, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Ending of a module's name → the shape of its weight in the file, where the usual keys of a config give it."""
    hidden, wide, vocab = config["hidden_size"], config.get("intermediate_size"), config["vocab_size"]
    q, kv = (head_dim(config) * config[key] for key in ("num_attention_heads", "num_key_value_heads"))
    shapes: dict[str, tuple[int, ...]] = {
        ".self_attn.q_proj": (q, hidden),
        ".self_attn.k_proj": (kv, hidden),
        ".self_attn.v_proj": (kv, hidden),
        ".self_attn.o_proj": (hidden, q),
        ".query_key_value": (q + 2 * kv, hidden),
        ".c_attn": (q + 2 * kv, hidden),
        ".embed_tokens": (vocab, hidden),
        ".lm_head": (vocab, hidden),
        "layernorm": (hidden,),
        ".model.norm": (hidden,),
    }
    if config.get("kv_lora_rank"):
        shapes = latent_shapes(config) | {name: shape for name, shape in shapes.items() if ".self_attn." not in name}
    if wide is not None:
        shapes |= {".mlp.gate_proj": (wide, hidden), ".mlp.up_proj": (wide, hidden), ".mlp.down_proj": (hidden, wide)}
    return shapes


def latent_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The same of DeepSeek's attention, whose keys and values are made of a few shared numbers: keys turned, head by head."""
    heads, hidden, rank = config["num_attention_heads"], config["hidden_size"], config["kv_lora_rank"]
    width, values = config["qk_head_dim"], config["v_head_dim"]
    shapes: dict[str, tuple[int, ...]] = {
        ".self_attn.q_proj": (heads * width, hidden),
        ".self_attn.kv_a_proj_with_mqa": (rank + config["qk_rope_head_dim"], hidden),
        ".self_attn.kv_a_layernorm": (rank,),
        ".self_attn.k_b_proj.{e}": (heads, rank, config["qk_nope_head_dim"]),
        ".self_attn.v_b_proj.{e}": (heads, values, rank),
        ".self_attn.o_proj": (hidden, heads * values),
    }
    if q_rank := config.get("q_lora_rank"):
        shapes |= {".self_attn.q_a_proj": (q_rank, hidden), ".self_attn.q_a_layernorm": (q_rank,)}
        shapes |= {".self_attn.q_b_proj": (heads * width, q_rank)}
    return shapes
