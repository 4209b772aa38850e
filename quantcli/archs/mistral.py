"""Mistral 7B, NeMo, Small: Llama's layers; engines take them for Llama."""

from dataclasses import replace

from quantcli.archs import llama

ARCH = replace(
    llama.ARCH,
    model_types=("mistral",),
    hf_class="MistralForCausalLM",
    defaults={"sliding_window": 4096},
    losses=("window",),
    present={},
)
