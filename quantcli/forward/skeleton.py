"""Builds the model from config.json without weights: parameters on the meta device, buffers computed."""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from quantcli.checkpoint.json_files import with_special_floats
from quantcli.errors import CheckpointError, UnsupportedError
from quantcli.forward.classes import has_class, named_class

BESIDES = ("output_router_logits", "output_hidden_states", "output_attentions")
"""Words of a config.json that ask a model for more than its result."""


def build(config: dict[str, Any], dtype: torch.dtype, where: str) -> Any:
    """The model that ``config``, the config.json of ``where``, describes: without weights, in evaluation mode.

    A causal LM, or the class that its ``architectures`` name: an encoder, a classifier, a model without a head.

    Raises :class:`UnsupportedError` when transformers does not know the architecture (a repository's own code is never run),
    :class:`CheckpointError` when it cannot make a model of the values.
    """
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if "gguf_architecture" in config:
        raise UnsupportedError(
            f"{where}: architecture '{config['gguf_architecture']}' cannot be run from its GGUF file here; give the Hugging Face folder"
        )
    model_type = str(config.get("model_type"))
    if model_type not in CONFIG_MAPPING:
        raise UnsupportedError(
            f"{where}: the installed transformers does not support model_type '{model_type}' of config.json, and code that comes with a "
            "model is never run; upgrade transformers, or convert the model to an architecture that it supports"
        )
    if not has_class(config):
        raise UnsupportedError(f"{where}: transformers has no class of models for model_type '{model_type}' alone")
    named = named_class(config)
    automatic: Any = transformers.AutoModelForCausalLM  # which transformers has no types for
    return build_as(automatic if named is None else getattr(transformers, named), config, dtype, where)


def build_as(cls: Any, config: dict[str, Any], dtype: torch.dtype, where: str) -> Any:
    """The same as a model of ``cls``: a class of transformers' models, or one of its automatic ones."""
    from transformers.models.auto.auto_factory import _BaseAutoModelClass
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = str(config.get("model_type"))
    # The weights arrive dense whatever their file: transformers must not look for a quantizer.
    # And what a model can return besides its result, layers that are run one by one do not gather.
    dense_config = {k: v for k, v in config.items() if k not in ("quantization_config", "auto_map", *BESIDES)}
    is_automatic = issubclass(cls, _BaseAutoModelClass)
    try:
        parsed = CONFIG_MAPPING[model_type].from_dict(with_special_floats(dense_config))
        with _parameters_on_meta():
            # Experts one after the other: the inputs of each can be observed, and tokens are not copied for all of them at once.
            options: dict[str, Any] = {"dtype": dtype, "experts_implementation": "eager"}
            if is_automatic:
                return cls.from_config(parsed, trust_remote_code=False, **options).eval()
            return cls._from_config(_own(parsed, cls), **options).eval()
    except Exception as error:  # any error that a foreign file's values cause in configuration and modelling code
        raise CheckpointError(f"{where}: transformers cannot build a {model_type} model from config.json: {error}") from error


def _own(parsed: Any, cls: Any) -> Any:
    """``parsed``, or the configuration of the text model in it where ``cls`` is one of text alone."""
    return parsed if cls.config_class is None or isinstance(parsed, cls.config_class) else parsed.get_text_config()


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """New parameters go to the meta device before they are initialized; buffers (rotary tables) keep their values."""
    register = nn.Module.register_parameter

    def register_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(param.detach().to("meta"), requires_grad=False)
        register(module, name, param)

    nn.Module.register_parameter = register_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def decoder_layers(model: Any, embedding: str) -> tuple[str, nn.ModuleList]:
    """Name and modules of the decoder or encoder stack: the outermost ModuleList as long as the config's number of layers.

    ``embedding``: the input embedding's name; of two such lists (one may be of a vision tower) its nearest relative is meant.
    """
    n_layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    stacks = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers]
    if not stacks:
        raise UnsupportedError(f"{type(model).__name__} has no list of {n_layers} layers; it cannot be run layer by layer")

    def n_shared(name: str) -> int:
        return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(name.split("."), embedding.split("."), strict=False))))

    return min(stacks, key=lambda item: (item[0].count("."), -n_shared(item[0])))


def dtypes(model: Any, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The dtype in which transformers would load each tensor: ``dtype``, but float32 for those that a model keeps in it."""
    plan = [(re.compile(pattern.replace("*", ".*")), kept) for pattern, kept in model._get_dtype_plan(dtype).items()]

    def loaded_as(name: str, tensor: Tensor) -> torch.dtype:
        return next((kept for pattern, kept in plan if pattern.search(name)), tensor.dtype)

    return {name: loaded_as(name, tensor) for name, tensor in model.state_dict().items()}


def put(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace parameter or buffer ``name`` of ``model`` by ``tensor``, which must have its shape."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    old = module._parameters.get(leaf, module._buffers.get(leaf))
    if old is not None and old.shape != tensor.shape:
        raise CheckpointError(f"{name}: the architecture expects shape {list(old.shape)}, the checkpoint gives {list(tensor.shape)}")
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[leaf] = tensor


def drop(model: nn.Module, name: str, device: torch.device) -> None:
    """Free the values of parameter ``name``; its shape and dtype stay, on ``device``, without memory (one zero, expanded)."""
    path, _, leaf = name.rpartition(".")
    parameters = model.get_submodule(path)._parameters
    if (param := parameters.get(leaf)) is not None:
        parameters[leaf] = nn.Parameter(torch.zeros((), dtype=param.dtype, device=device).expand(param.shape), requires_grad=False)


def zero_pages(like: Tensor) -> Tensor:
    """Zeros on the CPU that take no memory while they are only read: untouched pages of the system, which torch.zeros would write."""
    pages = mmap.mmap(-1, max(1, like.numel()) * like.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=like.dtype)[: like.numel()].view(like.shape)
