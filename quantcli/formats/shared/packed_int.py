"""Integers packed into 32-bit words as GPTQ's and AWQ's families store them: what a module's shapes show, and unpacking.

A linear ``<module>.weight`` [out, in] is stored in three or four tensors; 32-bit words are little endian and filled from bit 0::

    <module>.qweight  I32 [in·bits/32, out]        GPTQ's packing: codes along the inputs
                      I32 [in, out·bits/32]        AWQ's: along the outputs, four bits, interleaved
    <module>.qzeros   I32 [n_groups, out·bits/32]  zero points along the outputs; AWQ's are interleaved
    <module>.scales   F16 [n_groups, out]
    <module>.g_idx    I32 [in]                     the group of each input (GPTQ's packing alone); absent when they run in order

Weights are ``scales[g, o] · (code[i, o] − zero[g, o])``. GPTQ's first version (v1) stores ``zero − 1``. AWQ's interleave: nibble ``k`` of
a word holds column ``8·word + [0, 2, 4, 6, 1, 3, 5, 7][k]``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from quantcli.checkpoint.json_files import shown
from quantcli.checkpoint.locations import read_tensor
from quantcli.checkpoint.shards import Shards
from quantcli.errors import CheckpointError, UnsupportedError
from quantcli.formats.shared.folder import QuantizedWeight
from quantcli.ops.bits import pack_bits, unpack_bits
from quantcli.tensors import Scheme, TensorSpec

BITS = (2, 3, 4, 8)
ONE_IN_EVERY_FIELD = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}

INTERLEAVE = (0, 2, 4, 6, 1, 3, 5, 7)
"""AWQ: the column, of eight, that each nibble of a 32-bit word holds."""

NATURAL = (0, 4, 1, 5, 2, 6, 3, 7)
"""The nibble that holds each of eight columns."""


@dataclass(frozen=True, slots=True)
class Packed:
    """One module as its tensors' shapes describe it. ``group_size`` covers ``in_features`` in ``n_groups``, the last may be short.

    ``interleaved``: AWQ's packing; ``less_one``: GPTQ's v1, whose zero points are stored less one.
    """

    module: str
    out_features: int
    in_features: int
    bits: int
    group_size: int
    n_groups: int
    spec: TensorSpec
    files: tuple[str, ...]
    interleaved: bool = False
    less_one: bool = False

    def quantized(self, *, sym: bool, desc_act: bool = False) -> QuantizedWeight:
        """The module as a folder's reader wants it."""
        return QuantizedWeight(self.spec, self.scheme(sym=sym, desc_act=desc_act), self.files)

    def scheme(self, *, sym: bool, desc_act: bool = False) -> Scheme:
        options: dict[str, object] = {"bits": self.bits, "group_size": -1 if self.n_groups == 1 else self.group_size, "sym": sym}
        if (desc_act and self.n_groups > 1) or self.in_features % self.group_size:
            options["desc_act"] = True
        if self.spec.dtype != "F16":
            options["scale_dtype"] = self.spec.dtype
        return Scheme.of("int", **options)


def find_modules(path: Path, specs: Mapping[str, TensorSpec], method: str, measured: Callable[[str], Packed]) -> dict[str, Packed]:
    """Every packed module of ``specs``, as ``measured`` finds it, under the name of its weight."""
    for name in specs:
        if name.endswith(".qzeros") and f"{name.removesuffix('.qzeros')}.qweight" not in specs:
            raise CheckpointError(f"{path}: {name} has no .qweight next to it; the folder is incomplete")
    modules = [name.removesuffix(".qweight") for name in specs if name.endswith(".qweight")]
    if not modules:
        raise CheckpointError(
            f"{path}: config.json declares {method}, and no tensor's name ends in .qweight; the folder is dense or damaged"
        )
    return {f"{module}.weight": measured(module) for module in modules}


def measure(
    path: Path,
    specs: Mapping[str, TensorSpec],
    module: str,
    declared_group_size: object,
    *,
    interleaved: bool = False,
    less_one: bool = False,
) -> Packed:
    """Bits, shape and groups of ``module`` from its tensors' shapes; :class:`CheckpointError` when these do not fit one another."""
    qweight, qzeros, scales = triple(path, specs, module)
    (rows, columns), (n_groups, zero_columns), out = qweight.shape, qzeros.shape, scales.shape[1]
    bits, odd = divmod(32 * zero_columns, out)
    fits = not odd and bits in BITS and scales.shape == (n_groups, out)
    fits = fits and (columns == zero_columns if interleaved else columns == out and not 32 * rows % bits)
    if not fits:
        shapes = ", ".join(f"{spec.name.rpartition('.')[2]} {list(spec.shape)}" for spec in (qweight, qzeros, scales))
        raise CheckpointError(f"{path}: {module}: {shapes} are no layout of 2, 3, 4 or 8 bits")
    if interleaved and bits != 4:
        raise UnsupportedError(f"{path}: {module} has {bits} bits; AWQ's layout is settled for 4 alone: take a gptq folder of the model")
    n_in = rows if interleaved else 32 * rows // bits
    g_idx = None if interleaved else specs.get(f"{module}.g_idx")
    if g_idx and (g_idx.dtype, g_idx.shape) != ("I32", (n_in,)):
        raise CheckpointError(f"{path}: {module}.g_idx is {g_idx.dtype} {list(g_idx.shape)}; expected I32 [{n_in}]")
    files = [spec for spec in (qweight, qzeros, scales, g_idx) if spec]
    weight = TensorSpec(f"{module}.weight", scales.dtype, (out, n_in), sum(spec.nbytes for spec in files))
    group_size = group_size_of(path, module, n_in, n_groups, declared_group_size)
    return Packed(module, out, n_in, bits, group_size, n_groups, weight, tuple(spec.name for spec in files), interleaved, less_one)


def triple(path: Path, specs: Mapping[str, TensorSpec], module: str) -> tuple[TensorSpec, TensorSpec, TensorSpec]:
    """qweight, qzeros and scales of ``module``, each a matrix of the dtype it must have."""
    found = []
    for part in ("qweight", "qzeros", "scales"):
        spec, expected = specs.get(f"{module}.{part}"), ("F16", "BF16", "F32") if part == "scales" else ("I32",)
        if spec is None or spec.dtype not in expected or len(spec.shape) != 2 or not spec.n_elements:
            got = "missing" if spec is None else f"{spec.dtype} {list(spec.shape)}"
            raise CheckpointError(f"{path}: {module}.{part} is {got}; expected a matrix of {' or '.join(expected)}")
        found.append(spec)
    if f"{module}.weight" in specs:
        raise CheckpointError(f"{path}: {module} has both a .weight and a .qweight")
    return found[0], found[1], found[2]


def group_size_of(path: Path, module: str, n_in: int, n_groups: int, declared: object) -> int:
    """Inputs of a group: the declared number where it gives ``n_groups``, otherwise the even cut that does."""
    if isinstance(declared, int) and declared > 0 and -(-n_in // declared) == n_groups:
        return min(declared, n_in)
    if n_in % n_groups:
        raise CheckpointError(f"{path}: {module}: {n_groups} groups over {n_in} inputs fit no group_size ({shown(declared)} declared)")
    return n_in // n_groups


def unpacked(shards: Shards, p: Packed) -> dict[str, Tensor]:
    """The parts of the qtype ``int``: codes [out, in], scale and zero [out, n_groups], and g_idx [in] when the groups are out of order."""
    qweight, scales = (shards.read(f"{p.module}.{part}") for part in ("qweight", "scales"))
    if p.interleaved:
        codes = unpack_interleaved(qweight, p.out_features).T.contiguous()
    else:
        codes = unpack_bits(qweight.T.contiguous(), p.bits, p.in_features)
    zero = decode_zeros(shards.read(f"{p.module}.qzeros"), p)
    parts = {"codes": codes, "scale": scales.T.contiguous(), "zero": zero.T.contiguous()}
    groups = groups_of(shards, p)
    return parts if in_order(groups, p) else {**parts, "g_idx": groups}


def decode_zeros(qzeros: Tensor, p: Packed) -> Tensor:
    """Zero points [rows, out] uint8 of ``qzeros`` [rows, out·bits/32] int32."""
    if p.interleaved:
        return unpack_interleaved(qzeros, p.out_features)
    if not p.less_one:
        return unpack_bits(qzeros, p.bits, p.out_features)
    if p.bits in ONE_IN_EVERY_FIELD:
        return unpack_bits(qzeros + ONE_IN_EVERY_FIELD[p.bits], p.bits, p.out_features)
    # Three bits cross from one 32-bit word to the next, so no addition to a word restores a borrow; readers add to each field.
    zeros: Tensor = (unpack_bits(qzeros, p.bits, p.out_features) + 1) & (2**p.bits - 1)
    return zeros


def looks_symmetric(shards: Shards, p: Packed) -> bool:
    """Whether the zero points of the first group are those of a symmetric tensor. A page of the file shows it: chance does not repeat a
    zero point over all outputs."""
    return torch.equal(first_zeros(shards, p), symmetric_zeros(p.out_features, p.bits, p.less_one))


def first_zeros(shards: Shards, p: Packed) -> Tensor:
    """The packed zero points [n] int32 of the first group."""
    location = shards.locations[f"{p.module}.qzeros"]
    row = TensorSpec.dense(location.spec.name, "I32", (location.spec.shape[1],))
    return read_tensor(replace(location, spec=row))


@lru_cache(maxsize=64)
def symmetric_zeros(out_features: int, bits: int, less_one: bool) -> Tensor:
    """What they are in a symmetric tensor; interleaving changes nothing where all are the same."""
    return pack_bits(torch.full((1, out_features), 2 ** (bits - 1) - less_one, dtype=torch.uint8), bits)[0]


def is_symmetric(zero: Tensor, bits: int) -> bool:
    return bool((zero == 2 ** (bits - 1)).all())


def groups_of(shards: Shards, p: Packed) -> Tensor:
    """The group of each input [in] int32, as stored or in order."""
    name = f"{p.module}.g_idx"
    if name not in p.files:
        return natural_groups(p.in_features, p.group_size)
    groups = shards.read(name)
    if groups.numel() and not 0 <= int(groups.min()) <= int(groups.max()) < p.n_groups:
        raise CheckpointError(f"{name}: groups {int(groups.min())} … {int(groups.max())}; {p.module}.scales has {p.n_groups}")
    return groups


def natural_groups(n_in: int, group_size: int) -> Tensor:
    return torch.arange(n_in, dtype=torch.int32) // group_size


def in_order(groups: Tensor, p: Packed) -> bool:
    """Whether ``groups`` are equal runs one after another, as a tensor without g_idx has them."""
    return p.in_features % p.group_size == 0 and torch.equal(groups, natural_groups(p.in_features, p.group_size))


def pack_interleaved(codes: Tensor) -> Tensor:
    """AWQ's packed form [rows, n/8] int32 of ``codes``: [rows, n] uint8 below 16."""
    return pack_bits(codes.view(codes.shape[0], -1, 8)[:, :, list(INTERLEAVE)].reshape(codes.shape), 4)


def unpack_interleaved(packed: Tensor, n: int) -> Tensor:
    """The ``n`` codes [rows, n] uint8 of each row of AWQ's ``packed`` form: [rows, n/8] int32."""
    codes = unpack_bits(packed, 4, n)
    return codes.view(codes.shape[0], -1, 8)[:, :, list(NATURAL)].reshape(codes.shape)
