"""Maps names on disk to names of the model's tensors, by transformers' own conversion tables.

transformers renames tensors on load (GPT-NeoX: ``embed_out`` is ``lm_head``), adds or strips the base model's prefix, and fuses or splits
some (Mixtral: a layer's experts become one tensor). Here a :class:`Source` is one such step: the disk tensors it needs, and what it makes.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

from torch import Tensor

from quantcli.checkpoint.views import Joint
from quantcli.errors import CheckpointError
from quantcli.tensors import TensorSpec


@dataclass(frozen=True, slots=True)
class Source:
    """How a tensor of the model is made from disk tensors: a copy of one, or ``converter`` applied to several, or a ``joint`` of them.

    ``target``: the model's name (the first one when the converter makes several); ``disk``: names on disk, in the order the converter
    expects them; ``patterns``: the converter's pattern that each of them matched; ``joint``: for experts stored one by one on disk, for
    which transformers has no conversion.
    """

    target: str
    disk: list[str] = field(default_factory=list)
    patterns: list[str] = field(default_factory=list)
    converter: Any = None
    joint: Joint | None = None

    @property
    def is_copy(self) -> bool:
        return self.converter is None and self.joint is None

    def load(self, read: Callable[[str], Tensor], model: Any) -> dict[str, Tensor]:
        """The model's tensors by name; ``read`` gives a disk tensor. Raises :class:`CheckpointError` when the parts do not fit."""
        if self.joint is not None:
            return {self.target: self.joint.made(read)}
        if self.converter is None:
            return {self.target: read(self.disk[0])}
        converter = copy.deepcopy(self.converter)
        for name, pattern in zip(self.disk, self.patterns, strict=True):
            converter.add_tensor(self.target, name, pattern, read(name))
        try:
            made = converter.convert(self.target, model=model, config=model.config)
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(f"{self.target}: cannot be put together from {_listed(self.disk)}: {error}") from error
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


class NameMap:
    """Which disk tensors make which of the model's tensors.

    ``of``: model name → its source; ``disk``: model name → disk name where one is a plain copy of the other; ``unused``: disk tensors
    that the model does not use (rotary tables of old files, prediction heads); ``has_head``: whether there are weights beyond the base
    model, where the model has such. A folder of the base model alone has none, whatever class its config names. ``absent``: poolers that
    the checkpoint lacks; they come after the layers, and nothing here reads what they make. ``missing``: the model's other tensors that
    nothing on disk makes. Raises :class:`CheckpointError` for these and for shapes that differ, unless told not to be ``strict``.
    """

    of: dict[str, Source]
    disk: dict[str, str]
    unused: tuple[str, ...]
    has_head: bool
    absent: tuple[str, ...]
    missing: tuple[str, ...]

    def __init__(
        self, model: Any, specs: Mapping[str, TensorSpec], where: str, joints: Mapping[str, Joint], *, strict: bool = True
    ) -> None:
        self._expected = model.state_dict()
        self._model = model
        self._where = where
        sources, self.unused = self._sort(specs, joints)
        self.of = {name: source for source in sources for name in self.targets(source)}
        self._alias_tied()
        self.disk = {name: source.disk[0] for name, source in self.of.items() if source.is_copy}
        self.has_head = not self._is_base_alone(specs)
        lacking = self._lacking()
        self.absent = tuple(name for name in lacking if "pooler" in name.split("."))
        self.missing = tuple(name for name in lacking if name not in self.absent)
        if strict:
            self._check(specs)

    def _sort(self, disk_names: Iterable[str], joints: Mapping[str, Joint]) -> tuple[list[Source], tuple[str, ...]]:
        """Put each disk tensor into the source it belongs to; ``joints``: of those that transformers has no conversion for."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        mapping = get_model_conversion_mapping(self._model)
        renamings = [t for t in mapping if isinstance(t, WeightRenaming)]
        converters = [t for t in mapping if isinstance(t, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        prefix = self._model.base_model_prefix
        sources: dict[str, Source] = {}
        unused: list[str] = []
        joined = {part: target for target, joint in joints.items() for part in joint.names}
        for name in sorted(disk_names, key=dot_natural_key):
            target, pattern = rename_source_key(name, renamings, converters, prefix, self._expected)
            if target not in self._expected and name in self._expected:
                target, pattern = rename_source_key(name, [], [], prefix, self._expected)
            if name in joined:
                target, pattern = joined[name], None
            if target not in self._expected:
                unused.append(name)
                continue
            source = sources.setdefault(
                target, Source(target, converter=by_pattern[pattern] if pattern else None, joint=joints.get(target))
            )
            source.disk.append(name)
            source.patterns.append(pattern or name)
        return list(sources.values()), tuple(unused)

    def targets(self, source: Source) -> list[str]:
        """The model's names of what ``source`` makes."""
        if source.converter is None:
            return [source.target]
        first, *others = source.converter.target_patterns
        globs = [source.target, *(source.target.replace(first, other) for other in others)]
        if not any(set(glob) & set("*?[") for glob in globs):
            return [name for name in dict.fromkeys(globs) if name in self._expected]
        return [name for name in self._expected if any(name == glob or fnmatch(name, glob) for glob in globs)]

    def _alias_tied(self) -> None:
        """A tensor that the model ties to another (lm_head to the embedding) may be on disk under either name."""
        groups: dict[str, set[str]] = {}
        for target, source in getattr(self._model, "all_tied_weights_keys", {}).items():
            groups.setdefault(source, {source}).add(target)
        for source, group in groups.items():
            present = sorted(name for name in group if name in self.of)
            if present:
                giver = source if source in self.of else present[0]
                self.of |= {name: self.of[giver] for name in group if name not in self.of}

    def _is_base_alone(self, disk_names: Iterable[str]) -> bool:
        """Whether the checkpoint is the base model's: nothing beyond that is there, and the names or the config say that nothing should.

        Names of the base model begin without its prefix; a config names another class where foreign code puts a head on it.
        """
        prefix, tied = f"{self._model.base_model_prefix}.", self._model.all_tied_weights_keys
        beyond = [name for name in self._expected if not name.startswith(prefix) and name not in tied]
        if not 0 < len(beyond) < len(self._expected) or any(name in self.of for name in beyond):
            return False
        is_named = type(self._model).__name__ in (self._model.config.architectures or [])
        return not is_named or not any(name.startswith(prefix) for name in disk_names)

    def _lacking(self) -> list[str]:
        """The tensors without a source, but for buffers that files may lack: those have their values from the model's own code."""
        buffers = {name for name, _ in self._model.named_buffers()}
        optional = [re.compile(p) for p in self._model._keys_to_ignore_on_load_missing or ()]
        prefix = "" if self.has_head else f"{self._model.base_model_prefix}."
        lacking = (name for name in self._expected if name.startswith(prefix) and name not in self.of)
        return [n for n in lacking if not (n in buffers and any(p.search(n) for p in optional))]

    def _check(self, specs: Mapping[str, TensorSpec]) -> None:
        """Every tensor of the model has a source of its shape; of the base model, where that is all there is."""
        if self.missing:
            raise CheckpointError(
                f"{self._where}: {type(self._model).__name__} expects {_listed(self.missing)} "
                f"(shape {list(self._expected[self.missing[0]].shape)}), which the checkpoint lacks: a file or a shard of it is missing, "
                "or config.json is another model's"
            )
        for name, disk in self.disk.items():
            expected, got = list(self._expected[name].shape), list(specs[disk].shape)
            if expected != got:
                raise CheckpointError(f"{self._where}: {disk} has shape {got}, config.json asks for {expected}")


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
