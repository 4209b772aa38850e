"""Names beside a model's own that tell how it was saved: adapters that were not merged, codes of bitsandbytes and of MLX, FP8 scales."""

from __future__ import annotations

import re
from collections.abc import Mapping

from quantcli.checkpoint.checkpoint import Checkpoint, adapter_of

ADAPTER = re.compile(r"\.base_layer\.|\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)\b|\.modules_to_save\.")
WRAPPED = re.compile(r"^base_model\.model\.")
"""In the names of adapters, and of a model that peft's wrapper was saved with."""

TOLD: Mapping[str, str] = {
    r"\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__\w+)$": (
        "the weights are 4-bit codes of bitsandbytes, merged or saved without the quantization_config that config.json needs for them; "
        "save the model dequantized (model.dequantize(), or merge the adapter into the 16-bit model)"
    ),
    r"\.(SCB|weight_format)$": (
        "the weights are 8-bit codes of bitsandbytes, merged or saved without the quantization_config that config.json needs for them; "
        "save the model dequantized (model.dequantize(), or merge the adapter into the 16-bit model)"
    ),
    r"\.scales$": "the weights are codes of MLX's quantization; fuse or convert the model with --de-quantize (mlx_lm.fuse, mlx_lm.convert)",
    r"\.weight_scale(_inv)?$": (
        "the weights are codes with scales, and config.json has lost the quantization_config that says of which kind; take it from the "
        "model's own repository, or save the model dequantized"
    ),
    r"\.(qweight|qzeros)$": (
        "the weights are packed integers, and config.json has lost the quantization_config that says of which kind (GPTQ, AWQ); take it "
        "from the model's own repository"
    ),
}
"""Names that stand beside codes → what these are, and what to do."""


def told_by(checkpoint: Checkpoint, names: list[str]) -> str | None:
    """What ``names``, tensors of ``checkpoint`` that its model has no use for, tell of how it was saved; None where nothing."""
    adapters = [name for pattern in (ADAPTER, WRAPPED) for name in names if pattern.search(name)]
    if adapters:
        adapter = adapters[0]
        base = adapter_of(checkpoint.path)
        of = f" for {base}" if base else ""
        return (
            f"{adapter}: an adapter (LoRA){of} that is not merged into the model; merge it first: peft's "
            "model.merge_and_unload(), then save_pretrained"
        )
    has_biases = any(name.endswith(".biases") for name in names)
    for pattern, told in TOLD.items():
        found = next((name for name in names if re.search(pattern, name)), None)
        if found is not None and (pattern != r"\.scales$" or has_biases):
            return f"{found}: {told}"
    return None
