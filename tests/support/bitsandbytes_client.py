"""What transformers, bitsandbytes and peft make of folders, run in the Python that has them.

    python bitsandbytes_client.py WINDOWS.safetensors ANSWERS.json TASK=FOLDER …

TASK is ``perplexity`` (load, measure), ``qlora`` (load, train a LoRA on the windows for some steps) or ``nf4``, ``nf4-dq``, ``fp4``,
``int8`` (quantize the dense FOLDER as transformers does and save it as FOLDER-TASK). Writes a list of answers, {"error"} among them; stdout
belongs to the libraries. Imports nothing of quantcli.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections import Counter
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # it compiles its fallbacks otherwise, for half a minute

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

N_STEPS = 8


@torch.no_grad()
def perplexity(model: torch.nn.Module, windows: torch.Tensor) -> float:
    """exp of the mean loss of tokens 1 … T−1 of ``windows`` [n, T]."""
    losses = []
    for window in windows:
        logits = model(input_ids=window[None]).logits[0, :-1].double()
        losses.append(torch.nn.functional.cross_entropy(logits, window[1:], reduction="none"))
    return math.exp(torch.cat(losses).mean())


def load(folder: Path) -> torch.nn.Module:
    """The model on the CPU, in the folder's own dtype: what transformers makes of any other wish."""
    return AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")


def to_float32(model: torch.nn.Module) -> None:
    """Dense weights and activations in float32, and 4-bit linears that decode to it; ``model.float()`` is refused."""
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype = module.weight.quant_state.dtype = torch.float32
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()


def measure(folder: Path, windows: torch.Tensor) -> dict:
    """``perplexity`` in float32; ``as_loaded`` in the folder's own dtype (bfloat16)."""
    model = load(folder).eval()
    kinds = Counter(type(module).__name__ for module in model.modules() if isinstance(module, (Linear4bit, Linear8bitLt)))
    as_loaded = perplexity(model, windows)
    to_float32(model)
    return {"perplexity": perplexity(model, windows), "as_loaded": as_loaded, "linears": kinds}


def train(folder: Path, windows: torch.Tensor) -> dict:
    """QLoRA: frozen 4-bit weights, a LoRA of rank 8 on every linear, the loss before each step."""
    torch.manual_seed(0)
    model = prepare_model_for_kbit_training(load(folder), use_gradient_checkpointing=False)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-3)
    losses = []
    for _ in range(N_STEPS):
        loss = model(input_ids=windows, labels=windows).loss
        losses.append(float(loss))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {"losses": losses, "n_trained": len(trained)}


def save(task: str, folder: Path) -> dict:
    kind, _, nested = task.partition("-")
    words: dict = {"load_in_8bit": True}
    if kind != "int8":
        words = {"load_in_4bit": True, "bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": bool(nested)}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map="cpu", quantization_config=BitsAndBytesConfig(**words))
    target = folder.with_name(f"{folder.name}-{task}")
    model.save_pretrained(target)
    return {"folder": str(target)}


def main(windows_file: str, answers_file: str, words: list[str]) -> None:
    windows = load_file(windows_file)["windows"]
    torch.set_num_threads(1)  # its double quantization depends on it
    answers: list[dict] = []
    for word in words:
        task, _, name = word.partition("=")
        folder = Path(name)
        try:
            answers.append(
                {"perplexity": measure, "qlora": train}[task](folder, windows) if task in ("perplexity", "qlora") else save(task, folder)
            )
        except Exception as error:  # the test wants to see what the client says of every folder
            answers.append({"error": f"{type(error).__name__}: {error}"})
    Path(answers_file).write_text(json.dumps(answers))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
