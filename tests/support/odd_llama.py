"""A Llama whose rows are no multiple of 256, with weights that are the same numbers on every machine.

    python tests/odd_llama.py FOLDER

writes it, for convert_hf_to_gguf (``--outtype bf16``, pre-tokenizer gpt-2), llama-quantize … Q4_K_M and Q5_K_M, and
``tests/data/make_manifest.py`` to make ``tests/data/odd-q4_k_m.json`` and ``odd-q5_k_m.json`` of.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from support.tiny_models import byte_level_bpe, llama_config, llama_groups, write_tokenizer

SIZES = {"hidden": 160, "intermediate": 352, "layers": 8, "heads": 4, "kv_heads": 2, "vocab": 512}


def exact_tensor(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Bell-shaped, of integers: normal numbers come from a vector library and differ between processors in the last bit."""
    total = torch.randint(-128, 129, (4, *shape), generator=generator).sum(0)
    return total / 4096 if len(shape) == 2 else 1 + total / 8192


def write(folder: Path) -> Path:
    config = llama_config(**SIZES, dtype="bfloat16", tied=False, bias=False)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 1}))
    write_tokenizer(folder, byte_level_bpe(512))
    generator = torch.Generator().manual_seed(0)
    shapes = {name: shape for group in llama_groups(config) for name, shape in group.items()}
    tensors = {name: exact_tensor(shape, generator).to(torch.bfloat16) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


if __name__ == "__main__":
    Path(sys.argv[1]).mkdir(parents=True)
    write(Path(sys.argv[1]))
