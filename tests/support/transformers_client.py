"""Perplexities by transformers, run in a Python that has it and the library of the folders' dialect.

    python transformers_client.py WINDOWS.safetensors ANSWERS.json [HOW=]FOLDER …

HOW is ``float32`` (the default), ``bfloat16``, ``dequantize``: float32 with the weights of compressed-tensors made dense as they load,
``fp8``: FP8 weights made dense, which transformers does without a GPU, and the rest turned to float32 after it, or ``widened``: float32
after compressed-tensors has decoded the weights.
Writes a list with {"perplexity", "quantized": modules that the library took for quantized, "weights": {weight: checksum} of these as
the forward pass used them} or {"error"} for each folder; stdout belongs to the libraries, which print. Imports nothing of quantcli.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


@torch.no_grad()
def perplexity(model: torch.nn.Module, windows: torch.Tensor) -> float:
    """exp of the mean loss of tokens 1 … T−1 of ``windows`` [n, T]."""
    losses = []
    for window in windows:
        logits = model(input_ids=window[None]).logits[0, :-1].double()
        losses.append(torch.nn.functional.cross_entropy(logits, window[1:], reduction="none"))
    return math.exp(torch.cat(losses).mean())


def load(how: str, folder: Path) -> torch.nn.Module:
    options = {}
    if how == "dequantize":
        from transformers import CompressedTensorsConfig

        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    dtype = torch.bfloat16 if how == "bfloat16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map="cpu", **options)
    if how == "widened":
        return widened(model)
    return model.float() if how == "fp8" else model  # its FP8 loader leaves what is dense in the file's dtype


@torch.no_grad()
def widened(model: torch.nn.Module) -> torch.nn.Module:
    """compressed-tensors decodes as the model first runs, and small floats in bfloat16 whatever the model's dtype; torch then stumbles."""
    with contextlib.suppress(RuntimeError):
        model(input_ids=torch.zeros(1, 1, dtype=torch.int64))
    return torch.nn.Module.float(model)  # a quantized model's own float() refuses


def measure(how: str, folder: Path, windows: torch.Tensor) -> dict:
    model = load(how, folder).eval()
    quantized = sum(getattr(module, "quantization_scheme", None) is not None for module in model.modules())
    found = perplexity(model, windows)
    sums = {name: float(p.double().abs().sum()) for name, p in model.named_parameters() if name.endswith("_proj.weight")}
    return {"perplexity": found, "quantized": quantized, "weights": sums}


def main(windows_file: str, answers_file: str, words: list[str]) -> None:
    windows = load_file(windows_file)["windows"]
    answers: list[dict] = []
    for word in words:
        how, _, folder = word.rpartition("=")
        try:
            answers.append(measure(how, Path(folder), windows))
        except Exception as error:  # the test wants to see what the library says of every folder
            answers.append({"error": f"{type(error).__name__}: {error}"})
    Path(answers_file).write_text(json.dumps(answers))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
