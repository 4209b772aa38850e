"""Whether a GGUF file has the tensors that its metadata promises, in the shapes that follow from it."""

from __future__ import annotations

from collections.abc import Mapping

from quantcli.archs import Architecture
from quantcli.errors import CheckpointError
from quantcli.formats.gguf.container import Container


def check_tensors(container: Container, arch: Architecture, config: Mapping) -> None:
    """Raise :class:`CheckpointError` unless every layer has every tensor that any layer has, in the shape the metadata implies, and the
    file the tensors outside of them. Which tensors a layer has may differ only where some layers have experts and others none.
    """
    n_layers, specs = config["num_hidden_layers"], container.specs
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
                raise CheckpointError(f"{container.path}: tensor '{name}' is {list(specs[name].shape)}, the metadata says {shape}")


def expected_shapes(arch: Architecture, config: Mapping) -> dict[str, tuple[int, ...]]:
    """Ending of a module's name → the shape of its weight in the file, where the usual words of a config tell it."""
    hidden, wide, vocab = config["hidden_size"], config.get("intermediate_size"), config["vocab_size"]
    q, kv = (config["head_dim"] * config[key] for key in ("num_attention_heads", "num_key_value_heads"))
    shapes: dict[str, tuple[int, ...]] = {
        ".self_attn.q_proj": (q, hidden),
        ".self_attn.k_proj": (kv, hidden),
        ".self_attn.v_proj": (kv, hidden),
        ".self_attn.o_proj": (hidden, q),
        ".embed_tokens": (vocab, hidden),
        ".lm_head": (vocab, hidden),
        "layernorm": (hidden,),
        ".model.norm": (hidden,),
    }
    if wide is not None:
        shapes |= {".mlp.gate_proj": (wide, hidden), ".mlp.up_proj": (wide, hidden), ".mlp.down_proj": (hidden, wide)}
    return shapes
