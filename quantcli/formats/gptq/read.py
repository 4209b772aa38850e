"""Reading GPTQ folders: shapes give bits and groups, metadata give the rest, contradictions are noted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from quantcli.checkpoint import read_config
from quantcli.formats._folder import FolderCheckpoint
from quantcli.formats._packed_int import Packed, find_modules, groups_of, in_order, is_symmetric, looks_symmetric, measure, unpacked
from quantcli.formats.gptq.config import LEGACY_CONFIG, V1, V2, Settings, declared_version, is_gptq, legacy_words, settings_reader
from quantcli.json_files import shown
from quantcli.shards import Shards, open_folder
from quantcli.tensors import QuantizedTensor


class GptqCheckpoint(FolderCheckpoint):
    """A folder in GPTQ's layout, v1 or v2."""

    def __init__(self, path: Path, config: dict[str, Any], words: dict[str, Any], shards: Shards, notes: Iterable[str]) -> None:
        self._less_one = declared_version(path, words) == V1
        declared = settings_reader(words)
        specs = shards.specs
        found = find_modules(path, specs, "gptq", lambda m: measure(path, specs, m, declared(m).group_size, less_one=self._less_one))
        settings = {name: declared(p.module) for name, p in found.items()}
        self._packed = {name: settled(shards, p) if settings[name].sym else p for name, p in found.items()}
        sym = {name: settings[name].sym and looks_symmetric(shards, p) for name, p in self._packed.items()}
        sample = min(self._packed.values(), key=lambda p: p.n_zeros)
        reordered = not in_order(groups_of(shards, sample), sample)
        coded = {name: p.coded(sym=sym[name], desc_act=settings[name].desc_act or reordered) for name, p in self._packed.items()}
        contradictions = contradicted(self._packed, settings, sym, self._less_one)
        if reordered and not settings[sample.spec.name].desc_act:
            contradictions.append(f"desc_act is false, and {sample.module}.g_idx is not in order; it is obeyed")
        super().__init__(path, kind="gptq", config=config, shards=shards, coded=coded, quantization=words, notes=[*notes, *contradictions])

    def load_quantized(self, name: str) -> QuantizedTensor:
        p, scheme = self._packed[name], self.schemes[name]
        parts = unpacked(self.shards, p)
        if scheme.get("sym") and not is_symmetric(parts["zero"], p.bits):  # the first group said so, and others do not
            parts = unpacked(self.shards, replace(p, less_one=self._less_one))
            scheme = scheme.with_options(sym=False)
        return QuantizedTensor(scheme.with_options(desc_act=True) if "g_idx" in parts else scheme, p.spec.shape, parts)


def detect(path: Path, config: dict[str, Any] | None) -> bool:
    """A folder whose config.json says gptq, or an old one that says it in quantize_config.json alone."""
    if config is None:
        return False
    words = config.get("quantization_config")
    if not words:
        return is_gptq(legacy_words(path), unnamed=True)
    return is_gptq(words, unnamed=False)


def read(path: Path) -> GptqCheckpoint:
    """The GPTQ folder at ``path``: headers, and the first zero points of each module."""
    config, legacy = read_config(path), legacy_words(path)
    words = config.get("quantization_config") or legacy
    notes: list[str] = []
    if isinstance(legacy, dict) and words is not legacy:
        keys = [key for key in ("bits", "group_size", "sym", "desc_act", "checkpoint_format") if key in words and key in legacy]
        differ = [f"{key} {shown(words[key])} / {shown(legacy[key])}" for key in keys if words[key] != legacy[key]]
        notes = [f"config.json and {LEGACY_CONFIG} differ in {', '.join(differ)}; the former is obeyed"] if differ else []
    return GptqCheckpoint(path, config, words, open_folder(path), notes)


def settled(shards: Shards, p: Packed) -> Packed:
    """``p``, said to be symmetric, in the version in which its zero points are: they are known beforehand, so a file that mixes versions
    or names the wrong one is still read right."""
    other = replace(p, less_one=not p.less_one)
    return other if not looks_symmetric(shards, p) and looks_symmetric(shards, other) else p


def contradicted(packed: dict[str, Packed], settings: dict[str, Settings], sym: dict[str, bool], less_one: bool) -> list[str]:
    """What the metadata say and the tensors do not; the tensors are obeyed."""
    said, true = (V1, V2) if less_one else (V2, V1)
    wrong = [
        (
            [p for p in packed.values() if p.less_one != less_one],
            f"checkpoint_format is {said}, and the zero points of {{}} are {true}'s",
        ),
        ([p for n, p in packed.items() if settings[n].sym and not sym[n]], "sym is true, and the zero points of {} vary"),
        ([p for n, p in packed.items() if settings[n].bits not in (None, p.bits)], "the bits declared are not those of {}"),
        ([p for n, p in packed.items() if not groups_agree(p, settings[n].group_size)], "the group_size declared is not that of {}"),
        ([p for n, p in packed.items() if settings[n].skipped], "dynamic leaves out {}, which is quantized"),
    ]
    return [f"{text.format(listed(found))}; the tensors are obeyed" for found, text in wrong if found]


def groups_agree(p: Packed, declared: object) -> bool:
    return p.group_size == declared or (p.n_groups == 1 and (declared == -1 or (isinstance(declared, int) and declared >= p.in_features)))


def listed(found: list[Packed]) -> str:
    first = found[0]
    size = "one group" if first.n_groups == 1 else f"groups of {first.group_size}"
    return f"{first.module} ({first.bits} bits, {size})" + (f" and {len(found) - 1} more" if len(found) > 1 else "")
