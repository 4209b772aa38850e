"""Perplexities by transformers or gptqmodel, run in the Python that has them.

    python gptq_client.py WINDOWS.safetensors ANSWERS.json LOADER=FOLDER …

LOADER is transformers or gptqmodel. Writes a list with {"perplexity", "kernels": {linear class: how many}} or {"error"} for each folder;
stdout belongs to the libraries, which print. Imports nothing of quantcli.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections import Counter
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its own default on a machine of two cores is one, and with one it does not start
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # it compiles its torch kernel otherwise, for half a minute

import torch
from gptqmodel import BACKEND, GPTQModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AwqConfig, GPTQConfig


@torch.no_grad()
def perplexity(model: torch.nn.Module, windows: torch.Tensor) -> float:
    """exp of the mean loss of tokens 1 … T−1 of ``windows`` [n, T]."""
    losses = []
    for window in windows:
        logits = model(input_ids=window[None]).logits[0, :-1].double()
        losses.append(torch.nn.functional.cross_entropy(logits, window[1:], reduction="none"))
    return math.exp(torch.cat(losses).mean())


def load(loader: str, folder: Path) -> torch.nn.Module:
    """The model on the CPU by the kernel that runs on every one, in float32; gptqmodel's own loader insists on 16 bits."""
    if loader == "gptqmodel":
        method = json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"]
        backend = BACKEND.AWQ_TORCH if method == "awq" else BACKEND.GPTQ_TORCH
        return GPTQModel.load(str(folder), device="cpu", backend=backend).model
    words = json.loads((folder / "config.json").read_text())["quantization_config"]
    is_awq = words["quant_method"] == "awq"
    # Everything else is taken from the folder's own config.
    kernel = AwqConfig(backend="torch_awq") if is_awq else GPTQConfig(bits=words["bits"], backend="gptq_torch")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu", quantization_config=kernel)


def measure(loader: str, folder: Path, windows: torch.Tensor) -> dict:
    model = load(loader, folder).eval()
    kernels = Counter(type(module).__name__ for module in model.modules() if hasattr(module, "qweight"))
    return {"perplexity": perplexity(model, windows), "kernels": kernels}


def main(windows_file: str, answers_file: str, words: list[str]) -> None:
    windows = load_file(windows_file)["windows"]
    answers: list[dict] = []
    for word in words:
        loader, _, folder = word.partition("=")
        try:
            answers.append(measure(loader, Path(folder), windows))
        except Exception as error:  # the test wants to see what the client says of every folder
            answers.append({"error": f"{type(error).__name__}: {error}"})
    Path(answers_file).write_text(json.dumps(answers))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
