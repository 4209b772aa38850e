"""What a model's tensors mean: which linears share an input, what can absorb a scale, GGUF names, row order and metadata."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from types import MappingProxyType
from typing import Any

from torch import Tensor
from typing_extensions import override

from quantcli.archs.shared.transformations import ROW_ORDERS
from quantcli.registry import find, names


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear of a decoder layer, by module names within the layer; ``{e}`` is the number of an expert.

    ``tap``: the first linear fed by the same input; ``absorber``: the op whose output channels can absorb a scale of that input, or None.
    """

    name: str
    tap: str
    absorber: str | None = None


@dataclass(frozen=True, slots=True)
class Cut:
    """A stored tensor that holds several: ``how`` is a name in ``archs.shared.transformations.CUTS``, ``names`` the tensors it gives, by
    whole names within the layer. A name with ``{e}`` means a tensor of each expert."""

    how: str
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Key:
    """A key of a GGUF file's metadata, ``name`` without the architecture's prefix, and what it holds.

    ``config_keys``: keys of config.json, of which the first that is not null counts. ``kind``: "u32", "f32", "bool" or "str"; an array
    where the value is a list. ``computed``: a name in ``formats.gguf.model.metadata.COMPUTED``, config → value, in place of
    ``config_keys``, which then only give where the value goes when a file is read. ``default``: the value where there is none;
    None leaves the key out, :data:`REQUIRED` is an error.
    """

    name: str
    config_keys: tuple[str, ...] | str = ()
    kind: str = "u32"
    computed: str | None = None
    default: Any = None

    @property
    def all_config_keys(self) -> tuple[str, ...]:
        return (self.config_keys,) if isinstance(self.config_keys, str) else self.config_keys


REQUIRED = object()
"""The ``default`` of a :class:`Key` without which there is no model."""


@dataclass(frozen=True)
class Architecture:
    """What is known of one family of models. A literal: nothing here depends on a checkpoint.

    Of the model: ``model_types`` and ``hf_class`` as in config.json; ``layer``: the module name of decoder layer ``{i}``;
    ``aliases``: the family's own keys in config.json → the usual ones; ``defaults``: what its config class takes for keys that config.json
    leaves out; ``experts``: tensors of a layer that hold the linears of all experts, and as which tensors folders have these one by one;
    ``stacked``: transformers knows the experts in these tensors only, so one by one they are of use only where they are quantized;
    ``derived``: transformers has a class of its own, derived from torch's, for the family's linears.

    Of its GGUF files: ``gguf_names``: HF module → GGUF name, both without ``.weight``/``.bias`` (or both whole names), where all ``{e}``
    make one tensor; ``also``: other names that a module has on disk → the one in ``gguf_names``; ``cuts``: tensors of a layer that GGUF
    alone stores otherwise; ``rows``: linears whose rows it has in another order → a name in
    ``archs.shared.transformations.ROW_ORDERS``; ``norm_offset``: what it adds to norm weights (Gemma stores w − 1); ``keys``: its
    metadata, in the file's order, where a string is a group of keys in ``formats.gguf.model.metadata.GROUPS``; ``computed``: tensors that
    no checkpoint stores, names in ``formats.gguf.model.rope.COMPUTED``; ``dropped``: patterns of tensors that have no place there → the
    reason; ``losses``: names in ``formats.gguf.model.losses.LOSSES``, of what llama.cpp does not compute.

    For reading GGUF files: ``present``: config key → the tensor of some layer that is there when it is true; ``renamed``: config key →
    the one of ``also`` that the disk has when it is true; ``fixed``: keys that no metadata gives; ``restored``: names in
    ``formats.gguf.model.configuration.RESTORED``, of keys that follow from others.
    """

    model_types: tuple[str, ...]
    hf_class: str
    layer: str
    linears: tuple[Linear, ...]
    gguf_arch: str
    gguf_names: Mapping[str, str]
    keys: tuple[Key | str, ...]
    aliases: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    experts: Mapping[str, Cut] = field(default_factory=dict)
    stacked: bool = False
    derived: bool = False
    also: Mapping[str, str] = field(default_factory=dict)
    cuts: Mapping[str, Cut] = field(default_factory=dict)
    rows: Mapping[str, str] = field(default_factory=dict)
    norm_offset: float = 0.0
    computed: tuple[str, ...] = ()
    dropped: Mapping[str, str] = field(default_factory=dict)
    losses: tuple[str, ...] = ()
    present: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    restored: tuple[str, ...] = ()

    def usual(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """``config`` with the usual keys: a text_config's lifted to the top, the family's own renamed, the family's defaults filled in."""
        flat = {**config, **(config.get("text_config") or {})}
        renamed = {usual: flat[own] for own, usual in self.aliases.items() if flat.get(own) is not None}  # transformers reads these
        given = {key: value for key, value in (flat | renamed).items() if value is not None}
        return {**flat, **renamed, **self.defaults, **given}

    def gguf_name(self, name: str) -> str | None:
        """The GGUF name of the HF tensor ``name``, or None when the architecture has no such tensor."""
        return _renamed(self.rooted(name), self._to_gguf)

    def published(self, name: str) -> str:
        """The name that everybody's folders have for the HF tensor ``name``."""
        return _renamed(self.rooted(name), dict(self.also)) or name

    def hf_name(self, name: str, config: Mapping[str, Any] = MappingProxyType({})) -> str | None:
        """The HF name of the GGUF tensor ``name``, with ``{e}`` where it holds one of each expert; None when there is no such tensor."""
        others = {self._to_gguf[other]: other for key, other in self.renamed.items() if config.get(key)}
        return _renamed(name, self._to_hf | others)

    def tap(self, name: str) -> str | None:
        """The tap of the HF weight ``name``: the name of the linear that is first to read its input; None when it is no known linear."""
        rest = self.rest_of(name)
        if rest is None or not rest.endswith(".weight"):
            return None
        pattern, numbers = _pattern(rest.removesuffix(".weight"), "e")
        tap = self._taps.get(pattern)
        return None if tap is None else name.removesuffix(rest) + _filled(tap, numbers)

    def rest_of(self, name: str) -> str | None:
        """The name within its layer of the HF tensor ``name``; None when it belongs to no layer."""
        match = self._in_layer.fullmatch(self.rooted(name))
        return match["rest"] if match else None

    def rooted(self, name: str) -> str:
        """``name`` as the whole language model has it: folders of a model without its head leave the first part out."""
        name, root = plain(name), self.layer.partition(".")[0]
        return name if name.startswith((f"{root}.", "lm_head.")) else f"{root}.{name}"

    def layer_of(self, name: str) -> int | None:
        """The number of the decoder layer that the HF tensor ``name`` belongs to."""
        match = self._in_layer.fullmatch(self.rooted(name))
        return int(match["i"]) if match else None

    def row_order(self, name: str, n_rows: int, config: Mapping[str, Any]) -> Tensor | None:
        """The HF row that each GGUF row of tensor ``name`` holds: [n_rows] int64; None when rows stay as they are."""
        how = next((how for linear, how in self.rows.items() if name.rpartition(".")[0].endswith(f".{linear}")), None)
        return None if how is None else ROW_ORDERS[how](n_rows, config)

    @cached_property
    def _in_layer(self) -> re.Pattern[str]:
        return re.compile(re.escape(self.layer).replace(r"\{i\}", r"(?P<i>\d+)") + r"\.(?P<rest>.+)")

    @cached_property
    def _taps(self) -> dict[str, str]:
        return {linear.name: linear.tap for linear in self.linears}

    @cached_property
    def _to_gguf(self) -> dict[str, str]:
        return {**self.gguf_names, **{other: self.gguf_names[name] for other, name in self.also.items()}}

    @cached_property
    def _to_hf(self) -> dict[str, str]:
        return {gguf: hf for hf, gguf in self.gguf_names.items()}


@dataclass(frozen=True)
class StoredNames(Architecture):
    """The architecture of a GGUF file taken as it is: tensors keep GGUF's names and rows, and each matrix reads an input of its own."""

    @override
    def gguf_name(self, name: str) -> str | None:
        return name

    @override
    def hf_name(self, name: str, config: Mapping[str, Any] = MappingProxyType({})) -> str | None:
        return name


def as_stored(gguf_arch: str) -> StoredNames:
    """What answers to any GGUF architecture, known here or not."""
    return StoredNames((), "", "blk.{i}", (), gguf_arch, {}, ())


def of(config: Mapping[str, Any]) -> Architecture | None:
    """The architecture that answers to ``config["model_type"]``, or None; of a GGUF file taken as it is, which has none, the stored one."""
    if (stored := config.get("gguf_architecture")) is not None:
        return as_stored(stored)
    return _by_model_type().get(config.get("model_type", ""))


def of_gguf(gguf_arch: str, tensors: Iterable[str] = (), keys: Iterable[str] = ()) -> Architecture | None:
    """The architecture whose GGUF files have ``general.architecture = gguf_arch``: of several the one that knows most ``tensors`` and
    ``keys`` of the metadata; or None."""
    tensors, keys = list(tensors), set(keys)

    def n_known(arch: Architecture) -> int:
        known = {f"{gguf_arch}.{key.name}" for key in arch.keys if isinstance(key, Key)}
        return sum(arch.hf_name(name) is not None for name in tensors) + len(known & keys)

    return max((arch for arch in _by_model_type().values() if arch.gguf_arch == gguf_arch), key=n_known, default=None)


def plain(name: str) -> str:
    """``name`` as a model of text alone has it: those that also see have their text model under ``language_model``."""
    return name.replace("language_model.", "", 1)


def slice_of(name: str) -> int | None:
    """Which slice tensor ``name`` is of one that holds several of a layer: the second number in its name, an expert's or a head's."""
    numbers = _pattern(name, "ie")[1]
    return int(numbers["e"]) if "e" in numbers else None


def by_expert(rest: str) -> tuple[str, int | None]:
    """A name within a layer with ``{e}`` for the number of an expert (or head), and that number; None where there is none."""
    pattern, numbers = _pattern(rest, "e")
    return pattern, int(numbers["e"]) if "e" in numbers else None


@cache
def _by_model_type() -> dict[str, Architecture]:
    archs = sorted((find("archs", name).ARCH for name in names("archs")), key=lambda arch: arch.model_types[0] != arch.gguf_arch)
    return {model_type: arch for arch in archs for model_type in arch.model_types}


def _pattern(name: str, letters: str) -> tuple[str, dict[str, str]]:
    """``name`` with its numbers replaced by ``{letter}``, and the numbers by letter."""
    numbers: dict[str, str] = {}

    def replaced(match: re.Match[str]) -> str:
        if len(numbers) == len(letters):
            return match[0]
        letter = letters[len(numbers)]
        numbers[letter] = match[0]
        return f"{{{letter}}}"

    return re.sub(r"(?<=\.)(0|[1-9]\d*)(?=\.|$)", replaced, name), numbers


def _filled(pattern: str, numbers: Mapping[str, str]) -> str:
    for letter, number in numbers.items():
        pattern = pattern.replace(f"{{{letter}}}", number)
    return pattern


def _renamed(name: str, table: Mapping[str, str]) -> str | None:
    """``name`` by a table of patterns of modules, where the last part (weight, bias) is kept, or of whole names."""
    pattern, numbers = _pattern(name, "ie")
    module, _, suffix = pattern.rpartition(".")
    if module in table and suffix in ("weight", "bias"):
        return _filled(f"{table[module]}.{suffix}", numbers)
    return _filled(table[pattern], numbers) if pattern in table else None
