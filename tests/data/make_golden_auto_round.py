"""Make auto_round_golden.safetensors: small linears packed by auto-round's own classes, and the weights that their forward computes.

    PYTHON_WITH_AUTO_ROUND tests/data/make_golden_auto_round.py

``<packing>-<bits>/…``: packing ``zp`` (zero points less one), ``plain`` or ``awq``. In [64], out [32], groups of 32, asymmetric.
"""

import os
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
from auto_round.export.export_to_awq.utils import WQLinear_GEMM, dequantize_gemm
from auto_round_extension.torch import qlinear_torch, qlinear_torch_zp
from safetensors.torch import save_file

IN, OUT, GROUP = 64, 32, 32


def packed(kind: str, bits: int, seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (OUT, IN), generator=g)
    zero = torch.randint(1, 2**bits, (OUT, IN // GROUP), generator=g)
    scale = (torch.rand(OUT, IN // GROUP, generator=g) + 0.05).half().float()
    linear = torch.nn.Linear(IN, OUT, bias=False)
    linear.weight.data = (codes - zero.repeat_interleave(GROUP, 1)) * scale.repeat_interleave(GROUP, 1)
    if kind == "awq":
        layer = WQLinear_GEMM.from_linear(linear, bits, GROUP, scales=scale.T.contiguous(), zeros=zero.T.contiguous().float())
        weight = dequantize_gemm(layer.qweight, layer.qzeros, layer.scales.float(), bits, GROUP).T
    else:
        module = qlinear_torch_zp if kind == "zp" else qlinear_torch
        layer = module.QuantLinear(bits, GROUP, IN, OUT, bias=False, weight_dtype=torch.float32)
        layer.device = "cpu"
        layer.pack(linear, scale, zero.float(), None, device="cpu")
        layer.scales = layer.scales.float()
        weight = layer(torch.eye(IN)).T
    out = {"qweight": layer.qweight, "qzeros": layer.qzeros, "scales": layer.scales.half(), "weight": weight.float()}
    return {f"{kind}-{bits}/{name}": tensor.contiguous() for name, tensor in out.items()}


cases = [(kind, bits) for kind in ("zp", "plain") for bits in (2, 3, 4, 8)] + [("awq", 4)]
tensors = {name: tensor for i, (kind, bits) in enumerate(cases) for name, tensor in packed(kind, bits, i).items()}
save_file(
    tensors, Path(__file__).parent / "auto_round_golden.safetensors", metadata={"made_by": "make_golden_auto_round.py, auto-round 0.15.1"}
)
