"""Reading compressed-tensors folders: the tensors next to a module's scale give its number format, the config groups the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from typing_extensions import override

from quantcli.checkpoint.checkpoint import read_config
from quantcli.checkpoint.shards import Shards, open_folder
from quantcli.errors import CheckpointError, RecipeError, UnsupportedError
from quantcli.formats.compressed_tensors import cache, floats, ints
from quantcli.formats.compressed_tensors.config import (
    INPUTS,
    LEGACY_KEY,
    Arguments,
    Group,
    QuantConfig,
    act_of,
    input_scale_file,
    is_compressed_tensors,
    parse,
    quant_config_of,
)
from quantcli.formats.compressed_tensors.match import Claims, contradictions, listed
from quantcli.formats.shared.folder import FolderCheckpoint, QuantizedWeight, model_dtype, module_of
from quantcli.tensors import QuantizedTensor, Scheme, TensorSpec

WEIGHT_FILES = (
    "weight",
    "weight_packed",
    "weight_scale",
    "weight_shape",
    "weight_zero_point",
    "weight_g_idx",
    "weight_global_scale",
    "input_scale",
    "input_zero_point",
    "input_global_scale",
)
"""What the tensors of a quantized module are called, after its own name."""

ONLY_PACKED = ("weight_packed", "weight_shape", "weight_g_idx", "weight_global_scale")
"""Of these, the ones that make no sense with a dense weight."""

QUANTIZED_DTYPES = ("I8", *floats.FP8_DTYPES)


@dataclass(frozen=True, slots=True)
class Found:
    """A quantized module: its file tensors by local name, its scheme and shape, and for integers how they lie."""

    files: dict[str, TensorSpec]
    scheme: Scheme
    shape: tuple[int, ...]
    stored: ints.Stored | None
    notes: tuple[str, ...]


class CompressedTensorsCheckpoint(FolderCheckpoint):
    """A folder in compressed-tensors' layouts."""

    def __init__(self, path: Path, config: dict[str, Any], quant_config: dict[str, Any], shards: Shards) -> None:
        claims = Claims(parsed := parse(path, quant_config))
        modules = find_modules(path, shards.specs)
        if not modules and parsed.groups:
            raise nothing_quantized(path, parsed)
        self._found = {f"{module}.weight": settle(path, module, files, claims, shards) for module, files in modules.items()}
        dense = {module_of(n): len(s.shape) for n, s in shards.specs.items() if n.endswith(".weight") and n not in self._found}
        tied = bool(config.get("tie_word_embeddings"))
        kv_cache, cache_notes = cache.found(path, quant_config.get("kv_cache_scheme"), shards.specs)
        notes = [
            *cache_notes,
            *contradictions(claims, modules, dense, tied=tied),
            *gathered(self._found),
            *unrounded(shards.specs, modules),
        ]
        super().__init__(
            path,
            kind="compressed-tensors",
            config={key: value for key, value in config.items() if key != LEGACY_KEY} | {"quantization_config": quant_config},
            shards=shards,
            quantized={name: quantized_of(name, found, model_dtype(config)) for name, found in self._found.items()},
            quantization=quant_config,
            notes=notes,
            kv_cache=kv_cache,
        )

    @override
    def cache_scales(self, attention: str) -> tuple[torch.Tensor, torch.Tensor]:
        return cache.load(self.shards, attention)

    @override
    def load_quantized(self, name: str) -> QuantizedTensor:
        found, scheme = self._found[name], self.schemes[name]
        files = {local: self.shards.read(spec.name) for local, spec in found.files.items()}
        if found.stored is None:
            check_no_zeros(files.get("weight_zero_point"), found)
            parts = floats.decode(scheme, found.shape, files)
        else:
            where = f"{self.path}: {module_of(name)}"
            if "weight_shape" in files and files["weight_shape"].tolist() != list(found.shape):
                raise CheckpointError(f"{where}.weight_shape holds {files['weight_shape'].tolist()}; its codes are {list(found.shape)}")
            parts = ints.decode(where, found.stored, files)
            if scheme.get("sym") and bool((parts["zero"] != 2 ** (scheme.option("bits") - 1)).any()):
                scheme = scheme.with_options(sym=False)
            if scheme.get("desc_act"):
                parts["g_idx"] = checked_groups(found, files["weight_g_idx"])
        if scheme.static_activations:
            parts["input_scale"] = files[input_scale_file(scheme.get("act"))].float().reshape(1)
        return QuantizedTensor(scheme, found.shape, parts)


def detect(path: Path, config: dict[str, Any] | None) -> bool:
    """A folder whose config.json declares compressed-tensors, at today's key or at the old one."""
    return config is not None and is_compressed_tensors(config)


def read(path: Path) -> CompressedTensorsCheckpoint:
    """The folder at ``path``: headers, and of packed matrices whose groups do not give it their shape (16 bytes)."""
    config = read_config(path)
    return CompressedTensorsCheckpoint(path, config, quant_config_of(config), open_folder(path))


def find_modules(path: Path, specs: Mapping[str, TensorSpec]) -> dict[str, dict[str, TensorSpec]]:
    """Every quantized module with its file tensors by local name; :class:`CheckpointError` for one that lacks its codes or scale."""
    groups: dict[str, dict[str, TensorSpec]] = {}
    for name, spec in specs.items():
        module, _, local = name.rpartition(".")
        if module and local in WEIGHT_FILES:
            groups.setdefault(module, {})[local] = spec
    modules = {}
    for module, files in groups.items():
        packed, weight = files.get("weight_packed"), files.get("weight")
        if packed is None and (weight is None or weight.dtype not in QUANTIZED_DTYPES):
            check_dense(path, module, files)
            continue
        if packed is not None and weight is not None:
            raise CheckpointError(f"{path}: {module} has both a .weight and a .weight_packed")
        if "weight_scale" not in files:
            held = next(spec for spec in (packed, weight) if spec)
            raise CheckpointError(f"{path}: {held.name} is {held.dtype}, and {module}.weight_scale is missing; the folder is incomplete")
        modules[module] = files
    return modules


def check_dense(path: Path, module: str, files: Mapping[str, TensorSpec]) -> None:
    """Raise :class:`CheckpointError` for parts of a quantized module whose codes are not there."""
    left = [local for local in files if local in ONLY_PACKED or (local.startswith("weight_") and "weight" not in files)]
    if left:
        what = "no codes next to it (.weight_packed, or .weight of 8 bits)"
        raise CheckpointError(f"{path}: {module}.{left[0]} has {what}; the folder is incomplete")


def nothing_quantized(path: Path, quant_config: QuantConfig) -> CheckpointError | UnsupportedError:
    if quant_config.status != "compressed":
        return UnsupportedError(
            f"{path}: quantization_status is {quant_config.status}: the weights are not compressed yet; "
            "save the model with save_compressed=True"
        )
    return CheckpointError(f"{path}: config.json declares compressed-tensors, and no tensor holds codes; the folder is dense or damaged")


def settle(path: Path, module: str, files: Mapping[str, TensorSpec], claims: Claims, shards: Shards) -> Found:
    """What ``module`` holds, by its ``files``; its config group where these do not show it."""
    where = f"{path}: {module}"
    group = claims.group_of(module)
    declared = group.weights if group else None
    act, notes = act_in(group, files)
    packed = files.get("weight_packed")
    if packed is not None and packed.dtype not in ("I32", "U8"):
        raise CheckpointError(f"{where}.weight_packed is {packed.dtype}; expected I32 (integers) or U8 (pairs of FP4)")
    if (packed or files["weight"]).dtype in ("I32", "I8"):
        found = settle_integers(where, files, declared, act, stored_shape(where, files, declared, shards))
        if found.stored and not found.stored.packed and group and group.weights and not group.inputs:
            notes.append("integers of one byte, and its config group has no input_activations; vLLM does not load this pair")
    else:
        found = settle_floats(where, files, declared, act)
    return replace(found, notes=(*notes, *found.notes))


def settle_integers(
    where: str, files: Mapping[str, TensorSpec], declared: Arguments | None, act: str, weight_shape: list[int] | None
) -> Found:
    stored, notes = ints.measure(where, files, weight_shape, declared)
    sym = stored.zeros is None or (declared is not None and declared.symmetric and stored.zeros == "plain")
    scheme = ints.scheme_of(stored, scale_dtype=files["weight_scale"].dtype, sym=sym, desc_act="weight_g_idx" in files, act=act)
    if stored.grid_bits != stored.bits:
        notes.append(f"int{stored.bits} is read as int{stored.grid_bits}, which holds it exactly")
    return Found(dict(files), scheme, stored.shape, stored, tuple(notes))


def settle_floats(where: str, files: Mapping[str, TensorSpec], declared: Arguments | None, act: str) -> Found:
    try:
        scheme, shape = floats.measure(where, files, declared, act)
    except RecipeError as error:  # the qtype refuses a shape that the file declares
        raise CheckpointError(f"{where}: {error}") from None
    return Found(dict(files), scheme, shape, None, tuple(float_notes(declared, scheme)))


def act_in(group: Group | None, files: Mapping[str, TensorSpec]) -> tuple[str, list[str]]:
    """How inputs are quantized, as a scheme has it, and notes on what a scheme cannot express."""
    act = act_of(group.inputs if group else None)
    if act is None:
        return "", ["its inputs are quantized in a way that quantcli has no name for; they are taken as they are"]
    if not act or INPUTS[act].dynamic is True:
        return act, []
    needed = input_scale_file(act)
    scale = files.get(needed)
    if scale is None or scale.n_elements != 1 or scale.dtype not in ints.SCALE_DTYPES:
        return "", [f"its inputs have a scale found beforehand, as the config group declares, and no {needed} of one number is there"]
    return act, []


def float_notes(declared: Arguments | None, scheme: Scheme) -> list[str]:
    bits = 4 if scheme.qtype in ("mxfp4", "nvfp4") else 8
    if declared is None or (declared.type, declared.num_bits) == ("float", bits):
        return []
    return [f"weights are declared as {declared.type}{declared.num_bits}, and the tensors hold {scheme.qtype}"]


def stored_shape(where: str, files: Mapping[str, TensorSpec], declared: Arguments | None, shards: Shards) -> list[int] | None:
    """What weight_shape holds, where it is needed: a model of many experts has tens of thousands of them."""
    spec = files.get("weight_shape")
    if spec is None:
        return None
    if spec.dtype not in ("I64", "I32") or spec.shape != (2,):
        raise CheckpointError(f"{where}.weight_shape is {spec.dtype} {list(spec.shape)}; expected I64 [2]")
    if "weight_packed" in files and ints.is_evident(files, declared):
        return None
    shape: list[int] = shards.read(spec.name).tolist()
    return shape


def checked_groups(found: Found, g_idx: torch.Tensor) -> torch.Tensor:
    """``weight_g_idx`` [in] int32 within the groups; −1, the library's value for unset, means groups in order."""
    assert found.stored is not None
    n_in, n_groups = found.stored.shape[1], found.stored.n_groups
    if bool((g_idx == -1).all()):
        return torch.arange(n_in, dtype=torch.int32) // (n_in // n_groups)
    if not 0 <= int(g_idx.min()) <= int(g_idx.max()) < n_groups:
        name = found.files["weight_g_idx"].name
        raise CheckpointError(f"{name}: groups {int(g_idx.min())} … {int(g_idx.max())}; there are {n_groups}")
    return g_idx


def check_no_zeros(zeros: torch.Tensor | None, found: Found) -> None:
    """Old files give symmetric floats zero points of zero; others mean nothing that an engine computes."""
    if zeros is not None and bool(zeros.float().ne(0).any()):
        raise UnsupportedError(f"{found.files['weight_zero_point'].name}: {found.scheme} with zero points other than zero")


def gathered(found: Mapping[str, Found]) -> list[str]:
    """The modules' notes, each sentence once, with the first module it is true of."""
    by_note: dict[str, list[str]] = {}
    for name, one in found.items():
        for note in one.notes:
            by_note.setdefault(note, []).append(module_of(name))
    return [f"{listed(names)}: {note}" for note, names in by_note.items()]


def unrounded(specs: Mapping[str, TensorSpec], modules: Mapping[str, Any]) -> list[str]:
    """What is dense though it has a scale."""
    names = [name.removesuffix("_scale") for name in specs if name.endswith(".weight_scale")]
    dense = [name for name in names if module_of(name) not in modules]
    return [f"{listed(dense)} dense and with a scale: read as it is stored, where an engine may round it"] if dense else []


def quantized_of(name: str, found: Found, model: str) -> QuantizedWeight:
    scale = found.files["weight_scale"].dtype
    dtype = scale if scale in ints.SCALE_DTYPES else model
    return QuantizedWeight.of(name, found.shape, dtype, scheme=found.scheme, files=found.files.values())
