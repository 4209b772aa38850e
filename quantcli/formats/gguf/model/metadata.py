"""A model's configuration as GGUF metadata: the keys convert_hf_to_gguf writes, as the architecture's literal lists them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import yaml
from gguf import GGUFValueType, GGUFWriter, RopeScalingType

from quantcli.archs import REQUIRED, Architecture, Key
from quantcli.archs.shared.transformations import falcon_key_heads
from quantcli.checkpoint.hub import repository_of
from quantcli.checkpoint.json_files import read_json
from quantcli.errors import CheckpointError, UnsupportedError
from quantcli.formats.gguf.file.container import Field

QUANTIZATION_KEYS = ("general.quantization_version", "general.file_type")


def general(keys: GGUFWriter, folder: Path, *, name: str | None) -> None:
    """general.*: what the model card, generation_config.json and the folder's name give; ``name`` (a Hub id) replaces a guessed one.

    ``keys`` knows the file's tensors, whose parameters make the size label.
    """
    counts = keys.get_total_parameter_count()
    generation = read_object(folder / "generation_config.json")  # before the gguf package reads it, without bounds
    try:
        card = gguf.Metadata.load(None, folder, name, counts[0])
        if (repository := repository_of(folder)) is not None:
            card = named_after(card, folder, repository, counts[0])
            card.name = name or card.name
    except (yaml.YAMLError, ValueError, AttributeError, TypeError, KeyError) as error:
        hint = "correct or remove README.md or generation_config.json"
        raise CheckpointError(f"{folder}: the model card cannot be read ({str(error)[:100]}); {hint}") from error
    card.name = card.name or folder.resolve().name
    if card.sampling_penalty_repeat is None:
        card.sampling_penalty_repeat = generation.get("repetition_penalty")
    card.size_label = card.size_label or gguf.size_label(*counts)
    keys.add_type(gguf.GGUFType.MODEL)
    card.set_gguf_meta_model(keys)


def named_after(card: gguf.Metadata, folder: Path, repository: str, n_parameters: int) -> gguf.Metadata:
    """``card`` of a snapshot in the Hub's cache, with what is guessed from a folder's name guessed from the repository's."""
    files = gguf.Metadata.load_model_card(folder), gguf.Metadata.load_hf_parameters(folder)
    guessed = gguf.Metadata.apply_metadata_heuristic(gguf.Metadata(), *files, Path(repository), n_parameters)
    return replace(
        card,
        name=guessed.name,
        organization=guessed.organization,
        basename=guessed.basename,
        finetune=guessed.finetune,
        version=guessed.version,
        size_label=guessed.size_label,
    )


def hyperparameters(keys: GGUFWriter, arch: Architecture, config: Mapping[str, Any]) -> None:
    """What ``arch`` takes from ``config`` (with the usual keys) under the architecture's prefix: sizes, rotary embedding, norm epsilon."""
    try:
        for key in arch.keys:
            if isinstance(key, str):
                GROUPS[key](keys, config)
                continue
            if (value := value_of(key, config)) is not None:
                _add(keys, f"{arch.gguf_arch}.{key.name}", value, KINDS[key.kind])
    except KeyError as error:
        raise CheckpointError(f"config.json has no {error}, which GGUF needs; complete it and try again") from error


def value_of(key: Key, config: Mapping[str, Any]) -> Any:
    """What the file gets under ``key``; None when it leaves the key out; KeyError when it must not."""
    if key.computed is not None:
        value = COMPUTED[key.computed](config)
    else:
        value = next((config[name] for name in key.all_config_keys if config.get(name) is not None), None)
    if value is None and key.default is REQUIRED:
        raise KeyError(key.all_config_keys[0])
    return key.default if value is None else value


def _add(keys: GGUFWriter, name: str, value: Any, kind: GGUFValueType) -> None:
    if isinstance(value, list | tuple):
        keys.add_key_value(name, list(value), GGUFValueType.ARRAY, kind)
    else:
        keys.add_key_value(name, value, kind)


KINDS = {"u32": GGUFValueType.UINT32, "f32": GGUFValueType.FLOAT32, "bool": GGUFValueType.BOOL, "str": GGUFValueType.STRING}


def head_dim(config: Mapping[str, Any]) -> int:
    width: int = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return width


def rotary_width(config: Mapping[str, Any]) -> int:
    """How many dimensions of a head are rotated, where all heads together are as wide as the hidden states."""
    share = rope_parameters(config).get("partial_rotary_factor", 1.0)
    width: int = int(share * config["hidden_size"]) // config["num_attention_heads"]
    return width


def windowed_layers(config: Mapping[str, Any]) -> list[bool]:
    """Which layers see a window only; where config.json does not list them, all but every fourth."""
    if (kinds := config.get("layer_types")) is not None:
        return [kind == "sliding_attention" for kind in kinds]
    return [(i + 1) % 4 != 0 for i in range(config["num_hidden_layers"])]


def context_before_longrope(config: Mapping[str, Any]) -> int:
    key = "original_max_position_embeddings"
    context: int = rope_parameters(config).get(key) or config[key]
    return context


def longrope_attention_factor(config: Mapping[str, Any]) -> float | None:
    """What attention is scaled by for the longer context of longrope; None where there is no table of its factors."""
    rope = rope_parameters(config)
    if not rope.get("long_factor"):
        return None
    before = context_before_longrope(config)
    stretch = config["max_position_embeddings"] / before
    if stretch <= 1:
        return 1.0
    return 0.1 * math.log(stretch) + 1 if rope["rope_type"] == "yarn" else math.sqrt(1 + math.log(stretch) / math.log(before))


GATING_FUNCTIONS = {"softmax": int(gguf.ExpertGatingFuncType.SOFTMAX), "sigmoid": int(gguf.ExpertGatingFuncType.SIGMOID)}


def gating_function(config: Mapping[str, Any]) -> int | None:
    """llama.cpp's number for how a router's scores become weights; None where config.json has none."""
    if (name := config.get("scoring_func")) is None:
        return None
    if name not in GATING_FUNCTIONS:
        raise UnsupportedError(f"config.json: scoring_func '{name}' cannot be written as GGUF; known are {', '.join(GATING_FUNCTIONS)}")
    return GATING_FUNCTIONS[name]


COMPUTED: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "head_dim": head_dim,
    "rotary width of equal heads": rotary_width,
    "rotated share of a head": lambda config: int(head_dim(config) * rope_parameters(config).get("partial_rotary_factor", 1.0)),
    "gpt2's width": lambda config: config.get("n_inner") or 4 * config["hidden_size"],
    "falcon's width": lambda config: config.get("ffn_hidden_size") or 4 * config["hidden_size"],
    "falcon's key heads": falcon_key_heads,
    "gating function": gating_function,
    "MLA's key width": lambda config: config["kv_lora_rank"] + config["qk_rope_head_dim"],
    "MLA's key width, uncompressed": lambda config: config["qk_nope_head_dim"] + config["qk_rope_head_dim"],
    "yarn's log multiplier": lambda config: None if (all_dim := rope_parameters(config).get("mscale_all_dim")) is None else 0.1 * all_dim,
    "normed expert weights": lambda config: config.get("norm_topk_prob") or None,
    "rotary base": lambda config: rope_parameters(config)["rope_theta"],
    "layers with a window, three of four": windowed_layers,
    "context before longrope": context_before_longrope,
    "longrope's attention factor": longrope_attention_factor,
}
"""Values of keys that no config.json has as they are: what an architecture's literal names → config with the usual keys → value."""


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """HF's rotary parameters under the keys of transformers 5, whichever version wrote ``config``: of the layers that see everything."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope = dict(rope.get("full_attention", rope))
    rope.setdefault("rope_type", rope.pop("type", "default"))
    for key, default in (("rope_theta", 10000.0), ("partial_rotary_factor", None)):
        if (value := config.get(key, default)) is not None:
            rope.setdefault(key, value)
    return rope


def window_base(config: Mapping[str, Any]) -> float | None:
    """The rotary base of the layers that see a window only, where it is given separately."""
    rope = (config.get("rope_parameters") or {}).get("sliding_attention") or {}
    return rope.get("rope_theta", config.get("rope_local_base_freq"))


def rope_keys(keys: GGUFWriter, config: Mapping[str, Any]) -> None:
    """The rotary base and its scaling. Llama 3's scaling has no key: it is the tensor rope_freqs.weight. ``dynamic`` has none
    either, and equals no scaling within the context the model was trained on.
    """
    rope = rope_parameters(config)
    kind = rope["rope_type"]
    if kind not in ("default", "linear", "yarn", "llama3", "dynamic"):
        raise UnsupportedError(f"config.json: rotary scaling '{kind}' cannot be written as GGUF; known are linear, yarn, llama3, dynamic")
    if kind in ("linear", "yarn"):
        keys.add_rope_scaling_type(RopeScalingType(kind))
        keys.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        keys.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        for key, add in YARN_KEYS.items():
            if rope.get(key) is not None:
                getattr(keys, add)(rope[key])
    keys.add_rope_freq_base(rope["rope_theta"])
    if (base := window_base(config)) is not None:
        keys.add_rope_freq_base_swa(base)


GROUPS: dict[str, Callable[[GGUFWriter, Mapping[str, Any]], None]] = {"rope": rope_keys}
"""Keys that belong together, by their name in an architecture's literal."""

YARN_KEYS = {
    "extrapolation_factor": "add_rope_scaling_yarn_ext_factor",
    "attention_factor": "add_rope_scaling_yarn_attn_factor",
    "beta_fast": "add_rope_scaling_yarn_beta_fast",
    "beta_slow": "add_rope_scaling_yarn_beta_slow",
}


def fields_of(keys: GGUFWriter) -> dict[str, Field]:
    """What was added to ``keys``, typed as GGUFWriter would write it; :class:`CheckpointError` for a value that is not of its type."""
    return {key: _field(key, entry.value, entry.type, entry.sub_type) for key, entry in keys.kv_data[0].items()}


def _field(key: str, value: Any, kind: GGUFValueType, element: GGUFValueType | None) -> Field:
    if kind != GGUFValueType.ARRAY:
        _check(key, [value], kind)
        return Field(kind, value)
    if isinstance(value, bytes):
        return Field(kind, np.frombuffer(value, np.uint8), GGUFValueType.UINT8)
    values = list(value)
    element = GGUFValueType.get_type(values[0]) if element is None else element
    _check(key, values, element)
    return Field(kind, values, element)


def _check(key: str, values: Sequence[Any], kind: GGUFValueType) -> None:
    """Raise :class:`CheckpointError` unless ``values``, which a model's own files gave, are what the key takes."""
    allowed = {GGUFValueType.STRING: (str,), GGUFValueType.BOOL: (bool,)}.get(kind, (int, float))
    wrong = {t for t in {type(value) for value in values} if not issubclass(t, allowed) or (t is bool and kind != GGUFValueType.BOOL)}
    if wrong:
        value = next(value for value in values if type(value) in wrong)
        raise CheckpointError(f"'{key}' would be {value!r}, expected {kind.name}; correct config.json, generation_config.json or README.md")


def plain_field(value: Any) -> Field:
    """A field for a plain value: what GGUF has no type for (dicts, lists of mixed things) becomes JSON text."""
    if isinstance(value, bool):
        return Field(GGUFValueType.BOOL, value)
    if isinstance(value, int):
        return Field(GGUFValueType.INT64, value)
    if isinstance(value, float):
        return Field(GGUFValueType.FLOAT64, value)
    return Field(GGUFValueType.STRING, value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False))


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object, {} when there is no such file; :class:`CheckpointError` when it is something else."""
    content = read_json(path, unique=False) if path.is_file() else {}
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: is no JSON object")
    return content
