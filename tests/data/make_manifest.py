"""Write down what a GGUF file holds: tensor name → type, shape, sha256 of its data.

    python tests/data/make_manifest.py FILE.gguf > tests/data/pico-q4_k_m.json

The file is llama.cpp's own, so that the tests need no llama.cpp:
convert_hf_to_gguf tests/data/pico --outtype bf16 (pre-tokenizer gpt-2), then llama-quantize … Q4_K_M.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

from gguf import GGUFReader


def manifest(path: Path) -> dict[str, list]:
    """By the gguf package's reader, which is not ours."""
    found = {}
    for tensor in GGUFReader(path).tensors:
        shape = [int(n) for n in reversed(tensor.shape)]
        found[tensor.name] = [tensor.tensor_type.name, shape, hashlib.sha256(tensor.data.tobytes()).hexdigest()]
    return found


if __name__ == "__main__":
    sys.stdout.write(json.dumps(manifest(Path(sys.argv[1])), indent=1) + "\n")
