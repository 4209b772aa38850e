"""A Hugging Face folder of MXFP4 as gpt-oss is published (``quant_method: mxfp4``): the experts of a layer in stacks; read only.

    <experts>.gate_up_proj_blocks   U8 [n_experts, 2·wide, hidden/32, 16]    E2M1, the even input of a pair in the low four bits
    <experts>.gate_up_proj_scales   U8 [n_experts, 2·wide, hidden/32]        E8M0; rows of gate and up take turns
    <experts>.down_proj_blocks      U8 [n_experts, hidden, wide/32, 16]
    <experts>.down_proj_scales      U8 [n_experts, hidden, wide/32]

Everything else is dense, biases of experts too. Every expert's linear is a tensor here, under the name it has in folders that store experts
one by one, with its own codes: GGUF's MXFP4 takes them as they are. Layout: transformers/integrations/mxfp4.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor
from typing_extensions import override

from quantcli.checkpoint.checkpoint import Checkpoint, read_config
from quantcli.checkpoint.locations import Location, read_tensor
from quantcli.checkpoint.shards import Shards, open_folder
from quantcli.errors import CheckpointError, UnsupportedError
from quantcli.formats import DEFAULTS, Format, Request
from quantcli.qtypes import mxfp4
from quantcli.tensors import QuantizedTensor, Scheme, TensorSpec

STACK = re.compile(r"(?P<experts>.+)\.(?P<linear>gate_up_proj|down_proj)_(?P<part>blocks|scales)")

LINEARS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""A stack → the linears whose rows take turns in it."""

PAIRS = mxfp4.GROUP // 2
SCHEME = Scheme.of("mxfp4", **mxfp4.QTYPE.options)


@dataclass(frozen=True, slots=True)
class Expert:
    """One expert's linear: the rows ``first``, ``first + step``, … of its slices of a stack's blocks [rows, n_groups, 16] and scales."""

    spec: TensorSpec
    blocks: Location
    scales: Location
    first: int
    step: int


class Mxfp4Checkpoint(Checkpoint):
    """A folder of gpt-oss."""

    def __init__(self, path: Path, config: dict[str, Any], shards: Shards) -> None:
        self.shards = shards
        stacks = [name for name in shards.specs if (match := STACK.fullmatch(name)) and match["part"] == "blocks"]
        if not stacks:
            raise CheckpointError(
                f"{path}: config.json declares mxfp4, and no tensor's name ends in _blocks; the folder is dense or damaged"
            )
        self._experts = {e.spec.name: e for name in stacks for e in experts_of(path, shards, name)}
        taken = {name for name in shards.specs if STACK.fullmatch(name)}
        if orphans := sorted(taken - {f"{name.removesuffix('blocks')}{part}" for name in stacks for part in ("blocks", "scales")}):
            raise CheckpointError(f"{path}: {orphans[0]} has no blocks next to it; the folder is incomplete")
        if duplicates := sorted(self._experts.keys() & shards.specs.keys()):
            raise CheckpointError(f"{path}: {duplicates[0]} is stored both dense and quantized")
        super().__init__(
            path,
            kind="mxfp4",
            config=config,
            specs={name: spec for name, spec in shards.specs.items() if name not in taken} | {n: e.spec for n, e in self._experts.items()},
            schemes=dict.fromkeys(self._experts, SCHEME),
            quantization=config["quantization_config"],
            notes=shards.notes,
        )

    @override
    def load(self, name: str) -> Tensor:
        return self.shards.read(name)

    @override
    def load_quantized(self, name: str) -> QuantizedTensor:
        expert = self._experts[name]
        packed, scale = (read_tensor(place)[expert.first :: expert.step] for place in (expert.blocks, expert.scales))
        return QuantizedTensor(SCHEME, expert.spec.shape, {"packed": packed.flatten(1).contiguous(), "scale": scale.contiguous()})


def experts_of(path: Path, shards: Shards, name: str) -> Iterator[Expert]:
    """The linears in the stack whose blocks are called ``name``; :class:`CheckpointError` when its shapes do not fit each other."""
    match = STACK.fullmatch(name)
    assert match is not None
    scales_name = f"{name.removesuffix('blocks')}scales"
    blocks, scales = shards.locations[name], shards.locations.get(scales_name)
    linears = LINEARS[match["linear"]]
    if scales is None:
        raise CheckpointError(f"{path}: {name} has no {scales_name} next to it; the folder is incomplete")
    shape, n = blocks.spec.shape, len(linears)
    got = f"{blocks.spec.dtype} {list(shape)} and {scales.spec.dtype} {list(scales.spec.shape)}"
    fits = len(shape) == 4 and shape[3] == PAIRS and scales.spec.shape == shape[:3] and shape[1] % n == 0 and blocks.spec.n_elements > 0
    if not fits or (blocks.spec.dtype, scales.spec.dtype) != ("U8", "U8"):
        raise CheckpointError(f"{path}: {name} and its scales are {got}, expected U8 [experts, rows, groups, {PAIRS}] and the same groups")
    dense = (shape[1] // n, shape[2] * mxfp4.GROUP)
    for e in range(shape[0]):
        slices = sliced(blocks, e), sliced(scales, e)
        n_bytes = sum(place.spec.nbytes for place in slices) // n
        for k, linear in enumerate(linears):
            yield Expert(TensorSpec(f"{match['experts']}.{e}.{linear}.weight", "BF16", dense, n_bytes), *slices, k, n)


def sliced(stack: Location, index: int) -> Location:
    """The location of one expert's slice of a stack."""
    spec = stack.spec
    n_bytes = spec.nbytes // spec.shape[0]
    return Location(stack.path, TensorSpec(spec.name, spec.dtype, spec.shape[1:], n_bytes), stack.offset + index * n_bytes)


def detect(path: Path, config: dict[str, Any] | None) -> bool:
    """A folder whose config.json declares mxfp4."""
    quant_config = (config or {}).get("quantization_config")
    return isinstance(quant_config, dict) and str(quant_config.get("quant_method")).lower() == "mxfp4"


def read(path: Path) -> Mxfp4Checkpoint:
    """The folder at ``path``: headers alone."""
    return Mxfp4Checkpoint(path, read_config(path), open_folder(path))


class Mxfp4(Format):
    """gpt-oss's own folders, which are only read."""

    is_written = False

    @override
    def detect(self, path: Path, config: dict[str, Any] | None) -> bool:
        return detect(path, config)

    @override
    def read(self, path: Path) -> Checkpoint:
        return read(path)

    @override
    def layout(self, source: Checkpoint, schemes: Mapping[str, Scheme], request: Request = DEFAULTS) -> NoReturn:
        raise UnsupportedError("gpt-oss's own mxfp4 is read and not written; compressed-tensors and gguf hold MXFP4 too")


FORMAT = Mxfp4()
