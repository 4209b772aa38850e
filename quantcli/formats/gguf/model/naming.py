"""Which tensor of a GGUF file each tensor of a model is, or is a slice of; and which have no place there, with the reason."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantcli import archs
from quantcli.archs import Architecture, StoredNames
from quantcli.errors import CheckpointError, UnsupportedError
from quantcli.tensors import TensorSpec

OTHER_PARTS = re.compile(r"(^|\.)(vision_\w+|visual|multi_modal_projector|audio_\w+|connector)\.")
"""In the names of what a model sees or hears with: llama.cpp keeps that in a file of its own, mmproj."""


@dataclass(frozen=True)
class Naming:
    """``names``: HF → GGUF name of every tensor of the file, in the file's order; ``dropped``: every other tensor → why it is left out."""

    names: Mapping[str, str]
    dropped: Mapping[str, str]


def architecture(config: Mapping[str, Any]) -> Architecture:
    """The architecture of ``config``, or :class:`UnsupportedError`; :class:`CheckpointError` when the config lacks its sizes."""
    if (arch := archs.of(config)) is None:
        raise UnsupportedError(
            f"model_type '{config.get('model_type')}' is not known to quantcli as GGUF; where llama.cpp knows it, "
            "convert_hf_to_gguf.py --outtype bf16 makes a .gguf that quantcli quantizes as its SOURCE"
        )
    if isinstance(arch, StoredNames):
        return arch  # whose config has what the file has
    usual = arch.usual(config)
    for key in ("num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size"):
        if type(usual.get(key)) is not int or usual[key] < 1:
            raise CheckpointError(f"config.json: {key} is {usual.get(key)!r}, expected a positive integer")
    return arch


def file_order(gguf_name: str) -> tuple[int, str]:
    """llama-quantize's order of tensors: those outside the layers first, then layer by layer, by name."""
    match = re.match(r"blk\.(\d+)\.", gguf_name)
    return (int(match[1]) if match else -1, gguf_name)


def gguf_names(specs: Mapping[str, TensorSpec], config: Mapping[str, Any]) -> dict[str, str]:
    """HF name → GGUF name of every tensor that a GGUF file holds, in the file's order. Experts' tensors of a layer share a name: they are
    its slices, in the order of their numbers."""
    return dict(naming(specs, config).names)


def naming(specs: Mapping[str, TensorSpec], config: Mapping[str, Any]) -> Naming:
    """Where every tensor goes; :class:`UnsupportedError` for one that the architecture does not know."""
    arch = architecture(config)
    usual = arch.usual(config)
    table: dict[str, str] = {}
    dropped: dict[str, str] = {}
    for name in specs:
        target = arch.gguf_name(name)
        if (reason := why_dropped(name, target, arch, usual)) is not None:
            dropped[name] = reason
        elif target is not None:
            table[name] = target
        else:
            raise UnsupportedError(f"{name}: {arch.gguf_arch} in GGUF has no such tensor; the model is no plain {config['model_type']}")
    slices = {target: numbered(arch, target, parts) for target, parts in slices_of(table).items()}
    names = {slices[target][k]: target for target in sorted(slices, key=file_order) for k in range(len(slices[target]))}
    return Naming(names, dropped)


def slices_of(names: Mapping[str, str]) -> dict[str, list[str]]:
    """GGUF name → the tensors that make it, which are several where it holds one of each expert. ``names``: HF → GGUF name."""
    slices: dict[str, list[str]] = {}
    for name, target in names.items():
        slices.setdefault(target, []).append(name)
    return slices


def why_dropped(name: str, target: str | None, arch: Architecture, config: Mapping[str, Any]) -> str | None:
    """The reason why GGUF has no place for tensor ``name``; None when it may have one. ``config``: with the usual keys."""
    if isinstance(arch, StoredNames):
        return None
    if (target == "output.weight" or name.endswith("lm_head.weight")) and config.get("tie_word_embeddings"):
        return "config.json ties the head to the embedding"
    if (reason := next((why for pattern, why in arch.dropped.items() if re.search(pattern, name)), None)) is not None:
        return reason
    if (layer := arch.layer_of(name)) is not None and layer >= config["num_hidden_layers"]:
        n, n_further = config["num_hidden_layers"], config.get("num_nextn_predict_layers")
        is_further = isinstance(n_further, int) and layer < n + n_further
        return f"layer {layer} comes after the {n} of config.json" + (": it predicts further tokens" if is_further else "")
    if target is None and name.startswith(("mtp.", "model.mtp.")):
        return "a head that predicts further tokens"
    return "what a model sees or hears with goes to a file of its own" if target is None and OTHER_PARTS.search(name) else None


def numbered(arch: Architecture, target: str, parts: Sequence[str]) -> dict[int, str]:
    """Number → slice of the GGUF tensor ``target``, which ``parts`` make; :class:`CheckpointError` unless these go from 0 without a gap."""
    by_number = {archs.slice_of(name) or 0: name for name in parts} if is_sliced(arch, target) else {0: parts[0]}
    if (missing := next((k for k in range(len(parts)) if k not in by_number), None)) is None:
        return by_number
    if len(by_number) < len(parts):
        raise CheckpointError(f"{parts[0]}: several tensors would be GGUF's {target}: {', '.join(parts[:3])}")
    raise CheckpointError(f"{parts[0]}: number {missing} of the {len(parts)} or more that make GGUF's {target} is missing")


def slice_number(arch: Architecture, name: str, gguf_name: str) -> int | None:
    """Which slice of ``gguf_name`` the tensor ``name`` is; None when it is the whole."""
    return archs.slice_of(name) if is_sliced(arch, gguf_name) else None


def is_sliced(arch: Architecture, gguf_name: str) -> bool:
    """Whether the GGUF tensor holds one of each expert."""
    return "{e}" in (arch.hf_name(gguf_name) or "")


def slice_name(gguf_name: str, number: int) -> str:
    """What slice ``number`` of a tensor is called until the file's header names the whole."""
    return f"{gguf_name}[{number}]"


def scale_name(gguf_name: str) -> str:
    """The tensor that holds the scale of a matrix, or of a slice."""
    return gguf_name.replace(".weight", ".scale")


def whole(specs: Iterable[TensorSpec]) -> list[tuple[TensorSpec, list[TensorSpec]]]:
    """The tensors that ``specs`` make: each with its slices by number, or with itself alone. In the file's order."""
    groups: dict[str, dict[int, TensorSpec]] = {}
    alone: list[tuple[TensorSpec, list[TensorSpec]]] = []
    for spec in specs:
        if (match := re.fullmatch(r"(.*)\[(\d+)\]", spec.name)) is None:
            alone.append((spec, [spec]))
        else:
            groups.setdefault(match[1], {})[int(match[2])] = spec
    stacked = [(stack(name, slices), [slices[k] for k in sorted(slices)]) for name, slices in groups.items()]
    return sorted([*alone, *stacked], key=lambda item: file_order(item[0].name))


def stack(name: str, slices: Mapping[int, TensorSpec]) -> TensorSpec:
    """The spec of the tensor ``name`` made of ``slices``; :class:`UnsupportedError` when these differ in type or shape."""
    first = slices[0]
    for k, spec in slices.items():
        if (spec.dtype, spec.shape) != (first.dtype, first.shape):
            raise UnsupportedError(
                f"{name}: slice {k} would be {spec.dtype} {list(spec.shape)}, slice 0 {first.dtype} {list(first.shape)}; "
                "in GGUF the experts of a layer are one tensor of one type: give them all the same scheme"
            )
    return TensorSpec(name, first.dtype, (len(slices), *first.shape), len(slices) * first.nbytes)
