"""FP8's ``quantization_config``: reading and checking it, where tensors contradict it, and writing it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.json_files import shown
from quantcli.checkpoint.modules import Modules
from quantcli.errors import CheckpointError
from quantcli.formats.shared.dense import dense_modules, harmless, transformers_hits, unknown
from quantcli.formats.shared.folder import module_of, split_block
from quantcli.tensors import Scheme, TensorSpec

LISTS = ("modules_to_not_convert", "ignored_layers")
"""transformers' and vLLM's names for what is left dense."""

REGEX = frozenset("\\*+?[](){}|^$")


@dataclass(slots=True)
class QuantConfig:
    """``quantization_config`` as read: ``raw``, the object itself; ``block``: the declared (rows, inputs), or None; ``left``: the modules
    that it lists as dense; ``notes``: where the tensors differ."""

    raw: dict[str, Any]
    block: tuple[int, int] | None
    static: bool
    left: tuple[str, ...]
    notes: list[str] = field(default_factory=list)
    _met: set[object] = field(default_factory=set)

    @classmethod
    def of(cls, path: Path, raw: dict[str, Any]) -> QuantConfig:
        """:class:`CheckpointError` for a block size that is none; a list of modules that is none is noted."""
        block = raw.get("weight_block_size")
        if block is not None and not (isinstance(block, list) and len(block) == 2 and all(type(n) is int and 0 < n < 2**31 for n in block)):
            raise CheckpointError(f"{path / 'config.json'}: weight_block_size is {shown(block)}; expected [rows, inputs]")
        left: list[str] = []
        notes: list[str] = []
        for key in LISTS:
            names = raw.get(key) or []
            if isinstance(names, list) and all(isinstance(name, str) for name in names):
                left += [name for name in names if name and name not in left]
            else:
                notes.append(f"{key} is {shown(names)}, no list of modules; it is ignored")
        return cls(raw, (block[0], block[1]) if block else None, raw.get("activation_scheme") == "static", tuple(left), notes)

    @property
    def block_text(self) -> str:
        return f" of {self.block[0]} x {self.block[1]}" if self.block else " of 128 x 128"

    def note_block(self, block: tuple[int, int], name: str) -> None:
        """Note, once for each size, that a weight has blocks of another one than declared."""
        if self.block != block and block not in self._met:
            self._met.add(block)
            declared = list(self.block) if self.block else "none"
            self.notes.append(f"weight_block_size is {declared}, and the scales of {name} are of {block[0]} x {block[1]}; it is read so")

    def activations(self, name: str, strategy: str, block: tuple[int, int], scale: TensorSpec | None) -> str:
        """The option ``act`` of the weight ``name``: how engines quantize its input. ``scale``: the file's, or None."""
        if not self.static:
            return "fp8-token" if strategy != "block" else "fp8-g128" if block[1] == 128 else ""
        if scale is not None and scale.n_elements == 1:
            return "fp8-tensor"
        if "static" not in self._met:
            self._met.add("static")
            self.notes.append(f"activation_scheme is static, and {name} has no scale of its input")
        return ""


def disagreements(quant_config: QuantConfig, specs: Mapping[str, TensorSpec], schemes: Mapping[str, Scheme]) -> list[str]:
    """Notes on the lists of what is left dense, and on scales whose weight is dense. ``schemes``: of the quantized weights."""
    notes = []
    modules = "\n".join(specs)
    # A tied lm_head is in no file, and rightly listed. What looks like a pattern is not judged.
    plain = [name for name in quant_config.left if not REGEX & set(name) and name.rpartition(".")[2] != "lm_head"]
    if absent := unknown([name for name in plain if name not in modules], specs):
        notes.append(f"{len(absent)} modules of the list of what is left dense are in no file, the first is {shown(absent[0])}")
    listed = set(quant_config.left)
    if quantized := [name for name in schemes if listed & boundaries(module_of(name))]:
        notes.append(f"{len(quantized)} weights are listed as left dense, and quantized; the first is {quantized[0]}")
    if quant_config.left and (
        unlisted := [name for name in dense_in_quantized_blocks(specs, schemes) if not listed & boundaries(module_of(name))]
    ):
        notes.append(f"{len(unlisted)} matrices are dense, and not listed as such, the first is {unlisted[0]}; readers expect them in FP8")
    orphans = [name for name in specs if name.endswith("_scale_inv") and name.removesuffix("_scale_inv") not in schemes]
    if orphans := [name for name in orphans if name.removesuffix("_scale_inv") in specs]:
        notes.append(f"{len(orphans)} scales belong to weights that are dense, the first is {orphans[0]}; they change nothing")
    return notes


def boundaries(module: str) -> set[str]:
    """What may name ``module``: all that it ends with, and all that it begins with, from dot to dot."""
    parts = module.split(".")
    return {".".join(parts[i:]) for i in range(len(parts))} | {".".join(parts[:i]) for i in range(1, len(parts))}


def dense_in_quantized_blocks(specs: Mapping[str, TensorSpec], schemes: Mapping[str, Scheme]) -> list[str]:
    """Dense matrices in numbered blocks that hold quantized ones too."""
    blocks = {split_block(name)[0] for name in schemes} - {""}
    dense = [name for name, spec in specs.items() if name.endswith(".weight") and name not in schemes and len(spec.shape) == 2]
    return [name for name in dense if split_block(name)[0] in blocks]


def quantization_config(
    source: Checkpoint, quantized: Mapping[str, Scheme], strategy: str, modules: Modules, *, static: bool
) -> dict[str, Any]:
    """``quantization_config`` for both readers. Every other matrix is listed: transformers would build an FP8 linear of any it finds."""
    dense = [name for name, spec in source.specs.items() if name.endswith(".weight") and name not in quantized and len(spec.shape) == 2]
    left = {*map(module_of, dense), *dense_modules(source, quantized, modules)}
    if any(name.endswith("lm_head.weight") for name in quantized):
        left -= {"lm_head"}
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "static" if static else "dynamic",
        "weight_block_size": [128, 128] if strategy == "block" else None,
        **dict.fromkeys(LISTS, harmless(sorted(left), quantized, modules, transformers_hits)),
    }
