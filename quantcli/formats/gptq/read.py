"""Reading GPTQ folders: shapes give bits and groups, metadata give the rest, contradictions are noted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantcli.checkpoint import read_config
from quantcli.errors import CheckpointError
from quantcli.formats._folder import Coded, FolderCheckpoint
from quantcli.formats.gptq.config import LEGACY_CONFIG, V1, V2, declared_version, is_gptq, legacy_words
from quantcli.json_files import shown
from quantcli.ops.bits import unpack_bits
from quantcli.shards import Shards, open_folder
from quantcli.tensors import QuantizedTensor, Scheme, TensorSpec

BITS = (2, 3, 4, 8)
ONE_IN_EVERY_FIELD = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}


@dataclass(frozen=True, slots=True)
class Packed:
    """One module as its tensors' shapes describe it. ``group_size`` covers ``in_features`` in ``n_groups``, the last may be short."""

    module: str
    out_features: int
    in_features: int
    bits: int
    group_size: int
    n_groups: int
    spec: TensorSpec
    files: tuple[str, ...]


class GptqCheckpoint(FolderCheckpoint):
    """A folder in GPTQ's layout, v1 or v2."""

    def __init__(self, path: Path, config: dict[str, Any], words: dict[str, Any], shards: Shards, notes: Iterable[str]) -> None:
        self.shards = shards  # the groups of a sample are looked at before the base class takes over
        self._packed = find_packed(path, shards.specs, words)
        version = declared_version(path, words)
        sample = min(self._packed.values(), key=lambda p: p.n_groups * p.out_features)
        self._version, sym, contradictions = settle_zeros(shards.read(f"{sample.module}.qzeros"), sample, version, words)
        desc_act = bool(words.get("desc_act", False)) and words.get("group_size") != -1
        if not desc_act and not in_order(self._groups(sample), sample):
            contradictions.append(f"desc_act is false, and {sample.module}.g_idx is not in order; it is obeyed")
            desc_act = True
        super().__init__(
            path,
            kind="gptq",
            config=config,
            shards=shards,
            coded={name: Coded(p.spec, scheme_of(p, sym=sym, desc_act=desc_act), p.files) for name, p in self._packed.items()},
            quantization=words,
            notes=[*notes, *contradictions],
        )

    def load_quantized(self, name: str) -> QuantizedTensor:
        p, scheme = self._packed[name], self.schemes[name]
        qweight, qzeros, scales = (self.shards.read(f"{p.module}.{part}") for part in ("qweight", "qzeros", "scales"))
        # A symmetric tensor knows its zero points, so a file that mixes versions is still read right.
        version = likely_version(qzeros, p, self._version) if scheme.get("sym") else self._version
        parts = {
            "codes": unpack_bits(qweight.T.contiguous(), p.bits, p.in_features),
            "scale": scales.T.contiguous(),
            "zero": decode_zeros(qzeros, p, version).T.contiguous(),
        }
        groups = self._groups(p)
        if scheme.get("desc_act") or not in_order(groups, p):
            parts["g_idx"] = groups
            scheme = scheme.with_options(desc_act=True)
        return QuantizedTensor(scheme, p.spec.shape, parts)

    def _groups(self, p: Packed) -> Tensor:
        """The group of each input [in] int32, as stored or in order."""
        name = f"{p.module}.g_idx"
        if name not in self.shards.locations:
            return natural_groups(p.in_features, p.group_size)
        groups = self.shards.read(name)
        if groups.numel() and not 0 <= int(groups.min()) <= int(groups.max()) < p.n_groups:
            raise CheckpointError(f"{name}: groups {int(groups.min())} … {int(groups.max())}; {p.module}.scales has {p.n_groups}")
        return groups


def detect(path: Path, config: dict[str, Any] | None) -> bool:
    """A folder whose config.json says gptq, or an old one that says it in quantize_config.json alone."""
    if config is None:
        return False
    words = config.get("quantization_config")
    if not words:
        return is_gptq(legacy_words(path), unnamed=True)
    return is_gptq(words, unnamed=False)


def read(path: Path) -> GptqCheckpoint:
    """The GPTQ folder at ``path``: headers, and the zero points of its smallest module."""
    config, legacy = read_config(path), legacy_words(path)
    words = config.get("quantization_config") or legacy
    notes: list[str] = []
    if isinstance(legacy, dict) and words is not legacy:
        keys = [key for key in ("bits", "group_size", "sym", "desc_act", "checkpoint_format") if key in words and key in legacy]
        differ = [f"{key} {shown(words[key])} / {shown(legacy[key])}" for key in keys if words[key] != legacy[key]]
        notes = [f"config.json and {LEGACY_CONFIG} differ in {', '.join(differ)}; the former is obeyed"] if differ else []
    return GptqCheckpoint(path, config, words, open_folder(path), notes)


def find_packed(path: Path, specs: Mapping[str, TensorSpec], words: Mapping[str, Any]) -> dict[str, Packed]:
    """Every quantized module under the name of its weight."""
    for name in specs:
        if name.endswith(".qzeros") and f"{name.removesuffix('.qzeros')}.qweight" not in specs:
            raise CheckpointError(f"{path}: {name} has no .qweight beside it; the folder is incomplete")
    modules = [name.removesuffix(".qweight") for name in specs if name.endswith(".qweight")]
    if not modules:
        raise CheckpointError(f"{path}: config.json says gptq, and no tensor's name ends in .qweight; the folder is dense or damaged")
    return {f"{module}.weight": measure(path, specs, module, words.get("group_size", 128)) for module in modules}


def measure(path: Path, specs: Mapping[str, TensorSpec], module: str, declared_group_size: object) -> Packed:
    """Bits, shape and groups of ``module`` from its tensors' shapes; :class:`CheckpointError` when these do not fit one another."""
    tensors = {part: specs.get(f"{module}.{part}") for part in ("qweight", "qzeros", "scales")}
    for part, spec in tensors.items():
        expected = ("F16", "BF16", "F32") if part == "scales" else ("I32",)
        if spec is None or spec.dtype not in expected or len(spec.shape) != 2 or not spec.n_elements:
            got = "missing" if spec is None else f"{spec.dtype} {list(spec.shape)}"
            raise CheckpointError(f"{path}: {module}.{part} is {got}; expected a matrix of {' or '.join(expected)}")
    if f"{module}.weight" in specs:
        raise CheckpointError(f"{path}: {module} has both a .weight and a .qweight")
    (word_rows, out), (n_groups, zero_words), scale_shape = (specs[f"{module}.{part}"].shape for part in tensors)
    bits, odd = divmod(32 * zero_words, out)
    if odd or bits not in BITS or 32 * word_rows % bits or scale_shape != (n_groups, out):
        shapes = ", ".join(f"{part} {list(specs[f'{module}.{part}'].shape)}" for part in tensors)
        raise CheckpointError(f"{path}: {module}: {shapes} are no layout of 2, 3, 4 or 8 bits")
    n_in = 32 * word_rows // bits
    g_idx = specs.get(f"{module}.g_idx")
    if g_idx and (g_idx.dtype, g_idx.shape) != ("I32", (n_in,)):
        raise CheckpointError(f"{path}: {module}.g_idx is {g_idx.dtype} {list(g_idx.shape)}; expected I32 [{n_in}]")
    files = [spec for spec in (*tensors.values(), g_idx) if spec]
    weight = TensorSpec(f"{module}.weight", specs[f"{module}.scales"].dtype, (out, n_in), sum(spec.nbytes for spec in files))
    group_size = group_size_of(path, module, n_in, n_groups, declared_group_size)
    return Packed(module, out, n_in, bits, group_size, n_groups, weight, tuple(spec.name for spec in files))


def group_size_of(path: Path, module: str, n_in: int, n_groups: int, declared: object) -> int:
    """Inputs of a group: the declared number where it gives ``n_groups``, otherwise the even cut that does."""
    if isinstance(declared, int) and declared > 0 and -(-n_in // declared) == n_groups:
        return min(declared, n_in)
    if n_in % n_groups:
        raise CheckpointError(f"{path}: {module}: {n_groups} groups over {n_in} inputs fit no group_size ({shown(declared)} declared)")
    return n_in // n_groups


def settle_zeros(qzeros: Tensor, p: Packed, version: str, words: Mapping[str, Any]) -> tuple[str, bool, list[str]]:
    """(version, sym, notes): what a sample's zero points say about what the metadata declare."""
    if not words.get("sym", True):
        return version, False, []
    likely = likely_version(qzeros, p, version)
    if likely != version:
        return (
            likely,
            True,
            [f"checkpoint_format is {version}, and the zero points of this symmetric model are stored as in {likely}; so they are read"],
        )
    if bool((decode_zeros(qzeros, p, version) != 2 ** (p.bits - 1)).any()):
        return version, False, [f"sym is true, and the zero points of {p.module} vary; they are obeyed"]
    return version, True, []


def likely_version(qzeros: Tensor, p: Packed, declared: str) -> str:
    """The version in which ``qzeros`` are all those of a symmetric tensor; the declared one when that holds of neither."""
    for version in (declared, V2 if declared == V1 else V1):
        if bool((decode_zeros(qzeros, p, version) == 2 ** (p.bits - 1)).all()):
            return version
    return declared


def decode_zeros(qzeros: Tensor, p: Packed, version: str) -> Tensor:
    """Zero points [n_groups, out] uint8 of ``qzeros`` [n_groups, out·bits/32] int32."""
    if version == V2:
        return unpack_bits(qzeros, p.bits, p.out_features)
    if p.bits in ONE_IN_EVERY_FIELD:
        return unpack_bits(qzeros + ONE_IN_EVERY_FIELD[p.bits], p.bits, p.out_features)
    # Three bits lie across words, so no addition to a word restores a borrow; readers add to the field and keep its width.
    return (unpack_bits(qzeros, p.bits, p.out_features) + 1) & (2**p.bits - 1)


def scheme_of(p: Packed, *, sym: bool, desc_act: bool) -> Scheme:
    group_size = -1 if p.n_groups == 1 else p.group_size
    ragged = p.in_features % p.group_size != 0
    options = {"desc_act": True} if (desc_act and p.n_groups > 1) or ragged else {}
    return Scheme.of("int", bits=p.bits, group_size=group_size, sym=sym, **options)


def natural_groups(n_in: int, group_size: int) -> Tensor:
    return torch.arange(n_in, dtype=torch.int32) // group_size


def in_order(groups: Tensor, p: Packed) -> bool:
    """Whether ``groups`` are equal runs one after another, as a tensor without g_idx has them."""
    return p.in_features % p.group_size == 0 and torch.equal(groups, natural_groups(p.in_features, p.group_size))
