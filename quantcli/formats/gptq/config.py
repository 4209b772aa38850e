"""GPTQ's ``quantization_config``: finding it, checking it, and writing it for each reader."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from quantcli import __version__
from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.json_files import read_json, shown
from quantcli.checkpoint.modules import DERIVED, Modules
from quantcli.errors import UnsupportedError
from quantcli.formats.shared import dynamic
from quantcli.formats.shared.dense import dense_modules, dense_weights, is_linear
from quantcli.formats.shared.folder import split_block
from quantcli.formats.shared.packed_folder import Settings
from quantcli.tensors import Scheme

V1, V2 = "gptq", "gptq_v2"
USUAL_BLOCKS = ("transformer.h", "model.decoder.layers", "gpt_neox.layers", "model.layers", "model.language_model.layers")
"""What optimum takes for a model's blocks, the first there is."""

LEGACY_CONFIG = "quantize_config.json"


def settings_reader(quant_config: Mapping[str, Any]) -> Callable[[str], Settings]:
    """The declared settings of a module: the folder's, as changed by its ``dynamic`` rules."""
    rule = dynamic.reader(quant_config.get("dynamic"))

    def of(module: str) -> Settings:
        own = rule(module)
        merged = {**quant_config, **(own or {})}
        group_size = merged.get("group_size", 128)
        return Settings(
            bits=merged.get("bits"),
            group_size=group_size,
            sym=bool(merged.get("sym", True)),
            desc_act=bool(merged.get("desc_act", False)) and group_size != -1,
            skipped=own is None,
        )

    return of


def is_gptq(quant_config: Any, *, unnamed: bool) -> bool:
    """Whether ``quant_config`` names GPTQ; ``unnamed``: the answer for one with bits and no method, as AutoGPTQ wrote them."""
    if not isinstance(quant_config, dict):
        return False
    method = quant_config.get("quant_method")
    return unnamed and "bits" in quant_config if method is None else str(method).lower() == "gptq"


def legacy_config(path: Path) -> Any:
    file = path / LEGACY_CONFIG
    return read_json(file, unique=False) if file.is_file() else None


def declared_version(path: Path, quant_config: Mapping[str, Any]) -> str:
    """ "gptq" (v1) or "gptq_v2"; :class:`UnsupportedError` for GPTQ in an engine's private layout."""
    version = quant_config.get("checkpoint_format") or quant_config.get("format") or V1
    if version not in (V1, V2) or quant_config.get("is_marlin_format"):
        shape = "marlin" if quant_config.get("is_marlin_format") else version
        raise UnsupportedError(f"{path}: checkpoint_format {shown(shape)} is an engine's own layout; quantcli reads {V1} and {V2}")
    return str(version)


def quantization_config(source: Checkpoint, quantized: Mapping[str, Scheme], version: str, modules: Modules) -> dict[str, Any]:
    """``quantization_config``: the commonest scheme, and what differs from it, in each reader's own form."""
    settings = {name: module_settings(scheme) for name, scheme in quantized.items()}
    (common, _), *_ = Counter(settings.values()).most_common()
    main = dict(common)
    quant_config: dict[str, Any] = {
        "quant_method": "gptq",
        **main,
        "desc_act": any(scheme.get("desc_act", False) for scheme in quantized.values()),
        "act_group_aware": False,  # transformers' default is true
        "lm_head": "lm_head.weight" in quantized,
        "checkpoint_format": version,
        "meta": {"quantizer": [f"quantcli:{__version__}"], "quantcli": {}},
    }
    left = [name for name in dense_modules(source, quantized, modules) if name.rpartition(".")[2] != "lm_head"]
    blocks = {split_block(name)[0] for name in quantized} - {""}
    if any(split_block(spec.name)[0] in blocks and is_linear(spec.name, modules) for spec in dense_weights(source, quantized)):
        # vLLM and optimum take the list of what is quantized, GPTQModel the patterns of what is not.
        quant_config["modules_in_block_to_quantize"] = [
            listed_modules(quantized, left, modules),
            *([["lm_head"]] if quant_config["lm_head"] else []),
        ]
    if (block := unusual_block(quantized, modules)) is not None:
        quant_config["block_name_to_quantize"] = block
    spelt = {f"{name}.weight": chosen for weight, chosen in settings.items() for name in modules.spellings(weight)}
    if rules := dynamic.written({**{f"{name}.weight": None for name in left}, **spelt}, common):
        quant_config["dynamic"] = rules
    return quant_config


def unusual_block(quantized: Mapping[str, Scheme], modules: Modules) -> str | None:
    """Where the class that config.json names has its blocks, if that is not where optimum looks by itself."""
    found = {split_block(modules.of[name].names[0])[0] for name in quantized if name in modules.of} - {""}
    unusual = sorted(block for block in found if not block.startswith(USUAL_BLOCKS))
    return unusual[0] if len(found) == 1 and unusual else None


def surprises(quantized: Mapping[str, Scheme], modules: Modules, *, derived: bool) -> tuple[str, ...]:
    """What engines make of linears that differ. ``derived``: the family's linears are of a class of their own."""
    notes = []
    if len({(scheme.option("bits"), scheme.option("group_size")) for scheme in quantized.values()}) > 1:
        notes.append(
            "linears differ in bits or group size: vLLM, SGLang and GPTQModel read the rules for that (`dynamic`), and transformers, "
            "which does not, refuses the folder"
        )
    if "lm_head.weight" in quantized:
        notes.append(
            "lm_head is quantized: vLLM, SGLang and GPTQModel read it, and transformers 5 leaves it at random numbers without a warning; "
            "use --format compressed-tensors for that"
        )
    if derived or any(name in modules.of and modules.of[name].kind == DERIVED for name in quantized):
        notes.append(
            "linears of a class derived from torch's: vLLM and GPTQModel read them, and transformers with optimum leaves them at random "
            "numbers; use --format compressed-tensors for that"
        )
    return tuple(notes)


def module_settings(scheme: Scheme) -> tuple[tuple[str, Any], ...]:
    """What ``dynamic`` may set for one module."""
    return tuple((key, scheme.get(key, default)) for key, default in (("bits", 4), ("group_size", 128), ("sym", True)))


def listed_modules(quantized: Mapping[str, Scheme], left: Sequence[str], modules: Modules) -> list[str]:
    """The quantized modules by their names inside a block, which readers look for in a module's name; in full, and by each of their names,
    where one of ``left`` has such a name in it."""
    inside = [name for name in quantized if split_block(name)[0]]
    suffixes = sorted({split_block(name)[1] for name in inside})
    if not any(suffix in name for name in left for suffix in suffixes):
        return suffixes
    return sorted({name for weight in inside for name in modules.spellings(weight)})
