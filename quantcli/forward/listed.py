"""Lists the linears in the numbered blocks of a model that is not run: an encoder with its decoder, a model of images or of sound."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from quantcli.checkpoint import views
from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.forward.names import NameMap
from quantcli.forward.skeleton import dtypes

ROUTERS = ("router", "gate")
"""Modules that send tokens to experts; they stay dense."""


def listed_linears(checkpoint: Checkpoint, model: Any) -> tuple[str, ...]:
    """Disk names of the weights of ``model``'s linears that lie in a block of several: not its heads, nor what it keeps in float32.

    ``model``: the checkpoint's, without weights. Raises :class:`CheckpointError` where the tensors are not those of the model.
    """
    names = NameMap(model, checkpoint.specs, checkpoint.source, views.experts_apart(checkpoint))
    loaded_as = dtypes(model, torch.float16)
    blocks = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    found: list[str] = []
    for module_name, module in model.named_modules():
        weight = f"{module_name}.weight"
        if type(module) is not nn.Linear or not module_name.startswith(blocks) or not set(ROUTERS).isdisjoint(module_name.split(".")):
            continue
        if weight in names.disk and loaded_as[weight] != torch.float32:
            found.append(names.disk[weight])
    return tuple(found)
