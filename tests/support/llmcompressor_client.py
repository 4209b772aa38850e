"""Folders of llm-compressor, and what its library decodes them to; run in the Python that has it.

    python llmcompressor_client.py MODEL ROOT PRESET …

Writes ROOT/PRESET, the model quantized by a preset of compressed-tensors (``KV-float-tensor`` and its like: in float32 with nothing but
scales for its key-value cache), and ROOT/PRESET.safetensors with the weights that the library
decompresses from it. Static inputs are measured on random tokens. Imports nothing of quantcli.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

CALIBRATED = ("FP8", "NVFP4")


def quantize(model_folder: str, target: Path, preset: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype="auto", device_map="cpu")
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    options = random_windows() if preset in CALIBRATED else {}
    modifier = QuantizationModifier(scheme=preset, targets=["Linear"], ignore=["lm_head"])
    oneshot(model=model, tokenizer=tokenizer, recipe=[modifier], **options)
    model.save_pretrained(target, save_compressed=True)
    tokenizer.save_pretrained(target)


def cache_scales(model_folder: str, target: Path, preset: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, device_map="cpu")
    kind, strategy = preset.split("-")[1:]
    how = {"num_bits": 8, "type": kind, "strategy": strategy, "dynamic": False, "symmetric": True, "observer": "static_minmax"}
    modifier = QuantizationModifier(kv_cache_scheme=how)
    oneshot(model=model, tokenizer=AutoTokenizer.from_pretrained(model_folder), recipe=[modifier], **random_windows())
    model.save_pretrained(target, save_compressed=True)


def random_windows() -> dict:
    rows = torch.randint(10, 500, (4, 64), generator=torch.Generator().manual_seed(0)).tolist()
    data = Dataset.from_list([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows])
    return {"dataset": data, "num_calibration_samples": 4, "max_seq_length": 64, "pipeline": "sequential"}


def decompressed(folder: Path) -> dict[str, torch.Tensor]:
    """weight → what the library makes of the module's tensors."""
    words = json.loads((folder / "config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig.model_validate(words).config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(str(getattr(scheme.format, "value", scheme.format)))
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for file in folder.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            module, _, local = name.rpartition(".")
            modules.setdefault(module, {})[local] = tensor
    coded = {module: files for module, files in modules.items() if "weight_scale" in files}
    return {f"{module}.weight": compressor.decompress(files, scheme)["weight"].contiguous() for module, files in coded.items()}


def main(model_folder: str, root: Path, presets: list[str]) -> None:
    for preset in presets:
        if preset.startswith("KV-"):
            cache_scales(model_folder, root / preset, preset)
            continue
        quantize(model_folder, root / preset, preset)
        save_file(decompressed(root / preset), root / f"{preset}.safetensors")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
