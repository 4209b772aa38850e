"""Makes ``ggml_blocks/``: inputs, and a file for each block type of what ggml's own quantizer and dequantizer make of them.

    python tests/data/make_golden.py PATH/TO/libggml-base.so [kind …]

Build llama.cpp for plain x86-64 (as its release does for ggml-base): with FMA contraction ggml's own bytes differ from machine to machine.
"""

from __future__ import annotations

import sys
from pathlib import Path

from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.block_inputs import GOLDEN, INPUTS, KINDS, gaussian, weightings
from support.ggml_peer import Ggml


def main(library: str, kinds: list[str]) -> None:
    ggml = Ggml(library)
    inputs = {f"{case}/W": W[:2, :512].contiguous() for case, W in INPUTS.items()}
    save_file(inputs, GOLDEN / "inputs.safetensors")
    for kind in kinds:
        blocks = {}
        for case in INPUTS:
            W = inputs[f"{case}/W"]
            for weights, suffix in weightings(kind, W.shape[1]):
                if (made := ggml.quantize_if_it_can(W, kind, weights)) is not None:
                    blocks[f"{case}/{kind}{suffix}"] = made
        blocks[f"decoded/{kind}"] = ggml.dequantize(gaussian(blocks, kind), kind, 512)
        save_file(blocks, GOLDEN / f"{kind}.safetensors")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:] or list(KINDS))
