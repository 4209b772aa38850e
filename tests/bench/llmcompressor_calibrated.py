"""llm-compressor's calibrated methods on given windows; run in the Python that has it.

    python llmcompressor_calibrated.py MODEL TARGET WINDOWS METHOD DTYPE

Writes TARGET, the model of folder MODEL quantized by METHOD (``gptq``, ``awq``: int4 in groups of 128 with zero points; ``smoothquant``:
W8A8) on the token ids ``windows`` [n, seq_len] in the safetensors file WINDOWS. Prints, as JSON, the seconds from the loaded model to the
written folder. Imports nothing of quantcli.
"""

from __future__ import annotations

import json
import os
import sys
import time

os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

# 0.14 pins what it caches for AWQ's search, which raises without an accelerator.
IntermediatesCache._pin_intermediate = classmethod(lambda cls, intermediate: None)

LINEARS = {"targets": ["Linear"], "ignore": ["lm_head"]}

METHODS = {
    "gptq": lambda: [GPTQModifier(scheme="W4A16_ASYM", dampening_frac=0.01, actorder="static", **LINEARS)],
    "awq": lambda: [AWQModifier(), QuantizationModifier(scheme="W4A16_ASYM", **LINEARS)],
    "smoothquant": lambda: [SmoothQuantModifier(smoothing_strength=0.8), QuantizationModifier(scheme="W8A8", **LINEARS)],
}


def main(model_folder: str, target: str, windows: str, method: str, dtype: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=getattr(torch, dtype), device_map="cpu")
    rows = load_file(windows)["windows"].tolist()
    data = Dataset.from_list([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows])
    options = {"num_calibration_samples": len(rows), "max_seq_length": len(rows[0]), "shuffle_calibration_samples": False}
    started = time.perf_counter()
    oneshot(model=model, tokenizer=tokenizer, recipe=METHODS[method](), dataset=data, pipeline="sequential", **options)
    model.save_pretrained(target, save_compressed=True)
    tokenizer.save_pretrained(target)
    print(json.dumps({"seconds": time.perf_counter() - started}))  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])
