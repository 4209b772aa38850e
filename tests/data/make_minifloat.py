"""Makes ``minifloat.safetensors``: weights, and what compressed-tensors makes of them, in a Python that has it.

python tests/data/make_minifloat.py tests/data/minifloat.safetensors [seed]
"""

from __future__ import annotations

import sys

import torch
from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
from compressed_tensors.compressors.mxfp8.base import MXFP8QuantizationCompressor
from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import quantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import save_file
from torch import Tensor

FP8 = {"fp8-tensor": torch.float32, "fp8-channel": torch.float32, "fp8-channel-sbf16": torch.bfloat16, "fp8-block": torch.float32}
GROUPED = {"nvfp4": NVFP4PackedCompressor, "mxfp4": MXFP4PackedCompressor, "mxfp8": MXFP8QuantizationCompressor}


def weights(seed: int) -> Tensor:
    """Rows Gaussian, heavy-tailed, constant, zero, denormal, large, with an outlier, and of many ties; sides that no block divides."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(136, 160, generator=generator)
    W[1::16] **= 3
    W[2] = -0.0371
    W[3] = 0
    W[4] *= 1e-40
    W[5] *= 100
    W[6, 100] = 40
    W[7::16] **= 5
    W[8::16] = torch.randint(-12, 13, (8, 160), generator=generator) / 2
    W[9] *= 1e-4
    return W


def extremes(W: Tensor, strategy: str, group: int = 1) -> tuple[Tensor, Tensor]:
    """The least and the largest weight of what shares a scale."""
    if strategy == "tensor":
        return W.min().view(1), W.max().view(1)
    if strategy == "channel":
        return W.amin(1, keepdim=True), W.amax(1, keepdim=True)
    if strategy == "block":
        padded = torch.nn.functional.pad(W, (0, -W.shape[1] % 128, 0, -W.shape[0] % 128))
        blocks = padded.view(padded.shape[0] // 128, 128, -1, 128)
        return blocks.amin((1, 3)), blocks.amax((1, 3))
    groups = W.view(W.shape[0], -1, group)
    return groups.amin(2), groups.amax(2)


def fp8(W: Tensor, strategy: str, dtype: torch.dtype) -> dict[str, Tensor]:
    block = {"block_structure": [128, 128]} if strategy == "block" else {}
    args = QuantizationArgs(num_bits=8, type="float", strategy=strategy, symmetric=True, **block)
    W = W.to(dtype)  # scales have the dtype of the weights
    scale, _ = calculate_qparams(*extremes(W, strategy), args)
    data = quantize(W.float(), scale.float(), None, args, dtype=torch.float8_e4m3fn)
    return {"scale": scale, "data": data}


def grouped(W: Tensor, kind: str) -> dict[str, Tensor]:
    group, bits = (16, 4) if kind == "nvfp4" else (32, int(kind[-1]))
    strategy, scale_dtype = ("tensor_group", torch.float8_e4m3fn) if kind == "nvfp4" else ("group", torch.uint8)
    args = QuantizationArgs(num_bits=bits, type="float", strategy=strategy, symmetric=True, group_size=group, scale_dtype=scale_dtype)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    shared = generate_gparam(W.min(), W.max()) if kind == "nvfp4" else None
    scale, _ = calculate_qparams(*extremes(W, strategy, group), args, global_scale=shared)
    state = {"weight": W, "weight_scale": scale} | ({} if shared is None else {"weight_global_scale": shared})
    state = GROUPED[kind].compress(state, scheme)
    found = {name.removeprefix("weight_"): tensor for name, tensor in state.items()}
    if "weight" in found:
        found["data"] = found.pop("weight")
    return found | ({"decoded": GROUPED[kind].decompress(state, scheme)["weight"]} if kind == "nvfp4" else {})


def main(target: str, seed: str = "0") -> None:
    W = weights(int(seed))
    tensors = {"W": W}
    for scheme, dtype in FP8.items():
        tensors |= {f"{scheme}/{name}": part for name, part in fp8(W, scheme.split("-")[1], dtype).items()}
    for kind in GROUPED:
        tensors |= {f"{kind}/{name}": part for name, part in grouped(W, kind).items()}
    # safetensors wants no two names for one memory
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
