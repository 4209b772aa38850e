"""Makes ``bitsandbytes.safetensors``: matrices of every sort, and what bitsandbytes makes of them on the CPU.

    PYTHON_WITH_BITSANDBYTES tests/data/make_bitsandbytes.py [TARGET]

Names: ``<input>/W``; ``<input>/<nf4|fp4>-b<block>[-dq]/<part>`` with the tensors of its QuantState as a folder would hold them;
``<input>/llm_int8/<weight|SCB>``; ``…/decoded`` in float32. bitsandbytes sums on one thread here (see quantcli/qtypes/shared/float4.py).
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from bitsandbytes import functional as bnb
from safetensors.torch import save_file
from torch import Tensor

BLOCKS = (32, 64, 4096)


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def gauss(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    with_zeros = gauss(8, 128)
    with_zeros[2], with_zeros[3, :64], with_zeros[5] = 0, 0, 1e-40
    return {
        "gaussian": (0.03 * gauss(24, 100)).bfloat16(),
        "heavy": gauss(16, 96) ** 5,
        "constant": torch.full((9, 64), -0.0371).half(),
        "zero": torch.zeros(5, 34),
        "with-zeros": with_zeros,
        "odd": gauss(7, 31),
        "single": gauss(1, 1),
        "many-blocks": (0.02 * gauss(300, 64) * torch.linspace(0.2, 2, 300)[:, None]).bfloat16(),
    }


def four_bits(W: Tensor, name: str, out: dict[str, Tensor]) -> None:
    """Every type and block size of ``W``, with double quantization and without."""
    for kind in ("nf4", "fp4"):
        for block in BLOCKS:
            for nested in (False, True):
                if name == "many-blocks" and (block, nested) != (64, True):
                    continue  # it is there for the second block of scales
                packed, state = bnb.quantize_4bit(W, blocksize=block, compress_statistics=nested, quant_type=kind)
                where = f"{name}/{kind}-b{block}{'-dq' if nested else ''}"
                out[f"{where}/weight"] = packed
                out |= {f"{where}/{part}": tensor.contiguous() for part, tensor in state.as_dict(packed=True).items() if "map" not in part}
                if W.shape[1] % 2 == 0 and W.numel() < 2000:  # odd rows take another path, whose result has another shape
                    state.dtype = torch.float32
                    out[f"{where}/decoded"] = bnb.dequantize_4bit(packed, state)


def main(target: Path) -> None:
    torch.set_num_threads(1)
    out: dict[str, Tensor] = {f"map/{kind}": bnb.get_4bit_type(kind, "cpu") for kind in ("nf4", "fp4")}
    out["map/dynamic"] = bnb.create_dynamic_map()
    for name, W in inputs().items():
        out[f"{name}/W"] = W
        four_bits(W, name, out)
        codes, scb, _ = bnb.int8_vectorwise_quant(W.half())
        out |= {f"{name}/llm_int8/weight": codes, f"{name}/llm_int8/SCB": scb}
        if W.numel() < 2000:
            out[f"{name}/llm_int8/decoded"] = bnb.int8_vectorwise_dequant(codes, scb)
    save_file({k: v.contiguous() for k, v in out.items()}, target)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("bitsandbytes.safetensors"))
