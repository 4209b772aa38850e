"""Layers held against each other: what a model that transformers does not know can be checked by."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from quantcli.tensors import TensorSpec

IN_LAYER = re.compile(r"(?P<stack>(?:.*?\.)?(?:layers|h|blocks|block|layer))\.(?P<number>\d+)\.(?P<rest>.+)")
"""A tensor of a layer: ``model.layers.3.mlp.up_proj.weight``, ``transformer.h.3.…``."""

Layers = dict[int, dict[str, TensorSpec]]
"""Number of a layer → the rest of each tensor's name → its spec."""


def layers_of(specs: Mapping[str, TensorSpec]) -> dict[str, Layers]:
    """The stacks of layers among ``specs``, by their name."""
    stacks: dict[str, Layers] = defaultdict(lambda: defaultdict(dict))
    for name, spec in specs.items():
        if match := IN_LAYER.match(name):
            stacks[match["stack"]][int(match["number"])][match["rest"]] = spec
    return {stack: dict(layers) for stack, layers in stacks.items()}


def disagreements(specs: Mapping[str, TensorSpec], config: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with ``specs`` by themselves: layers that are not there, a tensor that one layer alone lacks or has empty."""
    for name, spec in specs.items():
        if 0 in spec.shape:
            yield f"{name} is {list(spec.shape)}, without any number; {EMPTY}"
            return
    stacks = layers_of(specs)
    n_layers = config.get("num_hidden_layers")
    for stack, layers in stacks.items():
        if absent := [i for i in range(max(layers) + 1) if i not in layers]:
            yield f"layer {stack}.{absent[0]} is missing, and the checkpoint has {stack}.{max(layers)}"
            return
    if isinstance(n_layers, int) and stacks and n_layers not in {len(layers) for layers in stacks.values()}:
        stack, layers = max(stacks.items(), key=lambda item: len(item[1]))
        if len(layers) < n_layers:
            yield f"config.json says num_hidden_layers {n_layers}, and the checkpoint has {len(layers)} in {stack}"
            return
    for stack, layers in stacks.items():
        yield from _lacking(stack, layers)


EMPTY = (
    "DeepSpeed's ZeRO-3 saves that where a model is not gathered first; make the weights with zero_to_fp32.py, or save them with "
    "stage3_gather_16bit_weights_on_model_save"
)


def _lacking(stack: str, layers: Layers) -> Iterator[str]:
    """Tensors that one layer alone lacks; the first layer of some models lacks a norm that the others have."""
    n_with = Counter(rest for tensors in layers.values() for rest in tensors)
    for rest, n in n_with.items():
        if n == len(layers) - 1 and n > 1 and (number := next(i for i in layers if rest not in layers[i])) > 0:
            yield f"{stack}.{number}.{rest} is missing, and every other layer has it"
            return
