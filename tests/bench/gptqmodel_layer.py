"""How long GPTQModel takes to quantize a model of one layer, run in the Python that has it: bench_layer.py's peer.

    python gptqmodel_layer.py MODEL WINDOWS.safetensors DEVICE METHOD

METHOD is gptq or awq, 4 bits in groups of 128 with zero points. The last line it prints is the seconds of its ``quantize``: calibration,
solving and packing, as in bench_layer's sum of stages.
"""

from __future__ import annotations

import os
import sys
import time

if sys.argv[3] == "cpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its own default on a machine of two cores is one, and with one it does not start
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.quantization import METHOD
from safetensors.torch import load_file


def main(model_folder: str, windows_file: str, device: str, method: str) -> None:
    if method == "awq":
        how = QuantizeConfig(bits=4, group_size=128, sym=False, quant_method=METHOD.AWQ, format="gemm")
    else:
        how = QuantizeConfig(bits=4, group_size=128, sym=False, desc_act=False, act_group_aware=True, format="gptq")
    model = GPTQModel.load(model_folder, how, device=device, backend=BACKEND.AUTO)
    rows = load_file(windows_file)["windows"].tolist()
    start = time.perf_counter()
    model.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows], batch_size=1 if device == "cpu" else 8)
    print(time.perf_counter() - start)  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])
