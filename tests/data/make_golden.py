"""Makes ``ggml_blocks.safetensors``: inputs and what ggml's own quantizer and dequantizer make of them.

    python tests/data/make_golden.py PATH/TO/libggml-base.so

Build llama.cpp for plain x86-64 (as its release does for ggml-base): with FMA contraction ggml's own bytes differ from machine to machine.
"""

from __future__ import annotations

import sys
from pathlib import Path

from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from ggml_peer import Ggml
from test_ops_blocks import INPUTS, KINDS, importance


def main(library: str) -> None:
    ggml = Ggml(library)
    tensors = {}
    for name, W in INPUTS.items():
        W = W[:2, :512].contiguous()
        tensors[f"{name}/W"] = W
        for kind in KINDS:
            tensors[f"{name}/{kind}"] = ggml.quantize(W, kind)
            tensors[f"{name}/{kind}/weighted"] = ggml.quantize(W, kind, importance(W.shape[1]))
    gauss = tensors["gaussian/W"]
    for kind in KINDS:
        tensors[f"decoded/{kind}"] = ggml.dequantize(tensors[f"gaussian/{kind}"], kind, gauss.shape[1])
    save_file(tensors, Path(__file__).with_name("ggml_blocks.safetensors"))


if __name__ == "__main__":
    main(sys.argv[1])
