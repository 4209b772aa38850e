"""File formats: how each is recognized, read, laid out and written, each a :class:`Format`."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from quantcli import registry
from quantcli.archs import Cut
from quantcli.checkpoint.checkpoint import Checkpoint, locate, read_config, unread
from quantcli.checkpoint.modules import Modules
from quantcli.errors import RecipeError, UnsupportedError
from quantcli.importance import Importance, ImportanceSource
from quantcli.output.journal import Run
from quantcli.output.writer import Writer
from quantcli.tensors import KvCache, QuantizedTensor, Scheme, TensorSpec


@dataclass(frozen=True, slots=True)
class Request:
    """What a recipe asks of a format besides the scheme of each tensor.

    ``options``: the recipe's ``format_options``; ``mix``: a GGUF file type that chooses types, or None; ``kv_cache``: a name in
    ``tensors.KV_CACHES``, or "" for caches without scales; ``is_measured``: the recipe's passes read statistics of the inputs;
    ``is_weighed``: plain rounding is given the importance of the inputs. These two change which types a mix chooses. ``modules``: under
    which names readers look for the weights, where a folder's own names are not all of them.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    mix: str | None = None
    kv_cache: str = ""
    is_measured: bool = False
    is_weighed: bool = False
    modules: Modules = field(default_factory=Modules)


DEFAULTS = Request()
"""A recipe that asks for nothing of its own."""


@dataclass(frozen=True, kw_only=True)
class OutputLayout(ABC):
    """How the tensors of one model lie in a format's files. Made by :meth:`Format.layout` from shapes and config alone; no weight is read.

    ``notes``: what a user might not expect of such files; ``dropped``: tensors of the source that have no place there → the reason.
    """

    notes: tuple[str, ...] = ()
    dropped: Mapping[str, str] = field(default_factory=dict)

    @abstractmethod
    def outputs(self, spec: TensorSpec, scheme: Scheme | None) -> list[TensorSpec]:
        """The file tensors of the logical tensor ``spec``, quantized by ``scheme`` or (None) dense; [] where it has no place.

        Raises :class:`RecipeError` for a shape that engines refuse, :class:`UnsupportedError` for a scheme that cannot be stored.
        """

    @abstractmethod
    def parts(self, name: str, tensor: Tensor | QuantizedTensor) -> dict[str, Tensor]:
        """The data of the logical tensor ``name`` under the names and in the shapes that :meth:`outputs` gave. ``tensor``: what a pass
        made of it, or the dense tensor [..., out, in]."""

    @abstractmethod
    def writer(
        self,
        path: Path,
        outputs: Sequence[TensorSpec],
        record: Mapping[str, Any],
        *,
        importance: Importance | None = None,
        overwrite: bool = False,
        run: Run | None = None,
    ) -> Writer:
        """A writer of the files at ``path``, declared, with space for ``outputs``, all of them.

        ``record``: how the output came to be (:meth:`quantcli.walk.provenance.Provenance.to_dict`), for formats that have a place for it;
        ``importance``: what weighed plain rounding, for formats that record where it came from; ``run``: by which unfinished work of an
        earlier process is known and taken over.
        """

    def cache_outputs(self, cache: KvCache) -> list[TensorSpec]:
        """The file tensors of the scales of one key-value cache; only where :attr:`Format.has_cache_scales`."""
        raise UnsupportedError(f"{cache.attention}: this format has no place for the scales of a key-value cache")

    def cache_parts(self, cache: KvCache, scales: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """The scales of keys and of values, float32 [1] or [heads] each, as the file tensors of :meth:`cache_outputs`."""
        raise UnsupportedError(f"{cache.attention}: this format has no place for the scales of a key-value cache")

    def importance(self, matrix: ImportanceSource, source: Checkpoint, schemes: Mapping[str, Scheme]) -> Importance:
        """What ``matrix`` states about the inputs of the weights of ``source`` that ``schemes`` quantize.

        Raises :class:`RecipeError` for a matrix of another model, or where this format's rounding is not weighed.
        """
        raise RecipeError("an importance matrix weighs the rounding to GGUF's types; this format has none: leave it out")

    def check_importance(self, importance: Collection[str], kept: Collection[str]) -> None:
        """Raise :class:`RecipeError` where a type is useless without importance and ``importance`` (names of weights) has none for it.
        ``kept``: weights whose codes are the source's, for which nothing is rounded."""
        return


class Format(ABC):
    """A file format, or a dialect of one: how its files are recognized and read, what it can hold, and how a model lies in it.

    A variant is a module or a package of this folder that has one instance, ``FORMAT``. Its name is the module's, with hyphens.
    """

    usual_scheme: ClassVar[str | None] = None
    """What ``export`` quantizes to where the source's own codes do not fit; None: nothing, they are decoded."""
    is_written: ClassVar[bool] = True
    """False for a dialect that is only read."""
    has_own_names: ClassVar[bool] = False
    """Whether files have tensors under other names, and cut differently, than a Hugging Face folder (GGUF)."""
    has_mixes: ClassVar[bool] = False
    """Whether :meth:`mix` knows file types that choose the type of each tensor (GGUF)."""
    has_cache_scales: ClassVar[bool] = False
    """Whether there is a place for the scales of a key-value cache."""
    experts_apart: ClassVar[str | None] = None
    """How this format's readers have the experts that transformers keeps in one tensor, one by one; None: they do not."""
    lists_modules: ClassVar[bool] = False
    """Whether config.json names modules, so that readers find out what has codes and what stays dense."""
    takes_derived: ClassVar[bool] = True
    """Whether transformers loads codes into linears of a class derived from torch's own (Falcon's), too."""
    option_names: ClassVar[tuple[str, ...]] = ("max_shard_bytes",)
    """The keys that ``format_options`` of a recipe may have."""

    @property
    def name(self) -> str:
        """The name by which :func:`of` finds it."""
        return type(self).__module__.split(".")[2].replace("_", "-")

    @abstractmethod
    def detect(self, path: Path, config: dict[str, Any] | None) -> bool:
        """Whether the folder or file at ``path`` is of this format; ``config``: the folder's config.json."""

    @abstractmethod
    def read(self, path: Path) -> Checkpoint:
        """The model at ``path``; headers only. Raises :class:`CheckpointError` for what is damaged or contradicts itself."""

    def supports(self, scheme: Scheme) -> bool:
        """Whether files of this format can hold ``scheme``, plain dtypes included."""
        return False

    def why_not(self, scheme: Scheme, config: Mapping[str, Any]) -> str | None:
        """Why engines would run a model of ``config`` wrongly with ``scheme``; None where they would not."""
        return None

    def suited(self, scheme: Scheme, config: Mapping[str, Any]) -> Scheme:
        """``scheme`` as this format stores it in a model of ``config``: with scales in the model's dtype, say."""
        return scheme

    def stays_dense(self, name: str) -> bool:
        """Whether engines load the tensor ``name`` dense whatever the recipe says."""
        return False

    def cuts(self, config: Mapping[str, Any]) -> Mapping[str, Cut]:
        """Tensors of a layer that this format alone stores in another way → how it cuts them; :class:`UnsupportedError` for a model that
        it has no names for."""
        return {}

    def as_stored(self, source: Checkpoint) -> Checkpoint:
        """``source``, a file of this very format, under the format's own names where that loses least; else ``source`` itself."""
        return source

    def mix(self, name: str, specs: Mapping[str, TensorSpec], config: Mapping[str, Any], request: Request) -> dict[str, Scheme]:
        """The scheme of each matrix in a file of type ``name``: tensor → scheme; a tensor that is missing stays dense."""
        raise RecipeError(f"{name} is a mix of types for GGUF; this format has none: leave --format out")

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raise :class:`RecipeError` for a key of ``format_options`` that this format does not have."""
        if unknown := sorted(options.keys() - set(self.option_names)):
            raise RecipeError(f"the {self.name} format has no option '{unknown[0]}'; it has: {', '.join(self.option_names) or 'none'}")

    def layout(self, source: Checkpoint, schemes: Mapping[str, Scheme], request: Request = DEFAULTS) -> OutputLayout:
        """How ``source`` lies in this format when ``schemes`` quantize its tensors and the rest stays as it is.

        Raises :class:`RecipeError` for what the format cannot express or its engines cannot load, :class:`UnsupportedError` where the
        format is only read.
        """
        raise UnsupportedError(f"{self.name} is read and not written; choose another --format")


def names() -> tuple[str, ...]:
    """Every format, sorted, spelt with hyphens as users do."""
    return tuple(name.replace("_", "-") for name in registry.names("formats"))


def of(name: str) -> Format:
    """The format called ``name``; :class:`UnsupportedError` lists the ones there are."""
    if name not in names():
        raise UnsupportedError(f"there is no format '{name}'; there are: {', '.join(names())}")
    found = importlib.import_module(f"quantcli.formats.{name.replace('-', '_')}").FORMAT
    assert isinstance(found, Format)
    return found


def open_checkpoint(source: str) -> Checkpoint:
    """The checkpoint at ``source``: a folder, a file, or a Hub id ``org/name[@revision]``. Reads headers, no weights.

    Raises :class:`CheckpointError` for what is missing, damaged or unsafe, :class:`UnsupportedError` for a dialect nobody here reads.
    """
    path = locate(source)
    config = read_config(path) if path.is_dir() else None
    # The dense reader takes whatever no dialect claims, so it is asked last.
    for name in sorted(names(), key=lambda n: (n == "hf", n)):
        if of(name).detect(path, config):
            checkpoint = of(name).read(path)
            checkpoint.source = source
            return checkpoint
    raise unread(path, config, names())
