"""Models run whole by transformers, the judges of what is run layer by layer."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from torch import Tensor, nn


def inputs_of(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """What every linear of ``model`` reads for ``ids`` [n, T]: module → [n_tokens, in]."""
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _m, args, name=name: found.update({name: args[0].flatten(0, 1)}))
    with torch.no_grad():
        model(input_ids=ids)
    return found


def save_mixtral(folder: Path, *, fused: bool, dtype: torch.dtype = torch.float32) -> Path:
    """A random Mixtral of two layers and four experts, in one tensor (``fused``) or one by one."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.MixtralConfig(**sizes, vocab_size=512, num_local_experts=4, num_experts_per_tok=2)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder, save_original_format=not fused)
    return folder
