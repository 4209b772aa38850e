"""A GGUF file as a checkpoint, whoever wrote it: under Hugging Face's names, row order and config, or taken as it is."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from quantcli import archs, qtypes
from quantcli.archs import Architecture
from quantcli.checkpoint import views
from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.json_files import shown
from quantcli.checkpoint.locations import Location, read_tensor
from quantcli.errors import CheckpointError, UnsupportedError
from quantcli.formats.gguf.file.container import Container, Field, qtype_of, row_bytes
from quantcli.formats.gguf.file.splits import read_model
from quantcli.formats.gguf.model import rope
from quantcli.formats.gguf.model.configuration import config_of
from quantcli.formats.gguf.model.expected import check_tensors
from quantcli.formats.gguf.model.naming import scale_name, slice_number
from quantcli.ops.blocks import KINDS
from quantcli.tensors import DTYPES, QuantizedTensor, Scheme, TensorSpec

OURS = "quantcli."
"""The prefix of the keys that record how a file of quantcli was made."""

WAY_OUT = "llama-quantize --allow-requantize makes a file of it in a type that can be decoded"


class GgufCheckpoint(Checkpoint):
    """``specs``: dtype as stored (Q4_K, BF16); ``schemes``: the block types among them that quantcli can decode.

    Names, row order and config are Hugging Face's where ``archs/`` knows the architecture whole. Otherwise, or when asked (``as_stored``),
    they are the file's own: enough to inspect it and to make another GGUF file of it, as llama-quantize does, of whatever architecture.
    """

    def __init__(self, path: Path, *, as_stored: bool = False) -> None:
        container = read_model(path)
        view = stored_view(container) if as_stored else view_of(container)
        self.container, self.arch, self.gguf_names = container, view.arch, view.names
        self._stored = {name: spec_of(container, view.arch, stored, name) for name, stored in view.names.items()}
        # among a file's own names such a scale is a tensor like any other
        self.scales = {} if self.is_stored else scales_of_matrices(container)
        self._quantized = {name: self._scheme(name, s) for name, s in self._stored.items() if qtype_of(s.dtype) in KINDS}
        self._joints = views.joints_of(self._stored, view.arch.cuts, view.arch, view.config)
        parts = {part for joint in self._joints.values() for part in joint.names}
        specs = {name: spec for name, spec in self._stored.items() if name not in parts}
        specs |= {name: joint.spec(name, self._stored) for name, joint in self._joints.items()}
        super().__init__(
            path,
            kind="gguf",
            config=view.config,
            specs=dict(sorted(specs.items(), key=lambda item: natural(item[0]))),
            schemes={name: scheme for name, scheme in self._quantized.items() if name not in parts},
            quantization=summary(container),
            notes=view.notes,
        )
        if not self.is_stored and (tables := self._rotary_tables()):
            if rope.TENSOR in tables:
                scaled = rope.llama3_parameters(tables[rope.TENSOR], self.config["rope_parameters"]["rope_theta"])
            else:
                scaled = rope.longrope_parameters(tables, self.config)
            self.config["rope_parameters"] = scaled

    @property
    @override
    def file_metadata(self) -> Mapping[str, Field]:
        return self.container.fields

    @property
    @override
    def provenance(self) -> Mapping[str, Any]:
        fields = self.container.fields.items()
        return {key.removeprefix(OURS): field.value for key, field in fields if key.startswith(OURS)}

    @property
    def is_stored(self) -> bool:
        """Whether names, rows and config are the file's own."""
        return isinstance(self.arch, archs.StoredNames)

    @override
    def load(self, name: str) -> Tensor:
        return self._joints[name].made(self._dense) if name in self._joints else self._dense(name)

    @override
    def load_quantized(self, name: str) -> QuantizedTensor:
        scheme = self._quantized.get(name, Scheme.of(qtype_of(self._stored[name].dtype)))
        parts = {"blocks": self._in_order(name)}
        if scheme.get("scaled"):
            scale_tensor = self.scales[self.gguf_names[name]]
            number = slice_number(self.arch, name, self.gguf_names[name]) or 0
            scales = self._raw(scale_tensor, self.container.specs[scale_tensor])
            if number >= len(scales):
                raise CheckpointError(f"{self.path}: tensor '{scale_tensor}' has {len(scales)} scales, and {name} is number {number}")
            parts["scale"] = scales[number].view(1)
        return QuantizedTensor(scheme, self._stored[name].shape, parts)

    def _scheme(self, name: str, spec: TensorSpec) -> Scheme:
        qtype = qtype_of(spec.dtype)
        return Scheme.of(qtype, scaled=True) if self.gguf_names[name] in self.scales else Scheme.of(qtype)

    @override
    def locations(self) -> list[Location]:
        return [self.container.location(name) for name in self.container.specs]

    @override
    def unnamed(self) -> dict[str, Tensor]:
        """The stored tensors that ``specs`` has no name for, because the config has what they hold: by GGUF name."""
        named = {*self.gguf_names.values(), *scale_tensors(self.container)}
        return {name: self._raw(name, spec) for name, spec in self.container.specs.items() if name not in named}

    def _rotary_tables(self) -> dict[str, Tensor]:
        """The tables from which the config is completed: by GGUF name."""
        found = {name: self.container.specs[name] for name in rotary_tables(self.arch) if name in self.container.specs}
        for name, spec in found.items():
            if spec.dtype != "F32":
                raise CheckpointError(f"{self.path}: tensor '{name}' is {spec.dtype}, expected F32")
        if missing := found.keys() & set(rope.LONGROPE.values()) and rope.LONGROPE.values() - found.keys():
            raise CheckpointError(f"{self.path}: tensor '{min(missing)}' is missing, and the other table of longrope is there")
        return {name: self._raw(name, spec) for name, spec in found.items()}

    def _dense(self, name: str) -> Tensor:
        """A stored tensor under its HF name, decoded where it is blocks."""
        if name in self._quantized:
            return qtypes.of(self._quantized[name].qtype).unpack(self.load_quantized(name))
        if (dtype := self._stored[name].dtype) not in DTYPES:
            raise UnsupportedError(f"{self.path}: {name} is {dtype}, which quantcli cannot decode; {WAY_OUT}")
        return self._in_order(name)

    def _in_order(self, name: str) -> Tensor:
        """The stored tensor with its rows where HF has them: GGUF's row ``r`` is HF's row ``order[r]``."""
        stored = self._raw(self.gguf_names[name], self._stored[name])
        if self.arch.norm_offset and self.gguf_names[name].endswith("_norm.weight"):
            stored = stored - self.arch.norm_offset
        order = self.arch.row_order(name, stored.shape[0], self.config)
        if order is None:
            return stored
        rows = torch.empty_like(stored)
        rows[order] = stored
        return rows

    def _raw(self, gguf_name: str, spec: TensorSpec) -> Tensor:
        """As stored: the dense tensor, or its blocks U8 [out, row_bytes]. ``spec``: of the whole, or of a slice under its HF name."""
        location = self.container.location(gguf_name)
        number = slice_number(self.arch, spec.name, gguf_name) or 0
        if spec.dtype not in DTYPES:
            shape = (spec.n_elements // spec.shape[-1], row_bytes(spec.dtype, spec.shape[-1]))
            spec = TensorSpec(spec.name, "U8", shape, spec.nbytes)
        return read_tensor(replace(location, spec=spec, offset=location.offset + number * spec.nbytes))


@dataclass(frozen=True)
class View:
    """How a file's tensors are called and what its config has. ``names``: name in ``specs`` → GGUF name."""

    arch: Architecture
    names: dict[str, str]
    config: dict[str, Any]
    notes: tuple[str, ...] = ()


def view_of(container: Container) -> View:
    """Hugging Face's view where ``archs/`` has a name for every tensor and a config for the metadata, else the file's own."""
    name = architecture_name(container)
    arch = archs.of_gguf(name, container.specs, container.fields)
    if arch is None:
        return stored_view(container, f"architecture '{name}' has no Hugging Face names here")
    nameless = {*rotary_tables(arch), *scale_tensors(container)}
    named = [stored for stored in container.specs if stored not in nameless]
    if unknown := next((stored for stored in named if arch.hf_name(stored) is None), None):
        return stored_view(container, f"'{unknown}' has no Hugging Face name in architecture '{name}' here")
    try:
        config = config_of(container, arch)
    except UnsupportedError as error:
        return stored_view(container, str(error))
    check_tensors(container, arch, config)
    return View(arch, {hf: stored for stored in named for hf in hf_names(container, arch, stored, config)}, config)


def rotary_tables(arch: Architecture) -> tuple[str, ...]:
    """Tensors without a Hugging Face name: the config has what they hold."""
    return (rope.TENSOR, *(rope.LONGROPE.values() if "longrope" in arch.computed else ()))


def scales_of_matrices(container: Container) -> dict[str, str]:
    """The matrices in NVFP4 that have a scale for the whole of each, as convert_hf_to_gguf writes it → the tensor that holds it."""
    found = {name: scale_name(name) for name, spec in container.specs.items() if spec.dtype == "NVFP4" and name.endswith(".weight")}
    found = {name: scale for name, scale in found.items() if scale in container.specs}
    for name, scale in found.items():
        have, shape = container.specs[scale], (math.prod(container.specs[name].shape[:-2]),)
        if (have.dtype, have.shape) != ("F32", shape):
            raise CheckpointError(f"{container.path}: tensor '{scale}' is {have.dtype} {list(have.shape)}, expected F32 {list(shape)}")
    return found


def scale_tensors(container: Container) -> list[str]:
    """The tensors of matrices in NVFP4 that Hugging Face has no names for: their scales, and those of what they read."""
    matrices = [name for name, spec in container.specs.items() if spec.dtype == "NVFP4" and name.endswith(".weight")]
    scales = [scale for name in matrices for scale in (scale_name(name), name.replace(".weight", ".input_scale"))]
    return [name for name in scales if name in container.specs]


def stored_view(container: Container, reason: str | None = None) -> View:
    """The file's own names; ``reason``: why not Hugging Face's."""
    name = architecture_name(container)
    note = f"{reason}: the file is taken as it is, under GGUF's names, and serves as a source of other GGUF files"
    return View(
        archs.as_stored(name), {stored: stored for stored in container.specs}, stored_config(container, name), (note,) if reason else ()
    )


STORED_KEYS = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "num_local_experts": "expert_count",
}
"""What ``inspect`` and ``--memory`` ask of any config: HF's key → GGUF's key."""


def stored_config(container: Container, gguf_arch: str) -> dict[str, Any]:
    """The metadata, by which a mix of types goes, and Hugging Face's keys for a model's sizes: 0 where none is given, of values by layer
    the first."""
    config: dict[str, Any] = {"architectures": [gguf_arch], "gguf_architecture": gguf_arch, "gguf_metadata": container.fields}
    for name, key in STORED_KEYS.items():
        value = container.get(f"{gguf_arch}.{key}", 0)
        value = value[0].item() if isinstance(value, np.ndarray) and value.size else value
        if not isinstance(value, int) or isinstance(value, bool):
            raise CheckpointError(f"{container.path}: metadata key '{gguf_arch}.{key}' is {shown(value)}, expected an integer")
        config[name] = value
    if f"{gguf_arch}.attention.head_count_kv" not in container.fields:
        config["num_key_value_heads"] = config["num_attention_heads"]
    return config


def architecture_name(container: Container) -> str:
    name = container.get("general.architecture")
    if not isinstance(name, str) or not name:
        raise CheckpointError(f"{container.path}: no general.architecture in the metadata; the file is no model")
    return name


def hf_names(container: Container, arch: Architecture, gguf_name: str, config: Mapping[str, Any]) -> list[str]:
    """What a stored tensor is in Hugging Face's terms: one tensor, or one for each of its slices."""
    name = arch.hf_name(gguf_name, config) or ""
    return [name.replace("{e}", str(e)) for e in range(container.specs[gguf_name].shape[0])] if "{e}" in name else [name]


def spec_of(container: Container, arch: Architecture, gguf_name: str, name: str) -> TensorSpec:
    """The spec of the stored tensor, or of its slice, that is called ``name``."""
    spec = container.specs[gguf_name]
    if slice_number(arch, name, gguf_name) is None:
        return TensorSpec(name, spec.dtype, spec.shape, spec.nbytes)
    if len(spec.shape) < 2:
        raise CheckpointError(f"{container.path}: tensor '{gguf_name}' is {list(spec.shape)}, expected a slice for each expert")
    return TensorSpec(name, spec.dtype, spec.shape[1:], spec.nbytes // spec.shape[0])


def natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts layer 2 before layer 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"\.", name)]


def summary(container: Container) -> dict[str, Any]:
    """What the file records about how it was made."""
    keys = ("general.file_type", "general.quantization_version", "general.name", "tokenizer.ggml.model", "tokenizer.ggml.pre")
    return {"version": container.version} | {key: container.get(key) for key in keys if key in container.fields}
