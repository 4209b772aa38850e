"""compressed-tensors' own bytes of FP8, FP4 and their kin."""

from __future__ import annotations

import torch
from safetensors.torch import load_file

from quantcli.tensors import QuantizedTensor
from support.places import DATA

GOLDEN = load_file(DATA / "minifloat.safetensors")


def parts_equal(found: QuantizedTensor, name: str) -> bool:
    expected = {key.split("/")[1]: part for key, part in GOLDEN.items() if key.startswith(f"{name}/")} | {}
    expected.pop("decoded", None)
    same = [
        part.dtype == found.parts[key].dtype and torch.equal(part.view(torch.uint8), found.parts[key].view(torch.uint8))
        for key, part in expected.items()
    ]
    return found.parts.keys() == expected.keys() and all(same)
