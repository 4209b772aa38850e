"""Reading folders of packed integers: shapes give bits and groups, metadata give the rest, contradictions are noted."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from typing_extensions import override

from quantcli.checkpoint.shards import Shards
from quantcli.formats.shared.folder import FolderCheckpoint
from quantcli.formats.shared.packed_int import (
    Packed,
    find_modules,
    first_zeros,
    groups_of,
    in_order,
    is_symmetric,
    measure,
    symmetric_zeros,
    unpacked,
)
from quantcli.tensors import QuantizedTensor


@dataclass(frozen=True, slots=True)
class Settings:
    """What a folder's metadata declare of one module; ``bits`` and ``group_size`` may be of any type. ``skipped``: that it stays dense."""

    bits: Any
    group_size: Any
    sym: bool
    desc_act: bool = False
    skipped: bool = False


class PackedCheckpoint(FolderCheckpoint):
    """A folder of packed integers. ``declared``: the settings of a module; ``zero_setting``: the setting that gives how they are stored;
    ``less_one``, ``interleaved``: what they mean (:class:`Packed`)."""

    def __init__(
        self,
        path: Path,
        *,
        kind: str,
        config: dict[str, Any],
        quantization: dict[str, Any],
        shards: Shards,
        declared: Callable[[str], Settings],
        zero_setting: str,
        less_one: bool,
        interleaved: bool = False,
        notes: Iterable[str] = (),
    ) -> None:
        self._less_one = less_one
        specs = shards.specs

        def measured(module: str) -> Packed:
            return measure(path, specs, module, declared(module).group_size, less_one=less_one, interleaved=interleaved)

        found = find_modules(path, specs, kind, measured)
        settings = {name: declared(p.module) for name, p in found.items()}
        known = {name: settled(shards, p) if settings[name].sym else (p, False) for name, p in found.items()}
        self._packed = {name: p for name, (p, _) in known.items()}
        sym = {name: is_sym for name, (_, is_sym) in known.items()}
        sample = min(self._packed.values(), key=lambda p: p.n_groups * p.out_features)
        reordered = not in_order(groups_of(shards, sample), sample)
        quantized = {name: p.quantized(sym=sym[name], desc_act=settings[name].desc_act or reordered) for name, p in self._packed.items()}
        contradictions = contradicted(self._packed, settings, sym, zero_setting, less_one)
        if reordered and not settings[sample.spec.name].desc_act:
            contradictions.append(f"desc_act is false, and {sample.module}.g_idx is not in order; it is used")
        super().__init__(
            path, kind=kind, config=config, shards=shards, quantized=quantized, quantization=quantization, notes=[*notes, *contradictions]
        )

    @override
    def load_quantized(self, name: str) -> QuantizedTensor:
        p, scheme = self._packed[name], self.schemes[name]
        parts = unpacked(self.shards, p)
        if scheme.get("sym") and not is_symmetric(parts["zero"], p.bits):  # the first group is, and others are not
            parts = unpacked(self.shards, replace(p, less_one=self._less_one))
            scheme = scheme.with_options(sym=False)
        return QuantizedTensor(scheme.with_options(desc_act=True) if "g_idx" in parts else scheme, p.spec.shape, parts)


def settled(shards: Shards, p: Packed) -> tuple[Packed, bool]:
    """``p``, declared symmetric, in the version in which its zero points are, and whether they are symmetric at all: they are known
    beforehand, so a file that mixes versions or names the wrong one is still read right."""
    zeros = first_zeros(shards, p)
    for candidate in (p,) if p.interleaved else (p, replace(p, less_one=not p.less_one)):
        if torch.equal(zeros, symmetric_zeros(p.out_features, p.bits, candidate.less_one)):
            return candidate, True
    return p, False


def contradicted(
    packed: dict[str, Packed], settings: dict[str, Settings], sym: dict[str, bool], zero_setting: str, less_one: bool
) -> list[str]:
    """Notes on where the metadata and the tensors differ; the tensors are used."""
    means = "less one" if less_one else "as they are"
    wrong = [
        (
            [p for p in packed.values() if p.less_one != less_one],
            f"{zero_setting} stores zero points {means}, and not so do {{}}",
        ),
        ([p for n, p in packed.items() if settings[n].sym and not sym[n]], "sym is true, and the zero points of {} vary"),
        ([p for n, p in packed.items() if settings[n].bits not in (None, p.bits)], "the bits declared are not those of {}"),
        ([p for n, p in packed.items() if not groups_agree(p, settings[n].group_size)], "the group_size declared is not that of {}"),
        ([p for n, p in packed.items() if settings[n].skipped], "the metadata leave {} dense, which is quantized"),
    ]
    return [f"{text.format(listed(found))}; the tensors are used" for found, text in wrong if found]


def groups_agree(p: Packed, declared: object) -> bool:
    return p.group_size == declared or (p.n_groups == 1 and (declared == -1 or (isinstance(declared, int) and declared >= p.in_features)))


def listed(found: list[Packed]) -> str:
    first = found[0]
    size = "one group" if first.n_groups == 1 else f"groups of {first.group_size}"
    return f"{first.module} ({first.bits} bits, {size})" + (f" and {len(found) - 1} more" if len(found) > 1 else "")
