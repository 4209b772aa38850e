"""Models as llama-quantize's rules see them: metadata and shapes, and no weights. What it chooses for them stands in data/mixes.json."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFValueType

from quantcli.formats.gguf.file import container, headers
from quantcli.formats.gguf.file.container import Field
from quantcli.formats.gguf.types.filetypes import file_order
from support.places import DATA

GOLDEN = DATA / "mixes.json"
LEFT = "-"
"""In a golden: the tensor is none that llama-quantize touches."""

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Model:
    """``metadata``: keys without the architecture's prefix; ``shapes``: by GGUF name, two rows standing for any number of them."""

    arch: str
    metadata: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def fields(self) -> dict[str, Field]:
        """Every key that llama.cpp asks for before it quantizes."""
        said = {"context_length": 64, "embedding_length": 256, "feed_forward_length": 512, **self.metadata}
        typed = {f"{self.arch}.{key}": field(value) for key, value in said.items()}
        return {"general.architecture": Field(GGUFValueType.STRING, self.arch), **typed}

    @property
    def names(self) -> list[str]:
        return sorted(self.shapes, key=file_order)


def field(value: Any) -> Field:
    if isinstance(value, list):
        return Field(GGUFValueType.ARRAY, value, GGUFValueType.UINT32)
    kind = {bool: GGUFValueType.BOOL, int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32}[type(value)]
    return Field(kind, value)


def shapes(n_layers: int, layer: Mapping[str, tuple[int, ...]], *, first: int = 0, head: bool = True, wide: int = 256) -> Shapes:
    """Of layers ``first`` … ``n_layers`` with the tensors ``layer``, an embedding of ``wide`` inputs, and a head where there is one."""
    found: Shapes = {"token_embd.weight": (2, wide), "output_norm.weight": (wide,)} | ({"output.weight": (2, wide)} if head else {})
    for i in range(first, n_layers):
        found |= {f"blk.{i}.{name}.weight": shape for name, shape in layer.items()}
    return found


def sizes(n_layers: int, heads: int = 8, kv_heads: int = 8, epsilon: str = "rms_epsilon", **more: Any) -> dict[str, Any]:
    names = {"block_count": n_layers, "attention.head_count": heads, "attention.head_count_kv": kv_heads}
    return {**names, f"attention.layer_norm_{epsilon}": 1e-5, **more}


def experts(n: int, used: int = 2, **more: Any) -> dict[str, Any]:
    return {"expert_count": n, "expert_used_count": used, **more}


ATTENTION: Shapes = {"attn_q": (2, 256), "attn_k": (2, 256), "attn_v": (2, 256), "attn_output": (2, 256), "attn_norm": (256,)}
FFN: Shapes = {"ffn_gate": (2, 256), "ffn_up": (2, 256), "ffn_down": (2, 512), "ffn_norm": (256,)}
FUSED: Shapes = {"attn_qkv": (2, 256), "attn_output": (2, 256), "ffn_up": (2, 256), "ffn_down": (2, 512)}
MLA: Shapes = {
    "attn_q_a": (2, 256),
    "attn_q_a_norm": (256,),
    "attn_q_b": (2, 256),
    "attn_kv_a_mqa": (2, 256),
    "attn_kv_a_norm": (256,),
    "attn_k_b": (4, 2, 256),
    "attn_v_b": (4, 2, 256),
    "attn_output": (2, 256),
}
"""DeepSeek's attention: keys and values of each head from one latent row."""
HYBRID = {"ssm.conv_kernel": 4, "kda.head_dim": 64}
LATENT = {"attention.key_length_mla": 64, "attention.value_length_mla": 64, "attention.kv_lora_rank": 64, "attention.q_lora_rank": 64}


def routed(n: int, *, shared: bool = False, wide: int = 256, inner: int = 512) -> Shapes:
    """The experts of a layer, and the one that every token goes through."""
    stacked: Shapes = {"ffn_gate_exps": (n, 2, wide), "ffn_up_exps": (n, 2, wide), "ffn_down_exps": (n, 2, inner)}
    common: Shapes = {"ffn_gate_shexp": (2, wide), "ffn_up_shexp": (2, wide), "ffn_down_shexp": (2, inner), "ffn_gate_inp_shexp": (1, wide)}
    return {"ffn_gate_inp": (n, wide), **stacked, **(common if shared else {})}


DENSE_LLAMA = {**ATTENTION, **FFN}
MIXTRAL = {**ATTENTION, **routed(8)}
DEEPSEEK = {**MLA, **routed(16, shared=True)}
GPT_OSS = {"attn_q": (2, 2880), "attn_k": (2, 2880), "attn_v": (2, 2880), "attn_output": (2, 4096), **routed(32, wide=2880, inner=2880)}
OTHERS: Shapes = {
    **dict.fromkeys(("altup_proj", "laurel_l", "ssm_conv1d", "ssm_in", "time_mix_w1", "time_mix_decay_w2", "time_mix_key"), (2, 256)),
    **dict.fromkeys(("attn_rel_b", "indexer.k_proj", "indexer.attn_k", "inp_gate", "nextn.eh_proj", "one"), (2, 256)),
    "attn_q_norm": (2, 256),
    "ffn_gate_up_exps": (4, 2, 256),
}
"""Matrices that are left alone, or have no rule, wherever they stand."""

MODELS = {
    "llama": Model("llama", sizes(16), shapes(16, DENSE_LLAMA)),
    "llama, tied, five queries a key": Model("llama", sizes(22, 40, 8), shapes(22, DENSE_LLAMA, head=False)),
    "llama, three queries a key": Model("llama", sizes(9, 12, 4), shapes(9, DENSE_LLAMA)),
    "llama, rows of 288": Model("llama", sizes(8), shapes(8, {name: (*s[:-1], s[-1] + 32) for name, s in DENSE_LLAMA.items()}, wide=288)),
    "llama, rows of 260": Model("llama", sizes(8), shapes(8, {name: (*s[:-1], s[-1] + 4) for name, s in DENSE_LLAMA.items()}, wide=260)),
    "llama of 80 layers, 70B": Model("llama", sizes(80, 64, 8), shapes(80, {"attn_v": (2, 256), "ffn_down": (2, 512)})),
    "llama of 80 layers, 65B": Model("llama", sizes(80, 64, 64), shapes(80, {"attn_v": (2, 256), "ffn_down": (2, 512)})),
    "qwen2 of 80 layers": Model("qwen2", sizes(80, 64, 8), shapes(80, {"attn_v": (2, 256), "ffn_down": (2, 512)})),
    "mixtral": Model("llama", sizes(16, 32, 8, **experts(8)), shapes(16, MIXTRAL)),
    "four experts": Model("llama", sizes(16, **experts(4)), shapes(16, {**ATTENTION, **routed(4)})),
    "two experts, tied": Model("llama", sizes(10, **experts(2)), shapes(10, {**ATTENTION, **routed(2)}, head=False)),
    "qwen3moe": Model("qwen3moe", sizes(12, 32, 4, **experts(32)), shapes(12, {**ATTENTION, **routed(32)})),
    "falcon": Model("falcon", sizes(32, 71, 1, "epsilon"), shapes(32, FUSED)),
    "gpt2, tied": Model("gpt2", sizes(12, epsilon="epsilon"), shapes(12, FUSED, head=False) | {"position_embd.weight": (2, 256)}),
    "phi3": Model("phi3", sizes(8, 32, 8), shapes(8, FUSED)),
    "gemma3, heads by layer": Model("gemma3", sizes(18, kv_heads=[4] * 18), shapes(18, DENSE_LLAMA, head=False)),
    "deepseek2": Model(
        "deepseek2",
        sizes(16, 16, 1, **LATENT, **experts(16, expert_feed_forward_length=512, expert_shared_count=1, leading_dense_block_count=3)),
        shapes(16, DEEPSEEK, first=3) | shapes(3, {**MLA, **FFN}),
    ),
    "gpt-oss": Model(
        "gpt-oss",
        sizes(8, 64, 8, **experts(32, 4, expert_feed_forward_length=2880), **{"attention.sliding_window": 128}),
        shapes(8, GPT_OSS, wide=2880),
    ),
    "bailingmoe3": Model(
        "bailingmoe3",
        sizes(
            4,
            **LATENT,
            **HYBRID,
            **experts(4, expert_feed_forward_length=512, expert_shared_count=1, leading_dense_block_count=0, expert_gating_func=1),
            **{"kda.safe_gate": True, "kda.gate_lower_bound": -5.0},
        ),
        shapes(4, {**MLA, **routed(4, shared=True)}),
    ),
    "glm5-next": Model(
        "glm5-next",
        sizes(
            4,
            **LATENT,
            **HYBRID,
            **experts(4, expert_feed_forward_length=512, expert_shared_count=1),
            **{f"attention.indexer.{key}": 4 for key in ("head_count", "key_length", "top_k", "kpool")},
            **{"hyper_connection.count": 4, "hyper_connection.sinkhorn_iterations": 4, "hyper_connection.epsilon": 1e-5},
        ),
        shapes(4, {**MLA, **OTHERS, "hc_attn_base": (2, 256), "ssm_beta": (2, 256), "ssm_out": (2, 256)}),
    ),
    "matrices of other kinds": Model(
        "gemma3", sizes(8), shapes(8, OTHERS | DENSE_LLAMA, head=False) | {"per_layer_token_embd.weight": (2, 256)}
    ),
}


def sparse_file(model: Model, path: Path) -> Path:
    """A GGUF file of ``model`` whose float32 weights are a hole in the file."""
    head, _, size = headers.header(model.fields, [container.tensor_spec(name, "F32", model.shapes[name]) for name in model.names])
    path.write_bytes(head)
    os.truncate(path, size)
    return path


def some_imatrix(path: Path) -> Path:
    """A legacy importance matrix of one tensor that no model has: that there is one is all that the choice of types looks at."""
    name = b"no.such.tensor"
    path.write_bytes(struct.pack("<ii", 1, len(name)) + name + struct.pack("<iif", 1, 1, 1.0))
    return path


def types_by_llama_quantize(program: Path, model: Path, file_type: str, *options: str | Path) -> dict[str, str]:
    """GGUF name → type that ``llama-quantize --dry-run`` would give each tensor that it would change."""
    command = [program, "--dry-run", *options, model, file_type]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command}: {done.stdout[-500:]} {done.stderr[-2000:]}")
    lines = re.findall(r"\] (\S+) +- \[.*?size = .*? MiB(?: -> .*? MiB \((\w+)\))?$", done.stdout + done.stderr, re.MULTILINE)
    return {name: ggml_type.upper() for name, ggml_type in lines if ggml_type}


def golden() -> dict[str, dict[str, dict[str, str]]]:
    """Model → file type (with " weighed" behind it where there was an importance matrix) → GGUF name → type."""
    data = json.loads(GOLDEN.read_text())
    named: dict[str, dict[str, dict[str, str]]] = {}
    for model, rows in data["models"].items():
        names = MODELS[model].names
        named[model] = {
            row: {name: data["letters"][letter] for name, letter in zip(names, letters, strict=True) if letter != LEFT}
            for row, letters in rows.items()
        }
    return named
