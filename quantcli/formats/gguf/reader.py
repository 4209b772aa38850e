"""A GGUF file as a checkpoint, whoever wrote it: under Hugging Face's names, row order and config, or taken as it is."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantcli import archs
from quantcli.archs import Architecture
from quantcli.checkpoint import Checkpoint
from quantcli.errors import CheckpointError, UnsupportedError
from quantcli.formats.gguf import rope
from quantcli.formats.gguf.container import Container, row_bytes
from quantcli.formats.gguf.metadata import config_of
from quantcli.formats.gguf.splits import read_model
from quantcli.json_files import shown
from quantcli.locations import Location, read_tensor
from quantcli.ops.blocks import KINDS
from quantcli.tensors import DTYPES, QuantizedTensor, Scheme, TensorSpec


class GgufCheckpoint(Checkpoint):
    """``specs``: dtype as stored (Q4_K, BF16); ``schemes``: the block types among them that quantcli can decode.

    Names, row order and config are Hugging Face's where ``archs/`` knows the architecture whole. Otherwise, or when asked (``as_stored``),
    they are the file's own: enough to inspect it and to make another GGUF file of it, as llama-quantize does, of whatever architecture.
    """

    def __init__(self, path: Path, *, as_stored: bool = False) -> None:
        container = read_model(path)
        view = stored_view(container) if as_stored else view_of(container)
        self.container, self.arch, self.gguf_names = container, view.arch, view.names
        specs = {name: renamed(container.specs[stored], name) for name, stored in view.names.items()}
        schemes = {name: Scheme.of(s.dtype.lower()) for name, s in specs.items() if s.dtype.lower() in KINDS}
        super().__init__(
            path,
            kind="gguf",
            config=view.config,
            specs=dict(sorted(specs.items(), key=lambda item: natural(item[0]))),
            schemes=schemes,
            quantization=summary(container),
            notes=view.notes,
        )
        if rope.TENSOR in container.specs and not self.is_stored:
            if container.specs[rope.TENSOR].dtype != "F32":
                raise CheckpointError(f"{path}: tensor '{rope.TENSOR}' is {container.specs[rope.TENSOR].dtype}, expected F32")
            self.config["rope_parameters"] = rope.llama3_parameters(self._raw(rope.TENSOR), self.config["rope_parameters"]["rope_theta"])

    @property
    def is_stored(self) -> bool:
        """Whether names, rows and config are the file's own."""
        return isinstance(self.arch, archs.StoredNames)

    def load(self, name: str) -> Tensor:
        if self.specs[name].dtype not in DTYPES:
            raise UnsupportedError(f"{self.path}: {name} is {self.specs[name].dtype}, which quantcli cannot decode yet")
        return self._in_order(name)

    def load_quantized(self, name: str) -> QuantizedTensor:
        return QuantizedTensor(self.schemes[name], self.specs[name].shape, {"blocks": self._in_order(name)})

    def locations(self) -> list[Location]:
        return [self.container.location(name) for name in self.container.specs]

    def unnamed(self) -> dict[str, Tensor]:
        """The stored tensors that ``specs`` has no name for, because the config says what they hold: by GGUF name."""
        named = set(self.gguf_names.values())
        return {name: self._raw(name) for name in self.container.specs if name not in named}

    def _in_order(self, name: str) -> Tensor:
        """The stored tensor with its rows where HF has them: GGUF's row ``r`` is HF's row ``order[r]``."""
        stored = self._raw(self.gguf_names[name])
        order = self.arch.row_order(name, stored.shape[0], self.config)
        if order is None:
            return stored
        rows = torch.empty_like(stored)
        rows[order] = stored
        return rows

    def _raw(self, gguf_name: str) -> Tensor:
        """As stored: the dense tensor, or its blocks U8 [out, row_bytes]."""
        location = self.container.location(gguf_name)
        spec = location.spec
        if spec.dtype not in DTYPES:
            shape = (spec.n_elements // spec.shape[-1], row_bytes(spec.dtype, spec.shape[-1]))
            location = replace(location, spec=TensorSpec(spec.name, "U8", shape, spec.nbytes))
        return read_tensor(location)


@dataclass(frozen=True)
class View:
    """How a file's tensors are called and what its config says. ``names``: name in ``specs`` → GGUF name."""

    arch: Architecture
    names: dict[str, str]
    config: dict[str, Any]
    notes: tuple[str, ...] = ()


def view_of(container: Container) -> View:
    """Hugging Face's view where ``archs/`` has a name for every tensor and a config for the metadata, else the file's own."""
    name = architecture_name(container)
    arch = archs.of_gguf(name)
    if arch is None:
        return stored_view(container, f"architecture '{name}' has no Hugging Face names here")
    table = {arch.hf_name(stored) or "": stored for stored in container.specs if stored != rope.TENSOR}
    if "" in table:
        return stored_view(container, f"'{table['']}' has no Hugging Face name in architecture '{name}' here")
    try:
        config = config_of(container, arch)
    except UnsupportedError as error:
        return stored_view(container, str(error))
    check_tensors(container, arch, config)
    return View(arch, table, config)


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
"""What a mix of types goes by: HF's word → GGUF's key."""


def stored_config(container: Container, gguf_arch: str) -> dict[str, Any]:
    """The metadata, and Hugging Face's words for what llama-quantize goes by: 0 where nothing is said, of values by layer the first."""
    config: dict[str, Any] = {"architectures": [gguf_arch], "gguf_architecture": gguf_arch, "gguf_metadata": container.fields}
    for word, key in STORED_KEYS.items():
        value = container.get(f"{gguf_arch}.{key}", 0)
        value = value[0].item() if isinstance(value, np.ndarray) and value.size else value
        if not isinstance(value, int) or isinstance(value, bool):
            raise CheckpointError(f"{container.path}: metadata key '{gguf_arch}.{key}' is {shown(value)}, expected an integer")
        config[word] = value
    if f"{gguf_arch}.attention.head_count_kv" not in container.fields:
        config["num_key_value_heads"] = config["num_attention_heads"]
    return config


def architecture_name(container: Container) -> str:
    name = container.get("general.architecture")
    if not isinstance(name, str) or not name:
        raise CheckpointError(f"{container.path}: no general.architecture in the metadata; the file is no model")
    return name


def renamed(spec: TensorSpec, name: str) -> TensorSpec:
    return TensorSpec(name, spec.dtype, spec.shape, spec.nbytes)


def natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts layer 2 before layer 10."""
    return [(int(word), "") if word.isdecimal() else (-1, word) for word in re.split(r"\.", name)]


def summary(container: Container) -> dict:
    """What the file says of its making."""
    keys = ("general.file_type", "general.quantization_version", "general.name", "tokenizer.ggml.model", "tokenizer.ggml.pre")
    return {"version": container.version} | {key: container.get(key) for key in keys if key in container.fields}


def check_tensors(container: Container, arch: Architecture, config: dict) -> None:
    """Raise :class:`CheckpointError` unless every tensor of every layer is there, in the shape the metadata implies."""
    n_layers, specs = config["num_hidden_layers"], container.specs
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    q, kv = (config["head_dim"] * config[key] for key in ("num_attention_heads", "num_key_value_heads"))
    shapes: dict[str, tuple[int, ...]] = {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, q)}
    shapes |= {"gate_proj": (wide, hidden), "up_proj": (wide, hidden), "down_proj": (hidden, wide), "norm": (hidden,)}
    if n_layers > len(specs):
        raise CheckpointError(f"{container.path}: {len(specs)} tensors cannot make the {n_layers} layers the metadata promises")
    for module, pattern in arch.gguf_names.items():
        shape = next((shape for ending, shape in shapes.items() if module.endswith(ending)), (config["vocab_size"], hidden))
        for name in dict.fromkeys(f"{pattern.replace('{i}', str(i))}.weight" for i in range(n_layers)):
            if name not in specs and name != "output.weight":
                raise CheckpointError(f"{container.path}: tensor '{name}' is missing, and the metadata promises {n_layers} layers")
            if name in specs and specs[name].shape != shape:
                raise CheckpointError(f"{container.path}: tensor '{name}' is {list(specs[name].shape)}, the metadata says {list(shape)}")
