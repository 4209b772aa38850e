"""compressed-tensors' ``quantization_config``: config groups, their arguments, and how each scheme is written there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantcli.checkpoint.json_files import shown
from quantcli.errors import CheckpointError, UnsupportedError
from quantcli.tensors import Scheme

METHOD = "compressed-tensors"
LEGACY_KEY = "compression_config"
"""Where config.json had this object before transformers knew them."""

LIBRARY_VERSION = "0.20.0"
"""The version of compressed-tensors whose form of the config is written."""

BLOCK = (128, 128)
"""The (rows, inputs) that FP8's strategy block means where no other block is given."""

MIXED = "mixed-precision"
SPARSE_FORMATS = ("sparse-bitmask", "sparse-24-bitmask", "marlin-24")

ARGUMENTS: dict[str, tuple[tuple[type, ...], str]] = {
    "num_bits": ((int,), "an integer"),
    "type": ((str,), "int or float"),
    "symmetric": ((bool,), "true or false"),
    "strategy": ((str, type(None)), "a string"),
    "group_size": ((int, type(None)), "an integer"),
    "dynamic": ((bool, str), "true, false or local"),
}
"""What the arguments that matter here may be."""


@dataclass(frozen=True, slots=True)
class Arguments:
    """The quantization of weights or inputs, with the library's defaults for what is not given. ``block``: (rows, inputs)."""

    num_bits: int = 8
    type: str = "int"
    symmetric: bool = True
    strategy: str = "tensor"
    group_size: int | None = None
    dynamic: bool | str = False
    block: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """A config group: how the modules that ``targets`` name (class names, module names, ``re:`` patterns) are quantized."""

    name: str
    targets: tuple[str, ...]
    weights: Arguments | None
    inputs: Arguments | None


@dataclass(frozen=True, slots=True)
class QuantConfig:
    """A ``quantization_config`` as far as reading needs it."""

    groups: tuple[Group, ...]
    ignore: tuple[str, ...]
    status: str


def quant_config_of(config: Mapping[str, Any]) -> Any:
    """The quantization_config of ``config`` (config.json): where it is, or was before transformers knew it."""
    found = config.get("quantization_config") or config.get(LEGACY_KEY)
    if isinstance(found, dict) and isinstance(nested := found.get("quantization_config"), dict):
        return {"quant_method": METHOD, **nested, "sparsity_config": found.get("sparsity_config")}
    return found


def is_compressed_tensors(config: Mapping[str, Any]) -> bool:
    quant_config = quant_config_of(config)
    if not isinstance(quant_config, dict):
        return False
    method = quant_config.get("quant_method")
    return "config_groups" in quant_config if method is None else str(method).lower().replace("_", "-") == METHOD


def parse(path: Path, quant_config: Mapping[str, Any]) -> QuantConfig:
    """``quant_config``, checked.

    Raises :class:`CheckpointError` for a value of the wrong kind, :class:`UnsupportedError` for sparse or rotated weights.
    """
    sparsity, transform = quant_config.get("sparsity_config"), quant_config.get("transform_config")
    sparse = sparsity.get("format") if isinstance(sparsity, dict) else None
    if (form := quant_config.get("format")) in SPARSE_FORMATS or sparse not in (None, "dense"):
        raise UnsupportedError(
            f"{path}: {shown(form if form in SPARSE_FORMATS else sparse)} is a sparse layout, which quantcli does not read"
        )
    if isinstance(transform, dict) and transform.get("config_groups"):
        raise UnsupportedError(f"{path}: transform_config rotates weights as the model runs, which quantcli does not do")
    groups = quant_config.get("config_groups") or {}
    ignore = quant_config.get("ignore") or []
    if not isinstance(groups, dict):
        raise CheckpointError(f"{path}: config_groups is {shown(groups)}; expected an object of groups")
    return QuantConfig(
        groups=tuple(parse_group(path, str(name), group) for name, group in groups.items()),
        ignore=names_in(path, "ignore", ignore),
        status=str(quant_config.get("quantization_status") or "compressed"),
    )


def parse_group(path: Path, name: str, group: Any) -> Group:
    if isinstance(group, list):  # a preset by name, its targets as the value: what the tensors do not show stays unknown
        return Group(name, names_in(path, name, group), None, None)
    if not isinstance(group, dict):
        raise CheckpointError(f"{path}: config group {shown(name)} is {shown(group)}; expected an object")
    sides = [parse_arguments(path, f"{name}.{side}", group.get(side)) for side in ("weights", "input_activations")]
    return Group(name, names_in(path, f"{name}.targets", group.get("targets") or []), *sides)


def names_in(path: Path, what: str, value: Any) -> tuple[str, ...]:
    """``value`` as names of modules or classes, and patterns that compile."""
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise CheckpointError(f"{path}: {shown(what)} is {shown(value)}; expected a list of names")
    for item in value:
        if item.startswith("re:"):
            check_pattern(path, what, item)
    return tuple(value)


def check_pattern(path: Path, what: str, item: str) -> None:
    try:
        re.compile(item.removeprefix("re:"))
    except (re.error, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{path}: {shown(item)} in {shown(what)} is no regular expression: {shown(str(error))}") from None


def parse_arguments(path: Path, where: str, value: Any) -> Arguments | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: {shown(where)} is {shown(value)}; expected an object")
    given = {}
    for key, (kinds, expected) in ARGUMENTS.items():
        if key not in value:
            continue
        if not isinstance(value[key], kinds) or (isinstance(value[key], bool) and bool not in kinds):
            raise CheckpointError(f"{path}: {shown(where)}: {key} is {shown(value[key])}; expected {expected}")
        given[key] = value[key]
    size = given.get("group_size")
    if given.get("strategy") is None:
        given["strategy"] = "tensor" if size is None else "channel" if size == -1 else "group"
    return Arguments(**given, block=parse_block(path, where, value.get("block_structure")))


def parse_block(path: Path, where: str, value: Any) -> tuple[int, int] | None:
    """[128, 128], or "128x128" as old files have it."""
    if value is None:
        return None
    sides = value.split("x") if isinstance(value, str) else value
    if isinstance(sides, list) and len(sides) == 2 and all(re.fullmatch("[1-9][0-9]{0,5}", str(side)) for side in sides):
        return int(sides[0]), int(sides[1])
    raise CheckpointError(f"{path}: {shown(where)}: block_structure is {shown(value)}; expected [rows, columns]")


INPUTS: dict[str, Arguments] = {
    "int8-token": Arguments(8, "int", True, "token", None, True),
    "fp8-token": Arguments(8, "float", True, "token", None, True),
    "int8-tensor": Arguments(8, "int", True, "tensor", None, False),
    "fp8-tensor": Arguments(8, "float", True, "tensor", None, False),
    "fp8-g128": Arguments(8, "float", True, "group", 128, True),
    "mxfp4-g32": Arguments(4, "float", True, "group", 32, True),
    "mxfp8-g32": Arguments(8, "float", True, "group", 32, True),
    "nvfp4-g16": Arguments(4, "float", True, "tensor_group", 16, "local"),
}
"""A scheme's name for its inputs' format → the library's arguments for it."""


def act_of(inputs: Arguments | None) -> str | None:
    """The scheme's name for the format of ``inputs``: "" for none, None where there is no name for it."""
    if inputs is None:
        return ""
    if inputs.strategy in ("token", "tensor"):  # a group size means nothing there
        inputs = Arguments(inputs.num_bits, inputs.type, inputs.symmetric, inputs.strategy, None, inputs.dynamic)
    return next((act for act, known in INPUTS.items() if known == inputs), None)


def input_scale_file(act: str) -> str:
    """The local name of the scale that ``act`` has for its inputs, where that is found beforehand."""
    return "input_global_scale" if act == "nvfp4-g16" else "input_scale"


def format_of(scheme: Scheme) -> str:
    """The library's format for ``scheme``, as its own inference decides."""
    fixed = {"mxfp4": "mxfp4-pack-quantized", "mxfp8": "mxfp8-quantized", "nvfp4": "nvfp4-pack-quantized"}
    if scheme.qtype in fixed:
        return fixed[scheme.qtype]
    if scheme.qtype == "int":
        return "int-quantized" if scheme.get("act") else "pack-quantized"
    return "float-quantized" if scheme.get("act") else "naive-quantized"


def group_config(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    """``scheme`` as a config group. A scheme object of the library forbids keys that it does not know."""
    act = scheme.get("act")
    return {
        "targets": targets,
        "weights": argument_config(weight_arguments(scheme), scale_dtype_name(scheme.qtype)),
        "input_activations": argument_config(INPUTS[act], scale_dtype_name(act.partition("-")[0])) if act else None,
        "output_activations": None,
        "format": format_of(scheme),
    }


def weight_arguments(scheme: Scheme) -> Arguments:
    if scheme.qtype == "int":
        size = scheme.option("group_size")
        strategy = "channel" if size == -1 else "group"
        return Arguments(scheme.option("bits"), "int", scheme.option("sym"), strategy, None if size == -1 else size)
    if scheme.qtype == "fp8":
        strategy = scheme.option("strategy")
        return Arguments(8, "float", strategy=strategy, block=BLOCK if strategy == "block" else None)
    bits, size, strategy = {"mxfp4": (4, 32, "group"), "mxfp8": (8, 32, "group"), "nvfp4": (4, 16, "tensor_group")}[scheme.qtype]
    return Arguments(bits, "float", strategy=strategy, group_size=size)


def scale_dtype_name(number: str) -> str | None:
    """The dtype of the scales of ``number`` (a qtype, or the first part of an activation's name), where it is not the model's. NVFP4's
    goes without saying, and the first releases that know NVFP4 refuse the key."""
    return {"mxfp4": "torch.uint8", "mxfp8": "torch.uint8"}.get(number)


def argument_config(arguments: Arguments, scale_dtype: str | None) -> dict[str, Any]:
    """``arguments`` as the library's own files have them, but for zp_dtype, which follows from the rest, and a scale_dtype of null:
    releases before 0.13 refuse both keys."""
    config = {
        "num_bits": arguments.num_bits,
        "type": arguments.type,
        "symmetric": arguments.symmetric,
        "strategy": arguments.strategy,
        "group_size": arguments.group_size,
        "block_structure": list(arguments.block) if arguments.block else None,
        "dynamic": arguments.dynamic,
        "actorder": None,
        "scale_dtype": scale_dtype,
        "observer": None,
        "observer_kwargs": {},
    }
    if scale_dtype is None:
        del config["scale_dtype"]
    return config
