"""Reading bitsandbytes folders: which tensors belong together, what their QuantState states, and where config.json differs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from typing_extensions import override

from quantcli.checkpoint.checkpoint import read_config
from quantcli.checkpoint.json_files import parse_json, shown
from quantcli.checkpoint.shards import Shards, open_folder
from quantcli.errors import CheckpointError, UnsupportedError
from quantcli.experts import expert_of
from quantcli.formats.bitsandbytes import state as states
from quantcli.formats.bitsandbytes.state import LEVELS, PREFIX, State
from quantcli.formats.shared.dense import unknown
from quantcli.formats.shared.folder import FolderCheckpoint, QuantizedWeight, model_dtype, module_of
from quantcli.formats.shared.fused import fused_groups
from quantcli.qtypes.shared import float4
from quantcli.tensors import DTYPES, QuantizedTensor, Scheme, TensorSpec

FOUR_BIT_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")

ROWS = 0
TILED = {1: "col32", 2: "col_turing", 3: "col_ampere"}
"""Values of ``weight_format``: rows, and what older versions of bitsandbytes wrote, tiles for one generation of GPUs."""

SAME_ENTRY = 1e-6
"""Entries of a map that differ by less than this were computed by another machine."""


@dataclass(frozen=True, slots=True)
class FourBit:
    """A 4-bit tensor: its state, and whether its scales are coded as bitsandbytes codes them, so that the qtype can hold their codes."""

    state: State
    is_usual: bool

    @property
    def scheme(self) -> Scheme:
        nested = self.state.nested is not None and self.is_usual
        return Scheme.of(self.state.kind, block_size=self.state.block_size, double_quant=nested)


@dataclass(frozen=True, slots=True)
class Folder:
    """What is being opened; ``notes`` gather what is odd and can be read all the same."""

    path: Path
    shards: Shards
    specs: Mapping[str, TensorSpec]
    notes: list[str]


class BitsAndBytesCheckpoint(FolderCheckpoint):
    """A folder in bitsandbytes' layout, 4 bits or 8. ``state_sizes``: bytes of each 4-bit tensor's JSON."""

    def __init__(self, path: Path, config: dict[str, Any], quant_config: dict[str, Any], shards: Shards) -> None:
        folder = Folder(path, shards, shards.specs, [])
        specs = folder.specs
        keys = state_keys(folder)
        self._four_bit = {name: open_four_bit(folder, name, key) for name, key in keys.items()}
        self.state_sizes: dict[str, int] = {}
        quantized: dict[str, QuantizedWeight] = {}
        for name, four_bit in self._four_bit.items():
            files = [specs[f] for f in (name, keys[name], *(f"{name}.{part}" for part in FOUR_BIT_PARTS)) if f in specs]
            quantized[name] = QuantizedWeight.of(name, four_bit.state.shape, four_bit.state.dtype, scheme=four_bit.scheme, files=files)
            self.state_sizes[name] = specs[keys[name]].nbytes
        quantized |= find_rows(folder, model_dtype(config))
        check_complete(folder, quantized)
        notes = folder.notes + contradictions(quant_config, self._four_bit, quantized, specs)
        super().__init__(
            path, kind="bitsandbytes", config=config, shards=shards, quantized=quantized, quantization=quant_config, notes=notes
        )

    @override
    def load_quantized(self, name: str) -> QuantizedTensor:
        scheme, shape = self.schemes[name], self.specs[name].shape
        if name not in self._four_bit:
            parts = {"codes": self.shards.read(name), "scb": self.shards.read(f"{module_of(name)}.SCB").float()}
            return QuantizedTensor(scheme, shape, parts)
        four_bit = self._four_bit[name]
        packed = self.shards.read(name).reshape(-1).view(torch.uint8)
        absmax = self.shards.read(f"{name}.absmax")
        nested = four_bit.state.nested
        if nested is None:
            return QuantizedTensor(scheme, shape, {"packed": packed, "absmax": absmax.float()})
        peak, offset = self.shards.read(f"{name}.nested_absmax"), torch.tensor([nested.offset], dtype=torch.float32)
        if scheme.option("double_quant"):
            return QuantizedTensor(scheme, shape, {"packed": packed, "absmax": absmax, "nested_absmax": peak, "nested_offset": offset})
        entries = self.shards.read(f"{name}.nested_quant_map")[absmax.int()]
        scales = entries * peak.repeat_interleave(nested.block_size)[: len(absmax)] + offset
        return QuantizedTensor(scheme, shape, {"packed": packed, "absmax": scales})


def detect(path: Path, config: dict[str, Any] | None) -> bool:
    """A folder whose config.json declares bitsandbytes, or, as old ones do, load_in_4bit or load_in_8bit and no method."""
    quant_config = (config or {}).get("quantization_config")
    if not isinstance(quant_config, dict):
        return False
    method = quant_config.get("quant_method")
    if method is None:
        return quant_config.get("load_in_4bit") is True or quant_config.get("load_in_8bit") is True
    return isinstance(method, str) and method.lower() == "bitsandbytes"


def read(path: Path) -> BitsAndBytesCheckpoint:
    """The folder at ``path``: headers, and the small tensors that define the codes."""
    config = read_config(path)
    return BitsAndBytesCheckpoint(path, config, config["quantization_config"], open_folder(path))


def state_keys(folder: Folder) -> dict[str, str]:
    """Weight → the name of its QuantState."""
    found: dict[str, str] = {}
    for key in folder.specs:
        name, is_state, _ = key.partition(f".{PREFIX}")
        if not is_state:
            continue
        if name in found:
            raise CheckpointError(f"{folder.path}: {name} has two states, {found[name]} and {key}")
        found[name] = key
    return found


def open_four_bit(folder: Folder, name: str, key: str) -> FourBit:
    """The state of the 4-bit tensor ``name``, held against its tensors' shapes."""
    spec = folder.specs[key]
    if spec.dtype != "U8" or len(spec.shape) != 1 or spec.nbytes > states.MAX_STATE_BYTES:
        raise CheckpointError(f"{folder.path}: {key} is {spec.dtype} {list(spec.shape)}; expected the bytes of a short JSON text")
    stored = parse_json(folder.path / key, bytes(folder.shards.read(key).numpy()))
    state, odd = states.parse(name, stored)
    folder.notes.extend(odd)
    if not key.endswith(PREFIX + state.kind):
        folder.notes.append(f"{key} has quant_type {state.kind}; it is read so")
    check_tensors(folder, name, state)
    note_levels(folder, name, state)
    return FourBit(state, state.nested is None or has_usual_scales(folder, name, state))


def check_tensors(folder: Folder, name: str, state: State) -> None:
    """Raise :class:`CheckpointError` unless the codes and scales of ``name`` are as many as its state gives."""
    path, specs = folder.path, folder.specs
    n = state.shape[0] * state.shape[1]
    n_blocks = -(-n // state.block_size)
    if name not in specs or specs[name].nbytes != -(-n // 2):
        got = "missing" if name not in specs else f"{specs[name].nbytes} bytes"
        raise CheckpointError(f"{path}: {name} is {got}; its quant_state gives {list(state.shape)}, which takes {-(-n // 2)}")
    expected: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {"absmax": (("F32", "F16", "BF16"), (n_blocks,))}
    if state.nested is not None:
        n_nested = -(-n_blocks // state.nested.block_size)
        expected = {"absmax": (("U8",), (n_blocks,)), "nested_absmax": (("F32",), (n_nested,)), "nested_quant_map": (("F32",), (256,))}
    for part, (dtypes, shape) in expected.items():
        spec = specs.get(f"{name}.{part}")
        if spec is None or spec.dtype not in dtypes or spec.shape != shape:
            got = "missing" if spec is None else f"{spec.dtype} {list(spec.shape)}"
            raise CheckpointError(f"{path}: {name}.{part} is {got}; expected {' or '.join(dtypes)} {list(shape)}")
    if state.block_size not in float4.BLOCK_SIZES:
        raise UnsupportedError(f"{path}: {name} has blocks of {state.block_size}; bitsandbytes has {float4.BLOCK_SIZES}")


def note_levels(folder: Folder, name: str, state: State) -> None:
    """Say where the stored levels are not the type's own, by which engines decode."""
    spec = folder.specs.get(f"{name}.quant_map")
    if spec is None:
        folder.notes.append(f"{name} has no quant_map, which bitsandbytes needs to load it")
        return
    levels = torch.tensor(LEVELS[state.kind])
    stored = folder.shards.read(spec.name).float() if spec.dtype in ("F32", "F16", "BF16") and spec.shape == (16,) else None
    if stored is None or not bool(((stored - levels).abs() < SAME_ENTRY).all()):
        folder.notes.append(f"{spec.name} differs from bitsandbytes' {state.kind} levels; engines decode by these, and so is {name} read")


def has_usual_scales(folder: Folder, name: str, state: State) -> bool:
    """Whether the scales of ``name`` are coded by bitsandbytes' own map in its own blocks."""
    assert state.nested is not None
    stored, usual = folder.shards.read(f"{name}.nested_quant_map"), float4.dynamic_map()
    if not bool(((stored - usual).abs() < SAME_ENTRY).all()):
        folder.notes.append(f"{name}.nested_quant_map differs from bitsandbytes' dynamic map; its entries are used, as engines do")
    return torch.equal(stored, usual) and state.nested.block_size == float4.NESTED_BLOCK


def find_rows(folder: Folder, dtype: str) -> dict[str, QuantizedWeight]:
    """The 8-bit weights. ``dtype``: the model's own."""
    path, specs = folder.path, folder.specs
    quantized: dict[str, QuantizedWeight] = {}
    for key, spec in specs.items():
        if not key.endswith(".SCB"):
            continue
        module = key.removesuffix(".SCB")
        weight, form = specs.get(f"{module}.weight"), specs.get(f"{module}.weight_format")
        if weight is not None and weight.dtype in ("F32", "F16", "BF16"):
            folder.notes.append(f"{key} is next to a weight in {weight.dtype}; the weight is read")
            continue
        if weight is None or weight.dtype != "I8" or len(weight.shape) != 2 or not weight.n_elements:
            got = "missing" if weight is None else f"{weight.dtype} {list(weight.shape)}"
            raise CheckpointError(f"{path}: {module}.weight is {got}; with {key} next to it I8 [out, in] is expected")
        if spec.shape != weight.shape[:1] or spec.dtype not in ("F32", "F16", "BF16"):
            raise CheckpointError(f"{path}: {key} is {spec.dtype} {list(spec.shape)}; expected F32 {list(weight.shape[:1])}")
        check_form(folder, module, form)
        files = [weight, spec, *([form] if form else [])]
        quantized[weight.name] = QuantizedWeight.of(weight.name, weight.shape, dtype, scheme=Scheme.of("llm_int8"), files=files)
    return quantized


def check_form(folder: Folder, module: str, form: TensorSpec | None) -> None:
    """Raise :class:`UnsupportedError` for a weight that is not stored by rows."""
    if form is None:
        folder.notes.append(f"{module}.weight has no weight_format; read as rows")
        return
    if form.dtype != "U8" or form.n_elements != 1:
        raise CheckpointError(f"{folder.path}: {form.name} is {form.dtype} {list(form.shape)}; expected one U8")
    value = int(folder.shards.read(form.name).reshape(()))
    if value != ROWS:
        layout = TILED.get(value, f"layout {value}")
        raise UnsupportedError(
            f"{folder.path}: {module}.weight is tiled for a GPU ({layout}), as old versions of bitsandbytes did; only rows are "
            "read: save the model again with a current one"
        )


def check_complete(folder: Folder, quantized: Mapping[str, QuantizedWeight]) -> None:
    """Raise :class:`CheckpointError` for codes without what decodes them, for parts without codes, and for a folder with neither."""
    path = folder.path
    claimed = {file for c in quantized.values() for file in c.files}
    for name, spec in folder.specs.items():
        if name in claimed:
            continue
        stem, _, part = name.rpartition(".")
        if part in FOUR_BIT_PARTS and stem.endswith(".weight"):
            raise CheckpointError(
                f"{path}: {name} has no {stem}.{PREFIX}… next to it, which gives type, block size and shape; it is incomplete"
            )
        if part == "weight" and spec.dtype == "I8":
            raise CheckpointError(
                f"{path}: {name} is int8 and has no {stem}.SCB next to it, which holds its scales; the folder is incomplete"
            )
        if part == "weight" and spec.dtype == "U8":
            raise CheckpointError(f"{path}: {name} is uint8 and has no quant_state next to it; the folder is incomplete")
    if not quantized:
        raise CheckpointError(
            f"{path}: config.json declares bitsandbytes, and no tensor is quantized: the weights are dense; "
            "take quantization_config out of it"
        )


def contradictions(
    quant_config: Mapping[str, Any],
    four_bit: Mapping[str, FourBit],
    quantized: Mapping[str, QuantizedWeight],
    specs: Mapping[str, TensorSpec],
) -> list[str]:
    """Where config.json and the tensors differ. The tensors are used."""
    notes = []
    n_rows = len(quantized) - len(four_bit)
    if four_bit and n_rows:
        notes.append(f"{len(four_bit)} tensors have 4 bits and {n_rows} have 8; bitsandbytes loads one or the other")
    declared = "4" if quant_config.get("load_in_4bit") is True else "8" if quant_config.get("load_in_8bit") is True else None
    if declared != ("4" if four_bit else "8"):
        notes.append(f"config.json loads in {declared or 'neither 4 nor 8'} bits, and the tensors have {'4' if four_bit else '8'}")
    found: dict[str, Any] = {}
    if four_bit:
        found["bnb_4bit_quant_type"] = sorted({f.state.kind for f in four_bit.values()})
        found["bnb_4bit_use_double_quant"] = sorted({f.state.nested is not None for f in four_bit.values()})
        found["bnb_4bit_quant_storage"] = sorted({str(DTYPES[specs[name].dtype]).removeprefix("torch.") for name in four_bit})
    for key, values in found.items():
        if key in quant_config and quant_config[key] not in values:
            notes.append(f"{key} is {shown(quant_config[key])}, and the tensors have {', '.join(str(value) for value in values)}")
    return notes + idle_skips(quant_config.get("llm_int8_skip_modules"), quantized, specs)


def idle_skips(skipped: Any, quantized: Mapping[str, QuantizedWeight], specs: Mapping[str, TensorSpec]) -> list[str]:
    """What ``llm_int8_skip_modules`` names and the folder does not have, or has quantized."""
    if not isinstance(skipped, list):
        return [] if skipped is None else [f"llm_int8_skip_modules is {shown(skipped)}; expected a list of modules"]
    notes, joined = [], fused_groups(specs)  # as vLLM names what it runs
    for module in (entry for entry in skipped if isinstance(entry, str) and entry):
        named = joined.get(module) or [name for name in specs if is_under(name, module)]
        if not named and unknown([module], (*specs, *joined, *(at.stack for name in specs if (at := expert_of(name))))):
            notes.append(f"llm_int8_skip_modules names {shown(module)}, and no tensor is under it")
        elif hit := [name for name in named if name in quantized]:
            notes.append(f"llm_int8_skip_modules names {shown(module)}, and {hit[0]} is quantized")
    return notes


def is_under(name: str, module: str) -> bool:
    """Whether tensor ``name`` belongs to ``module``, given in full, by its last parts, or as one of the modules around it."""
    return f".{module}." in f".{name}."
