"""A GGUF file as a checkpoint: Hugging Face's tensor names, row order and config, whoever wrote the file."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from quantcli import archs
from quantcli.archs import Architecture
from quantcli.checkpoint import Checkpoint
from quantcli.errors import CheckpointError, UnsupportedError
from quantcli.formats.gguf import rope
from quantcli.formats.gguf.container import Container, read_header, row_bytes
from quantcli.formats.gguf.metadata import config_of
from quantcli.json_files import shown
from quantcli.locations import Location, read_tensor
from quantcli.registry import names
from quantcli.tensors import DTYPES, QuantizedTensor, Scheme, TensorSpec


class GgufCheckpoint(Checkpoint):
    """``specs``: under HF names, dtype as stored (Q4_K, BF16); ``schemes``: the block types among them that quantcli can decode."""

    def __init__(self, path: Path) -> None:
        container = read_header(path)
        if str(n_files := container.get("split.count", 1)) != "1":
            raise UnsupportedError(f"{path}: one of {shown(n_files)} parts of a split model; join them with llama-gguf-split --merge first")
        arch = architecture(container)
        self.container, self.arch = container, arch
        self.gguf_names = {hf_name(container, arch, name): name for name in container.specs if name != rope.TENSOR}
        specs = {hf: renamed(container.specs[name], hf) for hf, name in self.gguf_names.items()}
        known = names("qtypes")
        schemes = {hf: Scheme.of(s.dtype.lower()) for hf, s in specs.items() if s.dtype not in DTYPES and s.dtype.lower() in known}
        config = config_of(container, arch)
        check_tensors(container, arch, config)
        super().__init__(
            path,
            kind="gguf",
            config=config,
            specs=dict(sorted(specs.items(), key=lambda item: natural(item[0]))),
            schemes=schemes,
            quantization=summary(container),
        )
        if rope.TENSOR in container.specs:
            if container.specs[rope.TENSOR].dtype != "F32":
                raise CheckpointError(f"{path}: tensor '{rope.TENSOR}' is {container.specs[rope.TENSOR].dtype}, expected F32")
            self.config["rope_parameters"] = rope.llama3_parameters(self._raw(rope.TENSOR), config["rope_parameters"]["rope_theta"])

    def load(self, name: str) -> Tensor:
        if self.specs[name].dtype not in DTYPES:
            raise UnsupportedError(f"{self.path}: {name} is {self.specs[name].dtype}, which quantcli cannot decode yet")
        return self._in_order(name)

    def load_quantized(self, name: str) -> QuantizedTensor:
        return QuantizedTensor(self.schemes[name], self.specs[name].shape, {"blocks": self._in_order(name)})

    def locations(self) -> list[Location]:
        return [Location(self.path, spec, self.container.offsets[name]) for name, spec in self.container.specs.items()]

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
        spec = self.container.specs[gguf_name]
        if spec.dtype not in DTYPES:
            shape = (spec.n_elements // spec.shape[-1], row_bytes(spec.dtype, spec.shape[-1]))
            spec = TensorSpec(spec.name, "U8", shape, spec.nbytes)
        return read_tensor(Location(self.path, spec, self.container.offsets[gguf_name]))


def architecture(container: Container) -> Architecture:
    name = container.get("general.architecture")
    if not isinstance(name, str):
        raise CheckpointError(f"{container.path}: no general.architecture in the metadata; the file is no model")
    if (arch := archs.of_gguf(name)) is None:
        raise UnsupportedError(f"{container.path}: architecture '{name}' cannot be read from GGUF yet; give the Hugging Face folder")
    return arch


def hf_name(container: Container, arch: Architecture, name: str) -> str:
    if (hf := arch.hf_name(name)) is None:
        raise UnsupportedError(f"{container.path}: {name} is no tensor of the {arch.gguf_arch} architecture that quantcli knows")
    return hf


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
