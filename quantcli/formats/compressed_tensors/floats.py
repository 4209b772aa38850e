"""FP8, MXFP8, MXFP4 and NVFP4 in compressed-tensors' layouts: as tensors of a file and as the parts of their qtypes."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from quantcli import qtypes
from quantcli.errors import CheckpointError, UnsupportedError
from quantcli.formats.compressed_tensors.config import BLOCK, Arguments
from quantcli.tensors import QuantizedTensor, Scheme, TensorSpec

FP8_DTYPES = {"F8_E4M3": "e4m3", "F8_E5M2": "e5m2"}

LOCAL_NAMES: dict[str, dict[str, str]] = {
    "fp8": {"data": "weight", "scale": "weight_scale"},
    "mxfp8": {"data": "weight", "scale": "weight_scale"},
    "mxfp4": {"packed": "weight_packed", "scale": "weight_scale"},
    "nvfp4": {"packed": "weight_packed", "scale": "weight_scale", "global_scale": "weight_global_scale"},
}
"""qtype → its parts and what the file tensors are called."""


def measure(where: str, files: Mapping[str, TensorSpec], declared: Arguments | None, act: str) -> tuple[Scheme, tuple[int, ...]]:
    """(scheme, shape) of the module with ``files`` (by their local names). ``where`` names folder and module."""
    scale = files["weight_scale"]
    if "weight" in files:
        weight = files["weight"]
        shape = weight.shape
        scheme = Scheme.of("mxfp8") if scale.dtype == "U8" else fp8_scheme(where, weight, scale, declared)
    else:
        packed = files["weight_packed"]
        shape = (*packed.shape[:-1], 2 * packed.shape[-1]) if packed.shape else ()
        scheme = Scheme.of("mxfp4" if scale.dtype == "U8" else "nvfp4")
    if len(shape) != 2 or not all(shape):
        raise UnsupportedError(f"{where}: {scheme} of shape {list(shape)}; quantcli reads matrices [out, in] here")
    check_parts(where, files, scheme, shape)
    return scheme.with_options(act=act) if act else scheme, shape


def fp8_scheme(where: str, weight: TensorSpec, scale: TensorSpec, declared: Arguments | None) -> Scheme:
    """The scheme by the shape of the scales: one, one a row, or one a tile of the size that is declared, or else that fits."""
    options = {"dtype": FP8_DTYPES[weight.dtype], "scale_dtype": scale.dtype}
    if scale.dtype not in ("F16", "BF16", "F32"):
        raise CheckpointError(f"{where}.weight_scale is {scale.dtype}; expected F16, BF16, F32, or U8 for MXFP8")
    if len(weight.shape) != 2:
        raise UnsupportedError(f"{where}.weight has shape {list(weight.shape)}; quantcli reads matrices [out, in] here")
    (out, n_in), strategy = weight.shape, declared.strategy if declared else None
    if strategy != "block" and scale.shape in ((), (1,), (1, 1)):
        return Scheme.of("fp8", strategy="tensor", **options)
    if strategy != "block" and scale.shape in ((out,), (out, 1)):
        return Scheme.of("fp8", strategy="channel", **options)
    by_group = [(1, n_in // scale.shape[1])] if len(scale.shape) == 2 and scale.shape[1] and scale.shape[0] == out else []
    for rows, width in [*([declared.block] if declared and declared.block else []), BLOCK, *by_group]:
        if scale.shape == (-(-out // rows), -(-n_in // width)):
            own = {} if (rows, width) == BLOCK else {"block": (rows, width)}
            return Scheme.of("fp8", strategy="block", **options, **own)
    raise CheckpointError(f"{where}.weight_scale is {list(scale.shape)}, which is no scale for each row or block of {list(weight.shape)}")


def check_parts(where: str, files: Mapping[str, TensorSpec], scheme: Scheme, shape: tuple[int, ...]) -> None:
    """Raise :class:`CheckpointError` unless ``files`` have the dtypes and, numbers alone aside, the shapes of the qtype's parts."""
    for part, spec in qtypes.of(scheme.qtype).layout(shape, scheme).items():
        if part not in LOCAL_NAMES[scheme.qtype]:
            continue
        local = LOCAL_NAMES[scheme.qtype][part]
        found = files.get(local)
        if found is None or found.dtype != spec.dtype or not has_shape(found, spec):
            got = "missing" if found is None else f"{found.dtype} {list(found.shape)}"
            raise CheckpointError(f"{where}.{local} is {got}; expected {spec.dtype} {list(spec.shape)} for {scheme}")


def has_shape(found: TensorSpec, spec: TensorSpec) -> bool:
    """Whether ``found`` has the shape of ``spec``, or is its one number, or lacks nothing but a last dimension of one."""
    return found.shape == spec.shape or found.n_elements == spec.n_elements == 1 or (*found.shape, 1) == spec.shape


def decode(scheme: Scheme, shape: tuple[int, ...], files: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The qtype's parts of the file tensors ``files``."""
    layout = qtypes.of(scheme.qtype).layout(shape, scheme)
    return {part: files[local].reshape(layout[part].shape) for part, local in LOCAL_NAMES[scheme.qtype].items()}


def file_specs(shape: tuple[int, ...], scheme: Scheme) -> dict[str, TensorSpec]:
    """The file tensors of a matrix in ``scheme`` by their local names."""
    layout = qtypes.of(scheme.qtype).layout(shape, scheme)
    return {local: layout[part] for part, local in LOCAL_NAMES[scheme.qtype].items()}


def encode(tensor: QuantizedTensor) -> dict[str, Tensor]:
    """``tensor`` as its file tensors by their local names."""
    return {local: tensor.parts[part] for part, local in LOCAL_NAMES[tensor.scheme.qtype].items()}
