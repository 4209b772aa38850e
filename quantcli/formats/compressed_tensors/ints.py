"""Integers in compressed-tensors' layouts: packed in 32-bit words or one byte each; as file tensors and as parts of the qtype int."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from quantcli.checkpoint.json_files import shown
from quantcli.errors import CheckpointError, UnsupportedError
from quantcli.formats.compressed_tensors.config import Arguments
from quantcli.ops.bits import BITS, codes_per_run, pack_bits, unpack_bits
from quantcli.tensors import QuantizedTensor, Scheme, TensorSpec

SCALE_DTYPES = ("F16", "BF16", "F32")


@dataclass(frozen=True, slots=True)
class Stored:
    """How a matrix is stored. ``bits`` of a code and whether codes run on from one 32-bit word to the next (``dense``); packed or bytes;
    groups; whether zero points are packed, plain bytes, or absent (None)."""

    shape: tuple[int, int]
    bits: int
    packed: bool
    dense: bool
    n_groups: int
    zeros: str | None

    @property
    def grid_bits(self) -> int:
        """Bits of the qtype: one, which it does not have, is held among the 2-bit ones."""
        return max(self.bits, BITS[0])

    @property
    def shift(self) -> int:
        """What makes a stored code one of ``grid_bits``, whose middle is further up."""
        return (1 << self.grid_bits - 1) - (1 << self.bits - 1)


def measure(
    where: str, files: Mapping[str, TensorSpec], weight_shape: list[int] | None, declared: Arguments | None
) -> tuple[Stored, list[str]]:
    """What the shapes of ``files`` (by their local names) show, and where ``declared`` differs. ``where`` names folder and module.

    ``weight_shape``: the contents of the tensor of that name, if there is one.
    """
    packed = "weight_packed" in files
    codes, scale = files["weight_packed" if packed else "weight"], files["weight_scale"]
    if len(codes.shape) != 2:
        raise UnsupportedError(f"{where}: codes of shape {list(codes.shape)}; quantcli reads matrices of integers [out, in]")
    if scale.dtype not in SCALE_DTYPES:
        raise CheckpointError(f"{where}.weight_scale is {scale.dtype}; expected one of {', '.join(SCALE_DTYPES)}")
    out, width = codes.shape
    n_in = in_features(where, width, scale, weight_shape, declared) if packed else width
    if not out or not n_in or (weight_shape is not None and weight_shape != [out, n_in]):
        raise CheckpointError(f"{where}: weight_shape {shown(weight_shape)} does not fit codes of shape {list(codes.shape)}")
    bits, dense = width_of_codes(where, n_in, width, declared) if packed else (bits_of_bytes(declared), True)
    n_groups = groups_of(where, scale, out, n_in)
    if packed and declared and bits != declared.num_bits and declared.strategy == "group" and declared.group_size != n_in // n_groups:
        raise CheckpointError(
            f"{where}: {n_in} inputs in {width} 32-bit words and {n_groups} groups are neither int{declared.num_bits} nor groups of "
            f"{declared.group_size}"
        )
    stored = Stored((out, n_in), bits, packed, dense, n_groups, None)
    zeros = zeros_of(where, files.get("weight_zero_point"), stored)
    if (g_idx := files.get("weight_g_idx")) and (g_idx.dtype, g_idx.shape) != ("I32", (n_in,)):
        raise CheckpointError(f"{where}.weight_g_idx is {g_idx.dtype} {list(g_idx.shape)}; expected I32 [{n_in}]")
    return Stored((out, n_in), bits, packed, dense, n_groups, zeros), disagreements(stored, zeros, declared)


def is_evident(files: Mapping[str, TensorSpec], declared: Arguments | None) -> bool:
    """Whether the declared groups and bits fill ``files`` so well that nobody needs to look into weight_shape."""
    scale, packed = files["weight_scale"].shape, files["weight_packed"].shape
    if declared is None or declared.strategy != "group" or not declared.group_size or len(scale) != 2 or len(packed) != 2:
        return False
    return 0 < declared.group_size * scale[1] * declared.num_bits == 32 * packed[1]


def in_features(where: str, n_int32: int, scale: TensorSpec, weight_shape: list[int] | None, declared: Arguments | None) -> int:
    """Inputs of a packed matrix: as stored, or else as many as fill its groups, or its 32-bit words."""
    if weight_shape is not None:
        if len(weight_shape) != 2:
            raise CheckpointError(f"{where}.weight_shape holds {shown(weight_shape)}; expected [out, in]")
        return weight_shape[1]
    if declared is None:
        raise CheckpointError(f"{where}: neither a weight_shape nor a config group gives its width")
    size = declared.group_size
    if declared.strategy == "group" and size and size > 0 and len(scale.shape) == 2:
        return size * scale.shape[1]
    return 32 * n_int32 // max(1, declared.num_bits)


def width_of_codes(where: str, n_in: int, n_int32: int, declared: Arguments | None) -> tuple[int, bool]:
    """(bits, dense) with which ``n_in`` codes fill ``n_int32`` 32-bit words: the declared number if it does, else the one that does."""
    fits = [(bits, True) for bits in range(1, 9) if -(-n_in * bits // 32) == n_int32]
    fits += [(bits, False) for bits in range(1, 9) if 32 % bits and -(-n_in // (32 // bits)) == n_int32]
    as_declared = [fit for fit in fits if declared is not None and fit[0] == declared.num_bits]
    if not fits:
        raise CheckpointError(f"{where}: {n_int32} 32-bit words a row hold {n_in} codes of no number of bits from 1 to 8")
    return (as_declared or fits)[0]


def bits_of_bytes(declared: Arguments | None) -> int:
    """Bits of codes stored one a byte: only the metadata show that fewer than 8 are used."""
    return declared.num_bits if declared is not None and declared.num_bits in BITS else 8


def groups_of(where: str, scale: TensorSpec, out: int, n_in: int) -> int:
    """Groups of a row by the shape of its scales; one scale for the matrix is one for each row."""
    shape = scale.shape
    if shape in ((), (1,), (out,), (1, 1)):
        return 1
    if len(shape) != 2 or shape[0] != out or not shape[1] or n_in % shape[1]:
        raise CheckpointError(f"{where}.weight_scale is {list(shape)}; expected [{out}, groups] with groups that divide {n_in} inputs")
    return shape[1]


def zeros_of(where: str, spec: TensorSpec | None, stored: Stored) -> str | None:
    """ "packed", "plain" or None. Packed ones run along the outputs, plain ones have the shape of the scales."""
    if spec is None:
        return None
    out, shape = stored.shape[0], spec.shape
    n_int32 = -(-out * stored.bits // 32) if stored.dense else -(-out // (32 // stored.bits))
    if spec.dtype == "I32" and stored.packed and shape == (n_int32, stored.n_groups):
        return "packed"
    one = stored.n_groups == 1 and shape in ((), (1,), (out,), (1, 1))
    if spec.dtype in ("I8", "I32", "I64") and (shape == (out, stored.n_groups) or one):
        return "plain"
    raise CheckpointError(
        f"{where}.weight_zero_point is {spec.dtype} {list(shape)}; expected I32 [{n_int32}, {stored.n_groups}], packed along the outputs, "
        f"or I8 [{out}, {stored.n_groups}]"
    )


def disagreements(stored: Stored, zeros: str | None, declared: Arguments | None) -> list[str]:
    """Notes on where ``declared`` and the tensors differ."""
    if declared is None:
        return []
    notes = []
    if declared.type != "int" or declared.num_bits != stored.bits:
        notes.append(f"weights are declared as {declared.type}{declared.num_bits}, and the tensors hold int{stored.bits}")
    size = stored.shape[1] // stored.n_groups
    if declared.strategy == "group" and declared.group_size not in (size, -1 if stored.n_groups == 1 else size):
        notes.append(f"group_size is declared as {declared.group_size}, and the scales have groups of {size}")
    if not declared.symmetric and zeros is None:
        notes.append("symmetric is false, and there are no zero points; codes are read as symmetric")
    return notes


@cache
def scheme_of(stored: Stored, *, scale_dtype: str, sym: bool, desc_act: bool, act: str) -> Scheme:
    size = -1 if stored.n_groups == 1 else stored.shape[1] // stored.n_groups
    options = {"bits": stored.grid_bits, "group_size": size, "sym": sym, "scale_dtype": scale_dtype}
    return Scheme.of("int", **options, **({"desc_act": True} if desc_act else {}), **({"act": act} if act else {}))


def decode(where: str, stored: Stored, files: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parts codes, scale and zero of the file tensors ``files``."""
    out, n_in = stored.shape
    half = 2 ** (stored.bits - 1)
    if stored.packed:
        codes = unpack_int32(files["weight_packed"], stored.bits, n_in, dense=stored.dense)
    else:
        codes = (files["weight"].view(torch.uint8) + half).contiguous()  # modulo 256, so that bytes outside of 2^bits stand out
    if stored.bits < 8 and not stored.packed and int(codes.max()) >= 2 * half:
        raise CheckpointError(f"{where}.weight holds codes beyond the {stored.bits} bits that its config group announces")
    scale = files["weight_scale"].reshape(-1, stored.n_groups).expand(out, stored.n_groups).contiguous()
    if stored.zeros is None:
        zero = torch.full(scale.shape, half, dtype=torch.uint8)
    elif stored.zeros == "packed":
        zero = unpack_int32(files["weight_zero_point"].T.contiguous(), stored.bits, out, dense=stored.dense).T.contiguous()
    else:
        plain = files["weight_zero_point"].long().reshape(-1, stored.n_groups).expand(scale.shape) + half
        if not 0 <= int(plain.min()) <= int(plain.max()) < 2 * half:
            raise CheckpointError(
                f"{where}.weight_zero_point: {int(plain.min()) - half} … {int(plain.max()) - half} are no int{stored.bits}"
            )
        zero = plain.to(torch.uint8)
    return {"codes": codes + stored.shift if stored.shift else codes, "scale": scale, "zero": zero + stored.shift}


def unpack_int32(packed: Tensor, bits: int, n: int, *, dense: bool) -> Tensor:
    """The first ``n`` codes of ``bits`` in each row of ``packed`` [rows, n_int32] int32: uint8 [rows, n].

    ``dense``: codes run on from one 32-bit word to the next; otherwise ⌊32/bits⌋ lie in each and the rest of it is empty.
    """
    if dense and bits in BITS and 32 * packed.shape[1] == n * bits and n % codes_per_run(bits) == 0:
        return unpack_bits(packed.contiguous(), bits, n)
    i = torch.arange(n)
    place = i * bits if dense else 32 * (i // (32 // bits)) + bits * (i % (32 // bits))
    index, shift = place // 32, place % 32
    unsigned = torch.nn.functional.pad(packed.long() & 0xFFFFFFFF, (0, 1))  # the last code has no 32-bit word after it
    codes: Tensor = (unsigned[:, index] >> shift | unsigned[:, index + 1] << (32 - shift)) & (2**bits - 1)
    return codes.to(torch.uint8)


def file_specs(shape: tuple[int, ...], scheme: Scheme) -> dict[str, TensorSpec]:
    """The file tensors of a matrix in ``scheme`` by their local names."""
    out, n_in = shape
    bits, size = scheme.option("bits"), scheme.option("group_size")
    n_groups = 1 if size == -1 else n_in // size
    sizes: dict[str, tuple[str, tuple[int, ...]]] = {"weight_scale": (scheme.option("scale_dtype"), (out, n_groups))}
    if scheme.get("act"):
        sizes["weight"] = ("I8", (out, n_in))
    else:
        sizes |= {"weight_packed": ("I32", (out, n_in * bits // 32)), "weight_shape": ("I64", (2,))}
    if not scheme.option("sym"):
        sizes["weight_zero_point"] = ("I32", (out * bits // 32, n_groups))
    return {name: TensorSpec.dense(name, dtype, size) for name, (dtype, size) in sizes.items()}


def encode(name: str, tensor: QuantizedTensor) -> dict[str, Tensor]:
    """``tensor`` as its file tensors by their local names. A symmetric one must have its one zero point, which is not stored."""
    bits, sym = tensor.scheme.option("bits"), tensor.scheme.option("sym")
    codes, scale, zero = (tensor.parts[part] for part in ("codes", "scale", "zero"))
    half = 2 ** (bits - 1)
    if sym and bool((zero != half).any()):
        raise ValueError(f"{name}: {tensor.scheme} is symmetric, and a zero point is not {half}")
    files = {"weight_scale": scale}
    if tensor.scheme.get("act"):
        files["weight"] = (codes - half).view(torch.int8)  # modulo 256: 0 becomes −half
    else:
        files |= {"weight_packed": pack_bits(codes.contiguous(), bits), "weight_shape": torch.tensor(tensor.shape, dtype=torch.int64)}
    if not sym:
        files["weight_zero_point"] = pack_bits(zero.T.contiguous(), bits).T.clone(memory_format=torch.contiguous_format)
    return files
