"""What transformers' model of a config needs of the files, and where they differ from it: from shapes alone, no weight is read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.views import Joint
from quantcli.errors import CheckpointError, UnsupportedError
from quantcli.experts import expert_of
from quantcli.forward.names import NameMap, Source
from quantcli.forward.skeleton import build
from quantcli.tensors import TensorSpec

Shape = tuple[int, ...]

NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
"""The number of a layer, or of an expert, in a tensor's name."""


@dataclass(frozen=True, slots=True)
class Promise:
    """How the tensors of a checkpoint differ from those of its model.

    ``model``: the name of transformers' class; ``missing``: name on disk → shape of what is lacking; ``misshapen``: disk tensors → their
    shape, and the model's; ``surplus``: disk tensors that the model has no use for, but those it is known to leave alone;
    ``floats``: disk tensors that are floating-point numbers in the model; ``embedding``: the input embedding's weight on disk.
    """

    model: str
    missing: Mapping[str, Shape] = field(default_factory=dict)
    misshapen: Mapping[str, tuple[Shape, Shape]] = field(default_factory=dict)
    surplus: tuple[str, ...] = ()
    floats: frozenset[str] = frozenset()
    embedding: str | None = None


def promise(checkpoint: Checkpoint, joints: Mapping[str, Joint]) -> Promise:
    """What the config of ``checkpoint`` promises, held against its tensors. ``joints``: of experts stored one by one
    (:func:`quantcli.checkpoint.views.experts_apart`).

    Raises :class:`UnsupportedError` where transformers does not know the model, or lacks something to build it;
    :class:`CheckpointError` where it refuses the config.
    """
    model = _built(checkpoint)
    specs, where = checkpoint.specs, checkpoint.source
    names = NameMap(model, specs, where, joints, strict=False)
    expected = model.state_dict()
    is_whole = _is_whole(model, checkpoint.config)
    prefix = f"{model.base_model_prefix}."
    missing = [name for name in names.missing if is_whole or name.startswith(prefix)]
    parts: dict[str, Shape] = {}
    misshapen: dict[str, tuple[Shape, Shape]] = {}
    made = _Made(model, names, specs)
    for source in {id(source): source for source in names.of.values()}.values():
        if source.is_copy:
            continue
        if lacking := _lacking_experts(source, names, specs, expected):
            parts |= lacking
        elif (found := made.shapes(source)) is not None:
            misshapen |= _odd_expert(source, specs) or {source.disk[0] if source.disk else source.target: found}
    copies = ((disk, specs[disk].shape, tuple(expected[name].shape)) for name, disk in names.disk.items())
    misshapen |= {disk: (got, wanted) for disk, got, wanted in copies if got != wanted}
    embedding = _embedding(model)
    return Promise(
        type(model).__name__,
        {_on_disk(name, names): tuple(expected[name].shape) for name in missing} | parts,
        misshapen,
        tuple(name for name in names.unused if not _is_left_alone(name, model)),
        frozenset(disk for name, source in names.of.items() if expected[name].is_floating_point() for disk in source.disk),
        None if embedding is None else names.disk.get(embedding),
    )


def _built(checkpoint: Checkpoint) -> Any:
    """The model without weights, and without the time that their initial values would take."""
    config, where = checkpoint.config, checkpoint.source
    names = config.get("architectures")
    if config.get("auto_map") and isinstance(names, list) and not any(_is_known(str(name)) for name in names):
        raise UnsupportedError(f"{where}: {names} is defined by code that comes with the model, which is never run")
    try:
        with _no_initial_values():
            return build(_without_padding(config), torch.float32, where)
    except CheckpointError as error:
        if isinstance(error.__cause__, ImportError | NotImplementedError):  # a package is not installed: nothing is wrong with the model
            raise UnsupportedError(str(error)) from error
        raise


def _without_padding(config: dict[str, Any]) -> dict[str, Any]:
    """``config`` without a padding token: torch makes no embedding where that is beyond its rows, and no tensor depends on it."""
    text = config.get("text_config")
    nested = {"text_config": {**text, "pad_token_id": None}} if isinstance(text, dict) else {}
    return {**config, **nested, "pad_token_id": None}


def _no_initial_values() -> AbstractContextManager[None]:
    try:
        from transformers.initialization import no_init_weights
    except ImportError:  # an older transformers: some seconds are lost
        return nullcontext()
    context: AbstractContextManager[None] = no_init_weights()
    return context


def _is_known(class_name: str) -> bool:
    import transformers

    return class_name in dir(transformers)


def _is_whole(model: Any, config: Mapping[str, Any]) -> bool:
    """Whether ``model`` is of the class that ``config`` names, and not only of its family (a classifier, an embedding model)."""
    names = config.get("architectures")
    own = type(model).__name__
    if not isinstance(names, list) or own in names:
        return True
    return not any(_is_known(str(name)) and not str(name).endswith("ForCausalLM") for name in names)


def _embedding(model: Any) -> str | None:
    """The model's name of its input embedding's weight."""
    try:
        weight = model.get_input_embeddings().weight
    except (AttributeError, NotImplementedError):
        return None
    return next((name for name, p in model.named_parameters() if p is weight), None)


def _is_left_alone(name: str, model: Any) -> bool:
    """Whether transformers knows that files have ``name`` and models do not: other heads, prediction layers, old buffers."""
    patterns = model._keys_to_ignore_on_load_unexpected or ()
    return any(re.search(pattern, name) for pattern in patterns)


def _on_disk(name: str, names: NameMap) -> str:
    """What the model's tensor ``name``, which is not on disk, would be called there: as another layer's is."""
    alike = re.compile(r"\d+".join(re.escape(part) for part in NUMBER.split(name)))
    for other, disk in names.disk.items():
        if alike.fullmatch(other) and NUMBER.findall(other) == NUMBER.findall(disk):
            between, numbers = NUMBER.split(disk), NUMBER.findall(name)
            return "".join(part + number for part, number in zip(between, [*numbers, ""], strict=True))
    return name


def _lacking_experts(source: Source, names: NameMap, specs: Mapping[str, TensorSpec], expected: Mapping[str, Tensor]) -> dict[str, Shape]:
    """The tensors of experts that ``source`` needs and the disk does not have → their shapes."""
    experts = [expert_of(name) for name in source.disk]
    known = [expert for expert in experts if expert is not None]
    target = next(iter(names.targets(source)), None) if source.joint is None else source.target
    if not known or len(known) < len(experts) or target is None:
        return {}
    n = expected[target].shape[0] if expected[target].ndim == 3 else max(expert.number for expert in known) + 1
    if n > 4 * len(known) + 4096:
        return {}
    shapes = {expert.linear: specs[name].shape for expert, name in zip(known, source.disk, strict=True)}
    stack = known[0].stack
    wanted = (f"{stack}.{number}.{linear}" for number in range(n) for linear in shapes)
    return {name: shapes[expert.linear] for name in wanted if name not in specs and (expert := expert_of(name)) is not None}


def _odd_expert(source: Source, specs: Mapping[str, TensorSpec]) -> dict[str, tuple[Shape, Shape]]:
    """The first tensor of an expert of ``source`` that has another shape than those of most experts → its shape, and theirs."""
    names = source.disk if source.joint is None else source.joint.names
    kinds: dict[str, list[str]] = {}
    for name in names:
        if (expert := expert_of(name)) is not None:
            kinds.setdefault(expert.linear, []).append(name)
    for alike in kinds.values():
        usual, _ = Counter(specs[name].shape for name in alike).most_common(1)[0]
        if odd := next((name for name in alike if specs[name].shape != usual), None):
            return {odd: (specs[odd].shape, usual)}
    return {}


class _Made:
    """The shapes of what sources make that are no copies; equal ones are made once."""

    def __init__(self, model: Any, names: NameMap, specs: Mapping[str, TensorSpec]) -> None:
        self._model, self._names, self._specs = model, names, specs
        self._expected = model.state_dict()
        self._known: dict[tuple[object, ...], tuple[Shape, Shape] | None] = {}

    def shapes(self, source: Source) -> tuple[Shape, Shape] | None:
        """The shape that ``source`` gives a tensor of the model, and the model's, where they differ; else None."""
        targets = self._names.targets(source)
        disk = source.disk if source.joint is None else list(source.joint.names)
        key = (
            id(source.converter) if source.joint is None else source.joint.how,
            tuple(self._specs[name].shape for name in disk),
            tuple(tuple(self._expected[name].shape) for name in targets),
        )
        if key not in self._known:
            self._known[key] = next(self._differing(source, targets), None)
        return self._known[key]

    def _differing(self, source: Source, targets: list[str]) -> Iterator[tuple[Shape, Shape]]:
        first = self._specs[source.disk[0]].shape if source.disk else ()
        try:
            made = source.load(lambda name: torch.empty(self._specs[name].shape, device="meta"), self._model)
        except (CheckpointError, RuntimeError, IndexError):
            yield first, tuple(self._expected[source.target].shape)
            return
        for name in targets:
            got = made[name if name in made else source.target]
            if got.shape != self._expected[name].shape:
                yield tuple(got.shape), tuple(self._expected[name].shape)
