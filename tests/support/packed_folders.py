"""Folders of packed integers for the tests of their formats: random codes written by us, changed by a foreign hand, and packed by loops."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.formats import Request, open_checkpoint
from quantcli.tensors import QuantizedTensor, Scheme
from support.tiny_models import TinyLlama


def loop_pack(codes: list[int], bits: int) -> list[int]:
    """Codes one bit at a time into a long integer, then cut into signed 32-bit words."""
    run = sum(code << (bits * i) for i, code in enumerate(codes))
    words = [(run >> (32 * w)) & 0xFFFFFFFF for w in range(len(codes) * bits // 32)]
    return [w - 2**32 if w >= 2**31 else w for w in words]


def loop_unpack(words: list[int], bits: int) -> list[int]:
    run = sum((word & 0xFFFFFFFF) << (32 * w) for w, word in enumerate(words))
    return [(run >> (bits * i)) & (2**bits - 1) for i in range(32 * len(words) // bits)]


def random_codes(scheme: Scheme, out: int, n_in: int, seed: int = 0) -> QuantizedTensor:
    """A random tensor of ``scheme`` that uses every code, and every zero point when asymmetric."""
    g = torch.Generator().manual_seed(seed)
    bits, size = scheme.get("bits"), scheme.get("group_size")
    n_groups = 1 if size == -1 else n_in // size
    parts = {
        "codes": torch.randint(0, 2**bits, (out, n_in), generator=g, dtype=torch.uint8),
        "scale": (torch.rand(out, n_groups, generator=g) + 0.01).half(),
        "zero": torch.randint(0, 2**bits, (out, n_groups), generator=g, dtype=torch.uint8),
    }
    if scheme.get("sym"):
        parts["zero"] = torch.full((out, n_groups), 2 ** (bits - 1), dtype=torch.uint8)
    if scheme.get("desc_act"):
        parts["g_idx"] = (torch.randperm(n_in, generator=g) // (n_in // n_groups)).int()
    return QuantizedTensor(scheme, (out, n_in), parts)


def write(
    fmt: Any, source: Checkpoint, target: Path, tensors: Mapping[str, QuantizedTensor], metadata: Mapping = {}, **options: int
) -> Any:
    """``source`` with ``tensors`` in the place of its own as a folder of the format in module ``fmt``; returns the layout."""
    schemes = {name: tensor.scheme for name, tensor in tensors.items()}
    context = fmt.FORMAT.layout(source, schemes, Request(options=options))
    outputs = [out for spec in source.specs.values() for out in context.outputs(spec, schemes.get(spec.name))]
    with context.writer(target, outputs, metadata) as writer:
        for name in source.specs:
            for part, tensor in context.parts(name, tensors.get(name, source.read(name) if name not in tensors else None)).items():
                writer.put(part, tensor)
        writer.commit()
    return context


def linears(source: Checkpoint) -> dict[str, tuple[int, ...]]:
    return {name: spec.shape for name, spec in source.specs.items() if "_proj.weight" in name}


def quantized_folder(
    fmt: Any, tiny_llama: TinyLlama, target: Path, scheme: Scheme, **options: object
) -> tuple[Path, dict[str, QuantizedTensor]]:
    """A small model whose linears are random codes of ``scheme``, written to ``target``; (source folder, codes)."""
    folder = tiny_llama(**{"hidden": 64, "intermediate": 96, "layers": 1, "heads": 2, "kv_heads": 1, "vocab": 512, **options})
    with open_checkpoint(str(folder)) as source:
        tensors = {name: random_codes(scheme, *shape, seed=i) for i, (name, shape) in enumerate(linears(source).items())}
        write(fmt, source, target, tensors)
    return folder, tensors


def tiny_folder(fmt: Any, tiny_llama: TinyLlama, target: Path, scheme: Scheme) -> Path:
    """One linear quantized, one dense, and their config: small enough to be damaged five thousand times."""
    folder = tiny_llama(hidden=64, intermediate=64, layers=1, heads=2, kv_heads=2, vocab=64)
    kept = ("mlp.down_proj", "self_attn.o_proj", "model.norm")
    save_file({n: t for n, t in load_file(folder / "model.safetensors").items() if any(k in n for k in kept)}, folder / "model.safetensors")
    with open_checkpoint(str(folder)) as source:
        write(fmt, source, target, {"model.layers.0.mlp.down_proj.weight": random_codes(scheme, 64, 64)})
    for sidecar in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (target / sidecar).unlink()
    return target


def files_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def words_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def damage(folder: Path, words: Mapping | None = None, **tensors: torch.Tensor | None) -> None:
    """Change ``quantization_config`` and tensors of a written folder by a foreign hand; None removes."""
    file = load_file(folder / "model.safetensors") | {name: t for name, t in tensors.items() if t is not None}
    save_file({name: t for name, t in file.items() if tensors.get(name, t) is not None}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    merged = {**config["quantization_config"], **(words or {})}
    config["quantization_config"] = {key: value for key, value in merged.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "quantize_config.json").unlink(missing_ok=True)
