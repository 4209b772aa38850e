"""Reading FP8 folders: weights of eight bits, their scales under one of many names, and what their shapes mean."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from quantcli.checkpoint.checkpoint import read_config
from quantcli.checkpoint.shards import Shards, open_folder
from quantcli.errors import CheckpointError
from quantcli.formats.fp8.config import QuantConfig, disagreements
from quantcli.formats.shared.folder import FolderCheckpoint, QuantizedWeight, model_dtype
from quantcli.ops.minifloat import group_step, tiles_of
from quantcli.qtypes import fp8, mxfp4
from quantcli.tensors import QuantizedTensor, Scheme, TensorSpec

METHODS = ("fp8", "fbgemm_fp8")

FLOATS = {"F8_E4M3": "e4m3", "F8_E5M2": "e5m2"}
EXPONENTS = ("U8", "F8_E8M0")
"""Dtypes of a scale that is a power of two."""
SCALES = ("F32", "BF16", "F16", *EXPONENTS)

SCALE_ENDINGS = ("_scale_inv", "_scales_inv", "_scale")
SCALE_NAMES = ("scale", "scale_inv", "qscale_weight")
INPUT_ENDINGS = ("_activation_scale",)
INPUT_NAMES = ("input_scale", "activation_scale", "qscale_act", "input_scale_ub")
"""Endings that follow the name of a weight, and names that replace ``weight``."""


@dataclass(frozen=True, slots=True)
class Members:
    """The file tensors of a weight, by name: itself, its scale and its input's, as far as there are such."""

    data: TensorSpec
    scale: TensorSpec | None
    input: TensorSpec | None

    @property
    def all(self) -> tuple[TensorSpec, ...]:
        return tuple(spec for spec in (self.data, self.scale, self.input) if spec)


class Fp8Checkpoint(FolderCheckpoint):
    """A folder of eight-bit floats."""

    def __init__(self, path: Path, config: dict[str, Any], shards: Shards) -> None:
        quant_config = QuantConfig.of(path, config["quantization_config"])
        self.members = find_members(path, shards.specs)
        dtype = model_dtype(config)
        quantized: dict[str, QuantizedWeight] = {}
        for name, found in self.members.items():
            scheme, shape = scheme_of(path, found, quant_config)
            quantized[name] = QuantizedWeight.of(name, shape, dtype, scheme=scheme, files=found.all)
        schemes = {name: c.scheme for name, c in quantized.items()}
        notes = [*quant_config.notes, *unscaled(self.members), *disagreements(quant_config, shards.specs, schemes)]
        super().__init__(path, kind="fp8", config=config, shards=shards, quantized=quantized, quantization=quant_config.raw, notes=notes)

    @override
    def load_quantized(self, name: str) -> QuantizedTensor:
        found, scheme = self.members[name], self.schemes[name]
        data, shape = self.shards.read(found.data.name), self.specs[name].shape
        if scheme.qtype == "mxfp4":
            assert found.scale is not None
            scale = self.shards.read(found.scale.name).view(torch.uint8)
            return QuantizedTensor(scheme, shape, {"packed": data.view(torch.uint8), "scale": scale})
        parts = {"data": data, "scale": self._scale(found, fp8.QTYPE.layout(shape, scheme)["scale"].shape)}
        if scheme.static_activations:
            assert found.input is not None
            parts["input_scale"] = self.shards.read(found.input.name).float().view(1)
        return QuantizedTensor(scheme, shape, parts)

    def _scale(self, found: Members, shape: tuple[int, ...]) -> Tensor:
        """The part ``scale`` of ``shape``; 1 where the file has none."""
        if found.scale is None:
            return torch.ones(shape)
        scale = self.shards.read(found.scale.name)
        if found.scale.dtype in EXPONENTS:
            scale = group_step(scale.view(torch.uint8), "mxfp4")
        return scale.reshape(1).repeat(math.prod(shape)).view(shape) if scale.numel() == 1 else scale.reshape(shape)


def detect(path: Path, config: dict[str, Any] | None) -> bool:
    """A folder whose config.json declares fp8."""
    quant_config = config.get("quantization_config") if config else None
    return isinstance(quant_config, dict) and quant_config.get("quant_method") in METHODS


def read(path: Path) -> Fp8Checkpoint:
    """The FP8 folder at ``path``; headers only."""
    return Fp8Checkpoint(path, read_config(path), open_folder(path))


def find_members(path: Path, specs: Mapping[str, TensorSpec]) -> dict[str, Members]:
    """Every quantized weight by its own name."""
    members = {name: Members(spec, *scales_of(path, specs, name)) for name, spec in specs.items() if is_weight(specs, name)}
    if not members:
        raise CheckpointError(f"{path}: config.json declares fp8, and no tensor is of F8_E4M3 or F8_E5M2; the folder is dense or damaged")
    alone = [name for name, found in members.items() if not found.scale]
    if alone and len(alone) < len(members):
        raise CheckpointError(
            f"{path}: {alone[0]} is {members[alone[0]].data.dtype} and has no scale next to it (such as {alone[0]}_scale_inv), "
            f"as others have; {len(alone)} lack theirs: the folder is incomplete"
        )
    return members


def is_weight(specs: Mapping[str, TensorSpec], name: str) -> bool:
    """Whether ``name`` is a weight of eight bits, or a pair of E2M1 in each byte."""
    spec = specs[name]
    if spec.dtype in FLOATS:
        return True
    scale = specs.get(f"{name}_scale_inv") or specs.get(f"{name.removesuffix('.weight')}.scale")
    if spec.dtype not in ("I8", "U8") or len(spec.shape) != 2 or scale is None or scale.dtype not in EXPONENTS:
        return False
    out, n_pairs = spec.shape
    return spec.n_elements > 0 and n_pairs % (mxfp4.GROUP // 2) == 0 and scale.shape == (out, n_pairs * 2 // mxfp4.GROUP)


def scales_of(path: Path, specs: Mapping[str, TensorSpec], name: str) -> tuple[TensorSpec | None, TensorSpec | None]:
    """The scale of the weight ``name`` and that of its input; :class:`CheckpointError` where there are two for one."""
    module = name.removesuffix(".weight")
    found: list[TensorSpec | None] = []
    for endings, names in ((SCALE_ENDINGS, SCALE_NAMES), (INPUT_ENDINGS, INPUT_NAMES)):
        candidates = [name + ending for ending in endings]
        if module != name:
            candidates += [f"{module}.{scale_name}" for scale_name in names]
        there = [specs[candidate] for candidate in candidates if candidate in specs]
        if len(there) > 1:
            raise CheckpointError(f"{path}: {name} has both {there[0].name} and {there[1].name}, and one scale is expected")
        found.append(there[0] if there else None)
    for spec in found:
        if spec and spec.dtype not in SCALES:
            raise CheckpointError(f"{path}: {spec.name} is {spec.dtype}; expected a scale in {', '.join(SCALES)}")
    return found[0], found[1]


def scheme_of(path: Path, found: Members, quant_config: QuantConfig) -> tuple[Scheme, tuple[int, ...]]:
    """The scheme of a weight and its dense shape."""
    shape = found.data.shape
    if found.data.dtype not in FLOATS:
        return Scheme.of("mxfp4", **mxfp4.QTYPE.options), (shape[0], 2 * shape[1])
    if len(shape) not in (2, 3) or 0 in shape:
        raise CheckpointError(f"{path}: {found.data.name} is {found.data.dtype} {list(shape)}; expected a matrix, or a stack of them")
    strategy, block = strategy_of(path, found, quant_config)
    act = quant_config.activations(found.data.name, strategy, block, found.input)
    options: dict[str, Any] = {**fp8.QTYPE.options, "dtype": FLOATS[found.data.dtype], "strategy": strategy, "act": act}
    if found.scale and found.scale.dtype not in EXPONENTS:
        options["scale_dtype"] = found.scale.dtype
    if strategy == "block" and block != fp8.BLOCK:
        options["block"] = block
    return Scheme.of("fp8", **options), shape


def strategy_of(path: Path, found: Members, quant_config: QuantConfig) -> tuple[str, tuple[int, int]]:
    """How scales lie over a weight: ("tensor" | "channel" | "block", (rows, inputs) of a block), by the shapes of both."""
    out, n_in = whole = found.data.shape[-2], found.data.shape[-1]
    stack = found.data.shape[:-2]
    scale = (1,) if found.scale is None else found.scale.shape
    if stack and any(side != 1 for side in scale):  # each matrix of a stack has its own; another number of them fits nothing
        scale = scale[1:] if scale[:1] == stack else (0,)
    if quant_config.block and scale == tiles_of(whole, quant_config.block):
        return "block", quant_config.block
    if all(side == 1 for side in scale):
        return "tensor", whole
    if scale in ((out,), (out, 1)):
        return "channel", (1, n_in)
    if block := block_of(whole, scale):
        quant_config.note_block(block, found.data.name)
        return "block", block
    assert found.scale is not None
    raise CheckpointError(
        f"{path}: {found.scale.name} is {list(found.scale.shape)} for a weight {list(found.data.shape)}; "
        f"expected one scale, one a row, or one for each block{quant_config.block_text}"
    )


def block_of(shape: tuple[int, int], scale: tuple[int, ...]) -> tuple[int, int] | None:
    """The (rows, inputs) of a block where ``scale`` is the shape of a matrix's scales: 128 × 128, or an even cut."""
    if scale == tiles_of(shape, fp8.BLOCK):
        return fp8.BLOCK
    if len(scale) != 2 or 0 in scale or shape[0] % scale[0] or shape[1] % scale[1]:
        return None
    return shape[0] // scale[0], shape[1] // scale[1]


def unscaled(members: Mapping[str, Members]) -> list[str]:
    """A note where no weight has a scale: someone cast a model to FP8."""
    alone = [name for name, found in members.items() if not found.scale]
    return [f"{len(alone)} weights have no scale, the first is {alone[0]}; they are read as they are"] if alone else []
