"""The taps of one decoder layer under the names on disk: which linears, experts and key-value caches read the same input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from torch import nn

from quantcli.forward.experts import Experts, Rows, rows_of
from quantcli.forward.names import NameMap
from quantcli.forward.stack import Trace, is_turned
from quantcli.tensors import KvCache, TensorSpec


class Readers:
    """Of one layer ``name`` (on disk): ``linears``: disk name of a linear's weight → its tap, the name of the first of the tap's linears
    that has one; ``experts``: the parameters that hold experts whose rows are whole tensors on disk; ``caches``: module → the cache of
    keys and values that it keeps."""

    def __init__(
        self, model: Any, module: str, trace: Trace, names: NameMap, specs: Mapping[str, TensorSpec], tensors: Sequence[str]
    ) -> None:
        """``module``: the layer's name in ``model``; ``trace``: what was seen of it; ``tensors``: its disk names."""
        self._model, self._module, self._trace = model, module, trace
        prefix = f"{module}."
        self._disk = {name.removeprefix(prefix): disk for name, disk in names.disk.items() if name.startswith(prefix)}
        self.name = shared_prefix(tensors)
        self.linears = self._find_linears()
        self.experts = self._find_experts(names, specs)
        self.caches = self._find_caches()

    @cached_property
    def taps(self) -> dict[str, str]:
        """Disk name of each linear's weight → tap, the experts' last."""
        experts = {rows.disk: tap for x in self.experts for group, tap in zip(x.rows, x.taps, strict=True) for rows in group}
        return self.linears | experts

    @cached_property
    def slices(self) -> dict[str, tuple[str, int, Rows]]:
        """Disk name of an expert's weight → the parameter that holds it, the expert's number, its rows there."""
        return {rows.disk: (x.parameter, e, rows) for x in self.experts for e, group in enumerate(x.rows) for rows in group}

    @property
    def repeats(self) -> bool:
        """Whether the layer calls one of its linears more than once in a forward."""
        return self._trace.repeats

    def tap_modules(self) -> dict[str, nn.Module]:
        """The module that reads each tap other than the experts'."""
        modules = {disk.removesuffix(".weight"): name.removesuffix(".weight") for name, disk in self._disk.items()}
        return {tap: self._submodule(modules[tap]) for tap in self.linears.values()}

    def cache_modules(self) -> dict[nn.Module, KvCache]:
        """The modules that keep keys and values."""
        return {self._submodule(name): cache for name, cache in self.caches.items()}

    @cached_property
    def turned(self) -> frozenset[str]:
        """Disk names of the linears' weights that are stored [in, out]."""
        modules = {disk: name.removesuffix(".weight") for name, disk in self._disk.items() if disk in self.linears}
        return frozenset(disk for disk, name in modules.items() if is_turned(self._submodule(name)))

    def expert_modules(self) -> dict[nn.Module, int]:
        """The modules that hold experts, and how many each holds."""
        return {self._model.get_submodule(x.parameter.rpartition(".")[0]): len(x.rows) for x in self.experts}

    def _submodule(self, name: str) -> nn.Module:
        module: nn.Module = self._model.get_submodule(f"{self._module}.{name}")
        return module

    def _find_linears(self) -> dict[str, str]:
        tap_of: dict[str, str] = {}
        taps: dict[str, str] = {}
        for module, first in self._trace.taps.items():
            if name := self._disk.get(f"{module}.weight"):
                taps[name] = tap_of.setdefault(first, name.removesuffix(".weight"))
        return taps

    def _find_experts(self, names: NameMap, specs: Mapping[str, TensorSpec]) -> tuple[Experts, ...]:
        stacks: dict[str, tuple[tuple[Rows, ...], ...]] = {}
        first = self._trace.experts
        for name in first:
            target = f"{self._module}.{name}"
            if rows := rows_of(names.of[target], specs, self._model.get_parameter(target).shape, self._model):
                stacks[name] = rows
        return tuple(
            Experts(f"{self._module}.{name}", rows, tuple(group[0].disk.removesuffix(".weight") for group in stacks[first[name]]))
            for name, rows in stacks.items()
            if first[name] in stacks
        )

    def _find_caches(self) -> dict[str, KvCache]:
        found: dict[str, KvCache] = {}
        for module, shape in self._trace.caches.items():
            inside = [(name.removeprefix(f"{module}."), disk) for name, disk in self._disk.items() if name.startswith(f"{module}.")]
            on_disk = [disk.removesuffix(f".{rest}") for rest, disk in inside if disk.endswith(f".{rest}")]
            found[module] = KvCache(on_disk[0] if on_disk else f"{self.name}.{module}", *shape)
        return found


def shared_prefix(names: Sequence[str]) -> str:
    """The parts, between dots, with which all of a layer's tensors begin: its name."""
    first, *others = [name.split(".") for name in names]
    n = 0
    while n < len(first) - 1 and all(parts[n : n + 1] == first[n : n + 1] for parts in others):
        n += 1
    return ".".join(first[:n])
