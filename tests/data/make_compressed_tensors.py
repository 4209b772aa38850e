"""Make tests/data/compressed_tensors.safetensors: small matrices as the compressed-tensors library stores and decodes them.

    VENV/bin/python tests/data/make_compressed_tensors.py        # a Python with compressed-tensors 0.20.0 (tests/PEERS.md)

For each case: its file tensors as ``CASE.<local name>``, what the library decompresses them to as ``CASE.dense``, and in the header's
metadata its config group as JSON. Scales and zero points are random, so that every code is used.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from compressed_tensors import __version__
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, preset_name_to_scheme
from safetensors.torch import save_file

TARGET = Path(__file__).parent / "compressed_tensors.safetensors"

PRESETS = {
    **dict.fromkeys(("W2A16", "W3A16", "W4A16", "W8A16", "W4A8"), (8, 256)),
    "W4A16_ASYM": (24, 256),
    **dict.fromkeys(("W5A16", "W8A8", "FP8_DYNAMIC", "FP8"), (8, 128)),
    **dict.fromkeys(("MXFP4A16", "MXFP4", "MXFP8A16", "NVFP4A16"), (24, 64)),
    "FP8_BLOCK": (130, 136),
}
"""The library's presets → shape of the matrix."""

OWN = {
    "W4A16_CHANNEL_ASYM": ((24, 64), {"num_bits": 4, "strategy": "channel", "symmetric": False}),
    "W3A16_ASYM": ((40, 96), {"num_bits": 3, "strategy": "group", "group_size": 32, "symmetric": False}),
    "W4A16_RAGGED": ((20, 70), {"num_bits": 4, "strategy": "channel", "symmetric": True}),
    "FP8_WEIGHT_ONLY": ((24, 64), {"num_bits": 8, "type": "float", "strategy": "channel"}),
}
"""Schemes without a preset → shape and arguments of the weights."""


def scales(g: torch.Generator, scheme: QuantizationScheme, shape: tuple[int, int]) -> torch.Tensor:
    """Random scales in the shape of the strategy: bfloat16, and powers of two for MX."""
    args, (out, n_in) = scheme.weights, shape
    size = {
        "tensor": (1,),
        "channel": (out, 1),
        "group": (out, n_in // (args.group_size or n_in)),
        "tensor_group": (out, n_in // (args.group_size or n_in)),
        "block": (-(-out // 128), -(-n_in // 128)),
    }[args.strategy]
    if args.scale_dtype == torch.uint8:
        return 2.0 ** torch.randint(-9, -1, size, generator=g)
    found = torch.rand(size, generator=g) * 0.1 + 0.01
    return (found * 400).to(torch.float8_e4m3fn).float() if args.scale_dtype else found.bfloat16()


def stored(seed: int, scheme: QuantizationScheme, shape: tuple[int, int]) -> dict[str, torch.Tensor]:
    """The library's tensors of a random matrix, and ``dense``, what it makes of them."""
    g = torch.Generator().manual_seed(seed)
    args = scheme.weights
    scale = scales(g, scheme, shape)
    state = {"weight": torch.randn(shape, generator=g).bfloat16() * (0.05 if scale.dtype == torch.bfloat16 else 0.5), "weight_scale": scale}
    if args.strategy == "tensor_group":
        state["weight_global_scale"] = torch.tensor([317.5])
    if not args.symmetric:
        half = 2 ** (args.num_bits - 1)
        state["weight_zero_point"] = torch.randint(-half, half, scale.shape, generator=g, dtype=torch.int8)
    compressor = BaseCompressor.get_value_from_registry(scheme.format.value)
    files = compressor.compress(state, scheme)
    dense = compressor.decompress(files, scheme)["weight"]
    if scheme.input_activations and scheme.input_activations.dynamic is False:
        files["input_scale"] = torch.tensor([0.03], dtype=torch.bfloat16)
    return {**files, "dense": dense}


def main() -> None:
    schemes = {name: (shape, preset_name_to_scheme(name, ["Linear"])) for name, shape in PRESETS.items()}
    for name, (shape, arguments) in OWN.items():
        schemes[name] = (shape, QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**arguments)))
    tensors, groups = {}, {}
    for seed, (name, (shape, scheme)) in enumerate(schemes.items()):
        scheme.format = infer_module_format(torch.nn.Linear, scheme)
        tensors |= {f"{name}.{local}": tensor.contiguous() for local, tensor in stored(seed, scheme, shape).items()}
        groups[name] = scheme.model_dump(mode="json")
    save_file(tensors, TARGET, metadata={"groups": json.dumps(groups), "compressed_tensors": __version__})


if __name__ == "__main__":
    main()
