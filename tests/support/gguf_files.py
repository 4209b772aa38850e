"""Small GGUF files of several architectures, written by their headers' words alone: what conversion of such models makes."""

from __future__ import annotations

from pathlib import Path

import torch
from gguf import GGUFValueType as T

from quantcli.formats.gguf.file.container import Field, tensor_spec
from quantcli.formats.gguf.file.headers import header
from quantcli.tensors import DTYPES

HIDDEN, WIDE, LAYERS, HEADS, KV_HEADS, VOCAB, EXPERTS = 256, 512, 4, 4, 2, 4096, 4

Shapes = dict[str, tuple[int, ...]]


def u32(value: int) -> Field:
    return Field(T.UINT32, value)


def f32(value: float) -> Field:
    return Field(T.FLOAT32, value)


def text(value: str) -> Field:
    return Field(T.STRING, value)


def sizes(arch: str, heads: int = HEADS, wide: int = WIDE) -> dict[str, Field]:
    """What every architecture says of itself."""
    return {
        "general.architecture": text(arch),
        "general.name": text("Random"),
        "general.file_type": u32(32),  # where convert_hf_to_gguf has it: llama-quantize moves it to the end
        f"{arch}.block_count": u32(LAYERS),
        f"{arch}.context_length": u32(256),
        f"{arch}.embedding_length": u32(HIDDEN),
        f"{arch}.feed_forward_length": u32(wide),
        f"{arch}.attention.head_count": u32(heads),
    }


ENDS: Shapes = {"token_embd.weight": (VOCAB, HIDDEN), "output_norm.weight": (HIDDEN,)}
KV = HIDDEN // HEADS * KV_HEADS
ATTENTION: Shapes = {
    "attn_norm.weight": (HIDDEN,),
    "attn_q.weight": (HIDDEN, HIDDEN),
    "attn_k.weight": (KV, HIDDEN),
    "attn_v.weight": (KV, HIDDEN),
    "attn_output.weight": (HIDDEN, HIDDEN),
    "ffn_norm.weight": (HIDDEN,),
}


def in_layers(shapes: Shapes) -> Shapes:
    return {f"blk.{i}.{name}": shape for i in range(LAYERS) for name, shape in shapes.items()}


def llama() -> tuple[dict[str, Field], Shapes]:
    keys = sizes("llama") | {"llama.attention.head_count_kv": u32(KV_HEADS), "llama.attention.layer_norm_rms_epsilon": f32(1e-5)}
    mlp = {"ffn_gate.weight": (WIDE, HIDDEN), "ffn_up.weight": (WIDE, HIDDEN), "ffn_down.weight": (HIDDEN, WIDE)}
    return keys, {"output.weight": (VOCAB, HIDDEN), **ENDS, **in_layers(ATTENTION | mlp)}


def mixtral() -> tuple[dict[str, Field], Shapes]:
    keys, _ = llama()
    keys |= {"llama.expert_count": u32(EXPERTS), "llama.expert_used_count": u32(2)}
    experts = {f"ffn_{word}_exps.weight": (EXPERTS, WIDE, HIDDEN) for word in ("gate", "up")}
    experts |= {"ffn_down_exps.weight": (EXPERTS, HIDDEN, WIDE), "ffn_gate_inp.weight": (EXPERTS, HIDDEN)}
    return keys, {"output.weight": (VOCAB, HIDDEN), **ENDS, **in_layers(ATTENTION | experts)}


def starcoder2() -> tuple[dict[str, Field], Shapes]:
    keys = sizes("starcoder2") | {
        "starcoder2.attention.head_count_kv": u32(KV_HEADS),
        "starcoder2.attention.layer_norm_epsilon": f32(1e-5),
    }
    mlp = {"ffn_up.weight": (WIDE, HIDDEN), "ffn_up.bias": (WIDE,), "ffn_down.weight": (HIDDEN, WIDE), "ffn_down.bias": (HIDDEN,)}
    return keys, {**ENDS, **in_layers(ATTENTION | mlp)}


def mamba() -> tuple[dict[str, Field], Shapes]:
    keys = sizes("mamba", heads=0, wide=0)
    words = {"conv_kernel": 4, "inner_size": WIDE, "state_size": 16, "time_step_rank": 16}
    keys |= {f"mamba.ssm.{word}": u32(value) for word, value in words.items()}
    keys |= {"mamba.attention.layer_norm_rms_epsilon": f32(1e-5), "mamba.ssm.dt_b_c_rms": Field(T.BOOL, False)}
    mixer: Shapes = {"ssm_a": (WIDE, 16), "ssm_conv1d.weight": (WIDE, 4), "ssm_dt.weight": (WIDE, 16), "ssm_d": (WIDE,)}
    mixer |= {"ssm_in.weight": (2 * WIDE, HIDDEN), "ssm_out.weight": (HIDDEN, WIDE), "ssm_x.weight": (48, WIDE)}
    return keys, {**ENDS, **in_layers({"attn_norm.weight": (HIDDEN,), **mixer})}


MODELS = {"llama": llama, "mixtral": mixtral, "starcoder2": starcoder2, "mamba": mamba}

KEPT_F32 = ("ffn_gate_inp", "ssm_a", "ssm_conv1d")
"""Matrices that conversion leaves in float32."""


def write_model(path: Path, name: str, dtype: str = "BF16", seed: int = 0) -> Path:
    """A random model of the architecture ``name`` at ``path``, its matrices in ``dtype``."""
    keys, shapes = MODELS[name]()
    random = torch.Generator().manual_seed(seed)
    specs = []
    for tensor, shape in shapes.items():
        is_matrix = len(shape) > 1 and not any(word in tensor for word in KEPT_F32)
        specs.append(tensor_spec(tensor, dtype if is_matrix else "F32", shape))
    keys["general.quantization_version"] = u32(2)
    head, offsets, size = header(keys, specs)
    data = bytearray(head + bytes(size - len(head)))
    for spec in specs:
        W = torch.randn(spec.shape, generator=random) * 0.02 + (spec.name.endswith("norm.weight"))
        raw = W.to(DTYPES[spec.dtype]).reshape(-1).view(torch.uint8).numpy().tobytes()
        data[offsets[spec.name] : offsets[spec.name] + len(raw)] = raw
    path.write_bytes(data)
    return path
