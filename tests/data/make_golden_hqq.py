"""Make hqq_golden.safetensors: small linears as hqq's own HQQLinear saves them, and the weights that it computes.

    PYTHON_WITH_HQQ tests/data/make_golden_hqq.py

``<case>/<key>``: the tensors of its state_dict and ``weight``; case ``<bits>-g<group>-axis<axis>[-dtype][-float]``. Out [32], in [48].
Also ``grid-…``: the scale and zero point of hqq's solver in float32 for a matrix ``grid-W``, which test_pass_hqq.py solves again.
"""

import os
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
from hqq.core.quantize import HQQLinear, Quantizer
from safetensors.torch import save_file

OUT, IN = 32, 48
DTYPES = {"": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}


def saved(nbits: float, group_size: int | None, axis: int, dtype: str = "", view_as_float: bool = False) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(int(nbits * 100) + axis)
    linear = torch.nn.Linear(IN, OUT, bias=False)
    linear.weight.data = torch.randn(OUT, IN, generator=g)
    weights = {
        "nbits": nbits,
        "channel_wise": True,
        "group_size": group_size,
        "optimize": True,
        "round_zero": nbits == 4,
        "axis": axis,
        "view_as_float": view_as_float,
    }
    config = {"weight_quant_params": weights, "scale_quant_params": None, "zero_quant_params": None, "offload_meta": False}
    layer = HQQLinear(linear, config, compute_dtype=DTYPES[dtype], device="cpu")
    case = "-".join([f"{nbits:g}", f"g{group_size}", f"axis{axis}", *([dtype] if dtype else []), *(["float"] if view_as_float else [])])
    state = {**layer.state_dict(), "weight": layer.dequantize().float()}
    return {f"{case}/{key}": torch.as_tensor(value).contiguous() for key, value in state.items()}


CASES = [
    *((nbits, 16, axis) for nbits in (8, 6, 5, 4, 3, 2, 1.58, 1) for axis in (0, 1)),
    (4, 64, 1),
    (3, 64, 0),
    (4, None, 1),
    (4, 16, 1, "bf16"),
    (2, 16, 0, "f32"),
    (3, 16, 1, "", True),
    (4, 16, 1, "bf16", True),
]
tensors = {name: tensor for case in CASES for name, tensor in saved(*case).items()}
W = torch.randn(16, 128, generator=torch.Generator().manual_seed(7)) ** 3 / 50
for bits in (2, 3, 4, 8):
    _, meta = Quantizer.quantize(W, nbits=bits, group_size=64, axis=1, device="cpu", compute_dtype=torch.float32)
    tensors |= {f"grid-{bits}/scale": meta["scale"].contiguous(), f"grid-{bits}/zero": meta["zero"].contiguous()}
tensors["grid-W"] = W
save_file(tensors, Path(__file__).parent / "hqq_golden.safetensors", metadata={"made_by": "make_golden_hqq.py, hqq 0.2.8.post1"})
