"""Hugging Face's config.json, rebuilt from the metadata of a GGUF file."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from quantcli.archs import REQUIRED, Architecture, Key
from quantcli.checkpoint.json_files import shown
from quantcli.errors import CheckpointError, UnsupportedError
from quantcli.formats.gguf.file.container import Container
from quantcli.formats.gguf.model.metadata import GATING_FUNCTIONS

YARN_NAMES = {"extrapolation_factor": "ext_factor", "attention_factor": "attn_factor", "beta_fast": "beta_fast", "beta_slow": "beta_slow"}


def config_of(container: Container, arch: Architecture) -> dict[str, Any]:
    """HF's config.json rebuilt from the metadata of a GGUF file; llama3's rotary scaling is left to the caller, who can read tensors."""
    p, specs = arch.gguf_arch, container.specs
    config: dict[str, Any] = {"architectures": [arch.hf_class], "model_type": arch.model_types[0], **arch.fixed}
    for key in arch.keys:
        if isinstance(key, Key) and key.config_keys:
            value = _value(container, f"{p}.{key.name}", key)
            config |= {} if value in (None, key.default) else {key.all_config_keys[0]: value}
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    if any(isinstance(key, Key) and key.name == "attention.key_length" for key in arch.keys):  # elsewhere no width but the usual is known
        config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    config |= {
        "rope_parameters": _rope(container, p),
        "vocab_size": specs["token_embd.weight"].shape[0] if "token_embd.weight" in specs else 0,
        "tie_word_embeddings": "output.weight" not in specs,
        "dtype": "float32",
    }
    for key, tensor in arch.present.items():
        layers = range(min(config["num_hidden_layers"], len(specs)))
        config[key] = any(arch.gguf_name(f"{arch.layer}.{tensor}".replace("{i}", str(i))) in specs for i in layers)
    for name in arch.restored:
        config |= RESTORED[name](config)
    ids = {role: container.get(f"tokenizer.ggml.{key}_token_id") for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))}
    # A family's own default may be beyond this model's vocabulary.
    return config | {"pad_token_id": None} | {f"{role}_token_id": value for role, value in ids.items() if isinstance(value, int)}


def _value(container: Container, name: str, key: Key) -> Any:
    """The value of a key, checked; None when the file has none and need not."""
    if name not in container.fields and key.default is not REQUIRED:
        return None
    if key.kind == "f32":
        return _float(container, name, 1e-6)
    if key.kind == "u32":
        return _integer(container, name, least=int(key.default is REQUIRED))
    value = container.get(name)
    if not isinstance(value, {"bool": bool, "str": str}[key.kind]):
        raise CheckpointError(f"{container.path}: metadata key '{name}' is {shown(value)}, expected a {key.kind}")
    return value


def _integer(container: Container, key: str, *, least: int = 1) -> int:
    value = container.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise CheckpointError(f"{container.path}: metadata key '{key}' is {shown(value)}, expected an integer of at least {least}")
    return value


def gemma2_scale(config: Mapping[str, Any]) -> dict[str, Any]:
    """llama.cpp knows the 27B, whose queries are scaled by another width than their own, by its layers."""
    return {"query_pre_attn_scalar": query_width(config, n_layers_27b=46)}


def gemma3_scale(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"query_pre_attn_scalar": query_width(config, n_layers_27b=62)}


def query_width(config: Mapping[str, Any], *, n_layers_27b: int) -> int:
    is_27b = config["num_hidden_layers"] == n_layers_27b
    width: int = config["hidden_size"] // config["num_attention_heads"] if is_27b else config["head_dim"]
    return width


def untruncated_yarn(config: Mapping[str, Any]) -> dict[str, Any]:
    """Every published gpt-oss leaves the bounds of YaRN's ramp unrounded; llama.cpp rounds them, and has no key for it."""
    rope = config["rope_parameters"]
    return {"rope_parameters": rope | {"truncate": False}} if rope["rope_type"] == "yarn" else {}


def falcon_heads(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that the family has of its own: where not all heads have keys, ``multi_query``; the newer models have two norms."""
    n_kv, is_new = config["num_key_value_heads"], config["new_decoder_architecture"]
    if config["num_attention_heads"] % n_kv:
        raise UnsupportedError(f"{config['num_attention_heads']} heads cannot share {n_kv} heads of keys")
    return {"num_kv_heads": n_kv, "multi_query": n_kv == 1 or is_new, "num_ln_in_parallel_attn": 2 if is_new else None}


def gpt2_width(config: Mapping[str, Any]) -> dict[str, Any]:
    """Every published GPT-2 leaves the usual width of its MLP unsaid."""
    return {"n_inner": None} if config.get("n_inner") == 4 * config["hidden_size"] else {}


def deepseek_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """V3 is the one whose routers have a correction. What the file leaves out was zero, or false."""
    rotated = config["qk_rope_head_dim"]
    rope = {key: value for key, value in config["rope_parameters"].items() if key != "partial_rotary_factor"}
    if (mscale := config.get("mscale_all_dim")) is not None:
        rope["mscale"] = rope["mscale_all_dim"] = float(f"{10 * mscale:.6g}")  # llama.cpp takes both to be the same
    keys: dict[str, Any] = {"qk_nope_head_dim": config["qk_head_dim"] - rotated, "head_dim": rotated, "rope_parameters": rope}
    absent = {"q_lora_rank": None, "n_shared_experts": 0, "first_k_dense_replace": 0, "norm_topk_prob": False}
    keys |= {key: value for key, value in absent.items() if key not in config}
    if config["has_score_correction"]:
        keys |= {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "topk_method": "noaux_tc"}
    else:
        keys["topk_method"] = "group_limited_greedy" if config.get("n_group", 1) > 1 else "greedy"
    if (number := config.get("scoring_func")) is not None:
        known = {number: name for name, number in GATING_FUNCTIONS.items()}
        if number not in known:
            raise UnsupportedError(f"expert_gating_func {number}: quantcli knows {', '.join(f'{n} ({name})' for n, name in known.items())}")
        keys["scoring_func"] = known[number]
    return keys


RESTORED: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "gemma 2's query scale": gemma2_scale,
    "gemma 3's query scale": gemma3_scale,
    "gpt-oss's untruncated yarn": untruncated_yarn,
    "falcon's heads": falcon_heads,
    "gpt2's width": gpt2_width,
    "deepseek's keys": deepseek_keys,
}
"""Keys of a config whose values llama.cpp knows without metadata: name in an architecture's literal → config so far → keys and values."""


def _rope(container: Container, p: str) -> dict[str, Any]:
    """HF's rotary parameters; where layers with a window have a base of their own, by kind of layer."""
    rope = _full_rope(container, p)
    if f"{p}.rope.freq_base_swa" not in container.fields:
        return rope
    window = {"rope_type": "default", "rope_theta": _float(container, f"{p}.rope.freq_base_swa", 10000.0)}
    return {"full_attention": rope, "sliding_attention": window}


def _full_rope(container: Container, p: str) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": _float(container, f"{p}.rope.freq_base", 10000.0)}
    hidden, heads = (_integer(container, f"{p}.{key}") for key in ("embedding_length", "attention.head_count"))
    width, rotated = max(hidden // heads, 1), f"{p}.rope.dimension_count"
    if f"{p}.attention.key_length" in container.fields:
        width = _integer(container, f"{p}.attention.key_length")
    if rotated in container.fields and (n := _integer(container, rotated)) != width:
        rope["partial_rotary_factor"] = n / width
    kind = container.get(f"{p}.rope.scaling.type", "none")
    kind = kind if isinstance(kind, str) else type(kind).__name__
    if kind == "none":
        return rope
    if kind not in ("linear", "yarn"):
        raise UnsupportedError(f"{container.path}: rotary scaling {shown(kind)}; quantcli reads linear, yarn and llama3")
    rope |= {"rope_type": kind, "factor": _float(container, f"{p}.rope.scaling.factor", 1.0)}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = _integer(container, f"{p}.rope.scaling.original_context_length")
        keys = {name: f"{p}.rope.scaling.yarn_{key}" for name, key in YARN_NAMES.items()}
        rope |= {name: _float(container, key, 0.0) for name, key in keys.items() if key in container.fields}
    return rope


def _float(container: Container, key: str, default: float) -> float:
    """The float64 with the fewest digits that is the float32 of metadata ``key``: 1e-06, not 9.99999997e-07."""
    value = container.get(key, default)
    number = float(str(np.float32(value))) if isinstance(value, (int, float)) else math.nan
    if not math.isfinite(number):
        raise CheckpointError(f"{container.path}: metadata key '{key}' is {shown(value)}, expected a finite number")
    return number
