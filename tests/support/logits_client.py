"""Logits of folders by transformers, run in a Python that has it and the library of the dialect.

    python logits_client.py INPUTS.safetensors ANSWERS.json [CLASS=]FOLDER …

CLASS is the one that config.json names where none is given. The tensors of INPUTS are the arguments of the model's forward, images among
them. Writes a list with {"logits": of the last position, "missing": tensors that the model expected and the folder lacked, "unexpected":
the other way round} or {"error"} for each folder; stdout belongs to the libraries, which print. Imports nothing of quantcli.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import torch
import transformers
from safetensors.torch import load_file


def load(name: str, folder: Path) -> tuple[torch.nn.Module, dict]:
    """The model on the CPU, computing in float32 as far as its library allows, and what of the folder did not fit it."""
    config = json.loads((folder / "config.json").read_text())
    quantization = config.get("quantization_config", {})
    method, options = quantization.get("quant_method"), {}
    if method == "awq":
        options = {"quantization_config": transformers.AwqConfig(backend="torch_awq")}
    elif method == "gptq":
        options = {"quantization_config": transformers.GPTQConfig(bits=quantization["bits"], backend="gptq_torch")}
    cls = getattr(transformers, name or config["architectures"][0])
    model, info = cls.from_pretrained(folder, dtype=torch.float32, device_map="cpu", output_loading_info=True, **options)
    if method in ("bitsandbytes", "fp8"):
        widen(model)
    return model.eval(), info


def widen(model: torch.nn.Module) -> None:
    """Dense weights and activations in float32, and 4-bit linears that decode to it; ``model.float()`` is refused."""
    for module in model.modules():
        if type(module).__name__ == "Linear4bit" and getattr(module.weight, "quant_state", None) is not None:
            module.compute_dtype = module.weight.quant_state.dtype = torch.float32
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()


@torch.no_grad()
def answer(word: str, inputs: dict[str, torch.Tensor]) -> dict:
    name, _, folder = word.rpartition("=")
    model, info = load(name, Path(folder))
    logits = model(**inputs, use_cache=False).logits.float()
    return {"logits": logits[0, -1].tolist(), **{key: sorted(map(str, info[f"{key}_keys"])) for key in ("missing", "unexpected")}}


def main(inputs_file: str, answers_file: str, words: list[str]) -> None:
    inputs = load_file(inputs_file)
    answers: list[dict] = []
    for word in words:
        try:
            answers.append(answer(word, inputs))
        except Exception as error:  # the test wants to see what the library says of every folder
            answers.append({"error": f"{type(error).__name__}: {error}"})
    Path(answers_file).write_text(json.dumps(answers))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
