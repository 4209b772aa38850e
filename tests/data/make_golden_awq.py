"""Make awq_golden.safetensors: random codes and zero points, and the words that gptqmodel's packer (AutoAWQ's code) makes of them.

    PYTHON_WITH_GPTQMODEL tests/data/make_golden_awq.py

Run in a Python with gptqmodel (tests/PEERS.md).
"""

import os
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import torch
from gptqmodel.quantization.awq.utils.packing_utils import pack_awq
from safetensors.torch import save_file

g = torch.Generator().manual_seed(0)
codes = torch.randint(0, 16, (24, 64), generator=g, dtype=torch.uint8)  # [out, in]
zero = torch.randint(0, 16, (24, 2), generator=g, dtype=torch.uint8)  # [out, n_groups]
scale = (torch.rand(24, 2, generator=g) + 0.01).half()
qweight, qzeros = pack_awq(codes.T.int().contiguous(), zero.T.int().contiguous(), 4)
tensors = {"codes": codes, "zero": zero, "scale": scale, "qweight": qweight, "qzeros": qzeros, "scales": scale.T.contiguous()}
save_file(tensors, Path(__file__).parent / "awq_golden.safetensors", metadata={"made_by": "make_golden_awq.py, gptqmodel 7.7.0"})
