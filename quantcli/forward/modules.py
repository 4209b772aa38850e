"""Which module of transformers' models each weight of a folder becomes, and which linears transformers keeps dense."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.modules import DERIVED, LINEAR, OTHER, Module, Modules
from quantcli.errors import CheckpointError
from quantcli.forward.skeleton import build_as


def modules_of(source: Checkpoint) -> Modules | None:
    """The modules of ``source`` in each class that loads it: those that config.json names, the causal language model, the one for images
    and text; None where transformers has no such class, or cannot build it from config.json."""
    found: dict[str, list[tuple[str, str, str]]] = {}
    unstored: dict[str, None] = {}
    lost: dict[str, dict[str, None]] = {}
    models = list(_models(source))
    for model in models:
        modules = dict(model.named_modules())
        filled = {target: disk for disk, target in _targets(model, source.specs)}
        for target, disk in filled.items():
            name = target.removesuffix(".weight")
            for format_ in _replacing(modules.get(target.rpartition(".")[0])):
                lost.setdefault(format_, {})[disk] = None
            if name in modules and target != name:
                found.setdefault(disk, []).append((name, _kind(modules[name]), _kept(model, name)))
        unstored |= {name: None for name, m in modules.items() if isinstance(m, nn.Linear) and f"{name}.weight" not in filled}
    if not models:
        return None
    return Modules({disk: _merged(found[disk]) for disk in found}, tuple(unstored), {key: tuple(names) for key, names in lost.items()})


def _models(source: Checkpoint) -> Iterator[Any]:
    """A model without weights of each class that loads ``source``, one of each name."""
    import transformers
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[source.config["model_type"]] if source.config.get("model_type") in CONFIG_MAPPING else None
    if config_class is None:
        return
    named = [getattr(transformers, name, None) for name in _named(source)]
    mapped = [
        mapping[config_class]
        for mapping in (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING, modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
        if config_class in mapping
    ]
    classes = [c for c in (*named, *mapped) if isinstance(c, type) and issubclass(c, transformers.PreTrainedModel)]
    for cls in dict.fromkeys(classes):
        try:
            yield build_as(cls, source.config, torch.float32, source.source)
        except CheckpointError:
            continue  # a class of another part of the model, or a config that another check answers for


def _named(source: Checkpoint) -> list[str]:
    named = source.config.get("architectures")
    return [name for name in named if isinstance(name, str)] if isinstance(named, list) else []


def _targets(model: Any, disk_names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(disk name, name in ``model``) of the tensors that ``model`` loads."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [t for t in mapping if isinstance(t, WeightRenaming)]
    converters = [t for t in mapping if isinstance(t, WeightConverter)]
    expected = model.state_dict()
    for name in disk_names:
        target, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, expected)
        if target in expected:
            yield name, target
        elif name in expected:
            yield name, name


def _replacing(module: nn.Module | None) -> list[str]:
    """The formats for which transformers has another module in the place of ``module``, with other tensors."""
    from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION

    patch: Any = MODULES_TO_PATCH_FOR_QUANTIZATION.get(type(module).__name__)
    return [str(method.value) for method in patch["quantization_methods"]] if patch else []


def _kind(module: nn.Module) -> str:
    if type(module) is nn.Linear:
        return LINEAR
    return DERIVED if isinstance(module, nn.Linear) else OTHER


def _kept(model: Any, name: str) -> str:
    """Why transformers' quantizers keep the module ``name`` of ``model`` dense."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = sorted(model._keep_in_fp32_modules or ())
    return f"{type(model).__name__} keeps it in float32" if kept and not should_convert_module(name, kept) else ""


def _merged(found: list[tuple[str, str, str]]) -> Module:
    names, kinds, reasons = zip(*found, strict=True)
    return Module(tuple(dict.fromkeys(names)), kinds[0], next(filter(None, reasons), ""))
