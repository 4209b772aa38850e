"""What of a config llama.cpp does not compute, having no key for it: told where it changes little, refused where it changes the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from quantcli.archs import Architecture
from quantcli.errors import UnsupportedError


def told(arch: Architecture, config: Mapping[str, Any]) -> tuple[str, ...]:
    """What a user should know of a file made of ``config``, as config.json has it. Raises :class:`UnsupportedError` where llama.cpp would
    run another model."""
    flat = {**config, **(config.get("text_config") or {})}
    found = (LOSSES[name](arch, flat) for name in arch.losses)
    return tuple(note for note in found if note is not None)


def window(arch: Architecture, config: Mapping[str, Any]) -> str | None:
    """Attention to a window alone: convert_hf_to_gguf writes no key of it, and llama.cpp's graph of the family attends to everything."""
    width, context = config.get("sliding_window", arch.defaults.get("sliding_window")), config.get("max_position_embeddings")
    if not isinstance(width, int) or (isinstance(context, int) and width >= context):
        return None
    return (
        f"the window of {width} tokens (sliding_window) has no key in GGUF's {arch.gguf_arch}: llama.cpp attends to the whole text, and "
        f"its results differ from transformers' on texts of more than {width} tokens"
    )


def window_on_request(arch: Architecture, config: Mapping[str, Any]) -> str | None:
    """The same of families whose window must be asked for."""
    return window(arch, config) if config.get("use_sliding_window") else None


def window_of_last_layers(arch: Architecture, config: Mapping[str, Any]) -> str | None:
    """The same of families where some layers alone have one."""
    kinds, first = config.get("layer_types"), config.get("max_window_layers", 28)
    has_window = "sliding_attention" in kinds if kinds is not None else first < config["num_hidden_layers"]
    return window_on_request(arch, config) if has_window else None


def unnormed_experts(arch: Architecture, config: Mapping[str, Any]) -> None:
    """Weights of the chosen experts that do not add up to one: llama.cpp makes them do so in this family, whatever a file says."""
    if not config.get("norm_topk_prob"):
        raise UnsupportedError(
            f"config.json: norm_topk_prob is {'false' if 'norm_topk_prob' in config else 'not set, which means false'}, and llama.cpp's "
            f"{arch.gguf_arch} makes the weights of a token's experts add up to one all the same: a file would be another model; choose "
            "another --format"
        )


def rotated_halves(arch: Architecture, config: Mapping[str, Any]) -> None:
    """Heads whose halves are rotated: llama.cpp rotates neighbours in this family, whatever a file says."""
    if not config.get("rope_interleave", True):
        raise UnsupportedError(
            f"config.json: rope_interleave is {config['rope_interleave']}, and llama.cpp's {arch.gguf_arch} rotates the neighbours of a "
            "head, not its halves: a file would be another model; choose another --format"
        )


LOSSES: dict[str, Callable[[Architecture, Mapping[str, Any]], str | None]] = {
    "window": window,
    "window on request": window_on_request,
    "window of the last layers": window_of_last_layers,
    "unnormed experts": unnormed_experts,
    "rotated halves": rotated_halves,
}
"""By the names in an architecture's literal."""
