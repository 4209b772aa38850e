"""Which of transformers' classes a config.json describes: a causal LM, or the same layers under another head or none."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

CAUSAL = "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"
SEEING = ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES")
"""Of models that also see or hear. Their text is run by the causal LM, where transformers has one."""


Names = Mapping[str, Collection[str]]
"""A mapping of transformers' auto classes → the classes that it has for one model_type."""


def named_class(config: Mapping[str, Any]) -> str | None:
    """The class that ``config`` names, where it is one of transformers' for its model_type and no causal LM; else None.

    None is the causal LM: of a config that names it, or a class of foreign code, or none at all. But an encoder's config that names
    none is the bare encoder, and so is that of a model_type without a causal LM.
    """
    of = _classes(str(config.get("model_type")))
    causal = of.get(CAUSAL, ())
    named = next(iter(config.get("architectures") or ()), None)
    if named in causal or (causal and any(named in of.get(mapping, ()) for mapping in SEEING)):
        return None
    if named is not None and any(named in names for names in of.values()):
        return str(named)
    is_encoder = "MODEL_FOR_MASKED_LM_MAPPING_NAMES" in of and not config.get("is_decoder")
    if causal and not is_encoder:
        return None
    return next(iter(of.get("MODEL_MAPPING_NAMES", ())), None)


def has_class(config: Mapping[str, Any]) -> bool:
    """Whether transformers has any class for ``config``."""
    return named_class(config) is not None or CAUSAL in _classes(str(config.get("model_type")))


def sees(config: Mapping[str, Any]) -> bool:
    """Whether ``config`` names a model that writes text and sees or hears besides."""
    of, named = _classes(str(config.get("model_type"))), next(iter(config.get("architectures") or ()), None)
    return any(named in of.get(mapping, ()) for mapping in SEEING)


def is_causal(model_type: str, name: str) -> bool:
    """Whether the class ``name`` of ``model_type`` predicts the next token."""
    of = _classes(model_type)
    return any(name in of.get(mapping, ()) for mapping in (CAUSAL, *SEEING))


def _classes(model_type: str) -> Names:
    from transformers.models.auto import modeling_auto

    tables = {name: table for name, table in vars(modeling_auto).items() if name.startswith("MODEL_") and name.endswith("_MAPPING_NAMES")}
    found = {name: table[model_type] for name, table in tables.items() if model_type in table}
    return {name: (value,) if isinstance(value, str) else tuple(value) for name, value in found.items()}
