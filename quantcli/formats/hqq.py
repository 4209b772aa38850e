"""A Hugging Face folder of HQQ (``quant_method: hqq``), as hqq and transformers up to 4 saved it in safetensors; read only.

A linear is its codes, its grid, and its settings encoded as tensors (hqq/core/quantize.py ``state_dict``, bitpack.py)::

    <module>.W_q         packed codes of the matrix V, which is W in rows of group_size (axis 1) or in group_size rows (axis 0)
    <module>.scale       [n_groups, 1] or [1, n_groups], and
    <module>.zero        the same: W = (V − zero)·scale
    <module>.shape       I64 [2]: out, in
    <module>.packing     U8, a text: 8bit_u8 (also 5 and 6 bits), 4bit_u8, 3bit_32, 2bit_u8, 1bit_u8
    <module>.nbits, .group_size, .axis, .view_as_float, .quant_scale, .quant_zero, and more that only a trainer needs

Packing is by rows of V: with k codes in an integer, the rows are in k blocks, the first block in the highest bits. 3bit_32 has ten codes in
an int32, V filled up with rows of zeros. ``view_as_float`` calls the same bytes floats. Scales that are quantized themselves cannot be in
a safetensors file, as hqq itself states, and are refused. Nothing is written: no current engine loads the folder (transformers 5 does not).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from typing_extensions import override

from quantcli.checkpoint.checkpoint import Checkpoint, read_config
from quantcli.checkpoint.json_files import shown
from quantcli.checkpoint.shards import Shards, open_folder
from quantcli.errors import CheckpointError, RecipeError, UnsupportedError
from quantcli.formats import DEFAULTS, Format, Request
from quantcli.formats.shared.folder import FolderCheckpoint, QuantizedWeight
from quantcli.qtypes import hqq as hqq_qtype
from quantcli.tensors import QuantizedTensor, Scheme, TensorSpec

SETTINGS = (
    *("W_q", "scale", "zero", "shape", "nbits", "group_size", "axis", "packing", "unpack_view_dtype", "view_as_float", "quant_scale"),
    *("quant_zero", "compute_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config", "channel_wise", "optimize", "round_zero"),
)
"""All that hqq stores of a linear except its bias; the codes, the grid and half of the rest are read."""

FLOATS = ("F16", "BF16", "F32")
MAX_SETTING_BYTES = 256


@dataclass(frozen=True, slots=True)
class Packing:
    """``bits`` of each code in an integer of ``dtype`` that holds ``n_codes``; what may be stored so: ``nbits``."""

    bits: int
    n_codes: int
    dtype: torch.dtype
    nbits: tuple[float, ...]


PACKINGS = {
    "8bit_u8": Packing(8, 1, torch.uint8, (5, 6, 8)),
    "4bit_u8": Packing(4, 2, torch.uint8, (4,)),
    "3bit_32": Packing(3, 10, torch.int32, (3,)),
    "2bit_u8": Packing(2, 4, torch.uint8, (1.58, 2)),
    "1bit_u8": Packing(1, 8, torch.uint8, (1,)),
}


@dataclass(frozen=True, slots=True)
class Module:
    """One linear. ``rows``, ``columns``: of V, which ``packing`` holds."""

    quantized: QuantizedWeight
    packing: Packing
    rows: int
    columns: int


class HqqCheckpoint(FolderCheckpoint):
    """A folder of HQQ."""

    def __init__(self, path: Path, config: dict[str, Any], shards: Shards) -> None:
        specs = shards.specs
        names = [name.removesuffix(".W_q") for name in specs if name.endswith(".W_q")]
        if not names:
            raise CheckpointError(f"{path}: config.json declares hqq, and no tensor's name ends in .W_q; the folder is dense or damaged")
        self._modules = {f"{name}.weight": read_module(path, shards, specs, name) for name in names}
        quantized = {name: module.quantized for name, module in self._modules.items()}
        quant_config = config["quantization_config"]
        notes = skipped_in_vain(quant_config, quantized)
        super().__init__(path, kind="hqq", config=config, shards=shards, quantized=quantized, quantization=quant_config, notes=notes)

    @override
    def load_quantized(self, name: str) -> QuantizedTensor:
        module = self._modules[name]
        spec, scheme = module.quantized.spec, module.quantized.scheme
        stem = name.removesuffix("weight")
        codes = unpack_rows(self.shards.read(f"{stem}W_q"), module)
        grid = {part: self.shards.read(f"{stem}{part}").reshape(-1) for part in ("scale", "zero")}
        return QuantizedTensor(scheme, spec.shape, {"codes": codes.reshape(spec.shape), **grid})


def detect(path: Path, config: dict[str, Any] | None) -> bool:
    """A folder whose config.json declares hqq. HQQ's own qmodel.pt is a pickle, which nothing here reads."""
    quant_config = (config or {}).get("quantization_config")
    return isinstance(quant_config, dict) and str(quant_config.get("quant_method")).lower() == "hqq"


def read(path: Path) -> HqqCheckpoint:
    """The HQQ folder at ``path``: headers, and the settings of each module."""
    return HqqCheckpoint(path, read_config(path), open_folder(path))


def read_module(path: Path, shards: Shards, specs: Mapping[str, TensorSpec], name: str) -> Module:
    """The linear ``name`` as its settings describe it; :class:`CheckpointError` when its tensors do not fit them."""

    def setting(key: str, expected: Callable[[Any], bool]) -> Any:
        value = read_setting(path, shards, specs, f"{name}.{key}")
        if not expected(value):
            raise CheckpointError(f"{path}: {name}.{key} is {shown(value)}, which hqq never writes")
        return value

    for key in ("quant_scale", "quant_zero"):
        if f"{name}.{key}" in specs and setting(key, lambda v: True) != 0:
            raise UnsupportedError(f"{path}: {name}.{key}: scales that are quantized themselves are not read; save the model without them")
    if f"{name}.zero_scale" in specs or any(f"{name}.{key}" not in specs for key in ("scale", "zero")):
        raise UnsupportedError(f"{path}: {name} has no .scale and .zero of its own; save it by hqq with offload_meta=False")
    packing = PACKINGS[setting("packing", lambda v: isinstance(v, str) and v in PACKINGS)]
    shape = setting("shape", lambda v: isinstance(v, list) and len(v) == 2 and all(type(n) is int and n > 0 for n in v))
    nbits = setting("nbits", lambda v: type(v) in (int, float) and round(v, 2) in packing.nbits)
    group_size = setting("group_size", lambda v: type(v) is int and v > 0)
    axis = setting("axis", lambda v: type(v) is int and v in (0, 1))
    bits = round(nbits, 2)
    scheme = Scheme.of("hqq", bits=bits, group_size=group_size, axis=axis, scale_dtype=specs[f"{name}.scale"].dtype)
    rows, columns = check_shapes(path, specs, name, (shape[0], shape[1]), scheme, packing)
    files = [specs[f"{name}.{key}"] for key in SETTINGS if f"{name}.{key}" in specs]
    quantized = QuantizedWeight.of(f"{name}.weight", (shape[0], shape[1]), specs[f"{name}.scale"].dtype, scheme=scheme, files=files)
    return Module(quantized, packing, rows, columns)


def check_shapes(
    path: Path, specs: Mapping[str, TensorSpec], name: str, shape: tuple[int, int], scheme: Scheme, packing: Packing
) -> tuple[int, int]:
    """Rows and columns of V, after its codes, scales and zero points were found to have the sizes that ``scheme`` gives them."""
    scale, zero, W_q = (specs[f"{name}.{part}"] for part in ("scale", "zero", "W_q"))
    try:
        n_groups = hqq_qtype.QTYPE.layout(shape, scheme)["scale"].n_elements if scale.dtype in FLOATS else -1
    except RecipeError as error:
        raise CheckpointError(f"{path}: {name}: {error}") from None
    rows, columns = (n_groups, scheme.option("group_size")) if scheme.option("axis") == 1 else (scheme.option("group_size"), n_groups)
    n_bytes = -(-rows // packing.n_codes) * columns * packing.dtype.itemsize
    even = packing.dtype == torch.int32 or rows % packing.n_codes == 0
    if not even or (scale.n_elements, zero.n_elements, zero.dtype, W_q.nbytes) != (n_groups, n_groups, scale.dtype, n_bytes):
        got = ", ".join(f"{part} {spec.dtype} {list(spec.shape)}" for part, spec in (("W_q", W_q), ("scale", scale), ("zero", zero)))
        raise CheckpointError(f"{path}: {name}: {got} do not fit {list(shape)} in {scheme}, axis {scheme.option('axis')}")
    return rows, columns


def read_setting(path: Path, shards: Shards, specs: Mapping[str, TensorSpec], name: str) -> Any:
    """A number, a list of numbers or a text that hqq encoded as a tensor."""
    spec = specs.get(name)
    if spec is None or spec.nbytes > MAX_SETTING_BYTES:
        raise CheckpointError(f"{path}: {name} is missing or no setting; the folder is incomplete")
    value = shards.read(name)
    if spec.dtype == "U8" and len(spec.shape) == 1:
        return bytes(value.tolist()).decode("ascii", "replace")
    return value.tolist()


def unpack_rows(W_q: Tensor, module: Module) -> Tensor:
    """The codes V [rows, columns] uint8 of a packed ``W_q``, whatever its bytes are called."""
    packing = module.packing
    packed = W_q.contiguous().view(torch.uint8).reshape(-1).view(packing.dtype).view(-1, module.columns)
    shifts = range(packing.bits * (packing.n_codes - 1), -1, -packing.bits)
    blocks = [((packed >> shift) & (2**packing.bits - 1)).to(torch.uint8) for shift in shifts]
    return torch.cat(blocks)[: module.rows]


def skipped_in_vain(quant_config: Mapping[str, Any], quantized: Mapping[str, QuantizedWeight]) -> list[str]:
    """Notes on skipped modules that are quantized nevertheless. HQQ names them without "model", "layers" and numbers."""
    skipped = quant_config.get("skip_modules")
    notes = []
    for tag in skipped if isinstance(skipped, list) else []:
        if found := [name for name in quantized if tag == tag_of(name.removesuffix(".weight"))]:
            notes.append(f"skip_modules has {shown(tag)}, and {found[0]} is quantized; it is read as it is")
    return notes


def tag_of(module: str) -> str:
    return ".".join(part for part in module.split(".") if part not in ("model", "layers") and not part.isnumeric())


class Hqq(Format):
    """HQQ's own folders, which are only read."""

    is_written = False

    @override
    def detect(self, path: Path, config: dict[str, Any] | None) -> bool:
        return detect(path, config)

    @override
    def read(self, path: Path) -> Checkpoint:
        return read(path)

    @override
    def layout(self, source: Checkpoint, schemes: Mapping[str, Scheme], request: Request = DEFAULTS) -> NoReturn:
        raise UnsupportedError("hqq is read and not written; --method hqq writes HQQ's solution in a format that engines load")


FORMAT = Hqq()
