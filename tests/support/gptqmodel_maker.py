"""A GPTQ or AWQ folder made by GPTQModel, run in the Python that has it.

    python gptqmodel_maker.py METHOD MODEL WINDOWS.safetensors OUT

METHOD is gptq or awq, 4 bits in groups of 64, asymmetric for awq. It calibrates on ``windows`` [n, T] of token ids, few, for a minute.
"""

from __future__ import annotations

import os
import sys

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its own default on a machine of two cores is one, and with one it does not start
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.quantization import METHOD
from safetensors.torch import load_file


def main(method: str, model_folder: str, windows_file: str, target: str) -> None:
    if method == "awq":
        how = QuantizeConfig(bits=4, group_size=64, sym=False, quant_method=METHOD.AWQ, format="gemm")
    else:
        how = QuantizeConfig(bits=4, group_size=64, sym=True, desc_act=True, act_group_aware=False, format="gptq")
    model = GPTQModel.load(model_folder, how, device="cpu", backend=BACKEND.AUTO)
    rows = load_file(windows_file)["windows"].tolist()
    model.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows], batch_size=1)
    model.save(target)


if __name__ == "__main__":
    main(*sys.argv[1:])
