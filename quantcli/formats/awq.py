"""A Hugging Face folder in AWQ's GEMM layout, which vLLM, SGLang, transformers and GPTQModel read: integers of 4 bits with zero points.

A linear ``<module>.weight`` [out, in] becomes, with eight interleaved nibbles in each word (:mod:`quantcli.formats.shared.packed_int`)::

    <module>.qweight  I32 [in, out/8]         codes, packed along the outputs
    <module>.qzeros   I32 [n_groups, out/8]   zero points 0 … 15 as they are: nothing is subtracted
    <module>.scales   F16 [n_groups, out]

and is decoded as ``scales[i // group_size, o] · (code[i, o] − zero[i // group_size, o])``. Everything else stays dense. The layout is
free to hold anybody's codes, so rtn and gptq write it as well as awq does.

Written: one group size for the whole model, since its config has one; groups of 32, 64 or 128, or whole rows, which is what vLLM's
kernels take; ``zero_point: true`` even when every tensor is symmetric (their zero points are stored: 8), because vLLM has its fast
kernel only for that. Linears that engines join (q/k/v, gate/up, the experts of a layer) must all be quantized or all be dense.

Read: AutoAWQ's and GPTQModel's folders, bits and groups from the tensors' shapes, also where only AutoAWQ's old ``quant_config.json``
declares AWQ. Its scaled activations (``<mlp>.act.scales``, in MLPs without a gate) divide what the next linear reads: that linear's
weight is decoded and divided by them, and read as a dense one, so the model needs no such module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from typing_extensions import override

from quantcli import __version__
from quantcli.checkpoint.checkpoint import Checkpoint, read_config
from quantcli.checkpoint.json_files import read_json, shown
from quantcli.checkpoint.shards import Shards, open_folder, stored_as
from quantcli.errors import RecipeError, UnsupportedError, about
from quantcli.formats import DEFAULTS, Format, Request
from quantcli.formats.shared import dynamic
from quantcli.formats.shared.dense import dense_modules, harmless, unknown
from quantcli.formats.shared.folder import (
    FolderCheckpoint,
    QuantizedFolderLayout,
    QuantizedWeight,
    dense_dtypes,
    is_dense,
    module_of,
    quantized_only,
    shard_bytes,
    split_block,
)
from quantcli.formats.shared.fused import check_fused
from quantcli.formats.shared.packed_int import Packed, find_modules, is_symmetric, looks_symmetric, measure, pack_interleaved, unpacked
from quantcli.qtypes import int as int_qtype
from quantcli.tensors import QuantizedTensor, Scheme, TensorSpec

USUAL_SCHEME = "int4-g128-asym"
"""What ``export`` codes to where the source's own codes do not fit."""

LEGACY_CONFIGS = ("quant_config.json", "quantize_config.json")
GROUP_SIZES = (32, 64, 128, -1)
ACT_SCALES = ".scales"


class AwqCheckpoint(FolderCheckpoint):
    """A folder in AWQ's GEMM layout."""

    def __init__(self, path: Path, config: dict[str, Any], quant_config: dict[str, Any], shards: Shards) -> None:
        check_version(path, quant_config)
        specs, group_size = shards.specs, quant_config.get("group_size", quant_config.get("q_group_size", 128))
        self._packed = find_modules(path, specs, "awq", lambda m: measure(path, specs, m, group_size, interleaved=True))
        self._scaled = scaled_activations(path, specs, self._packed)
        quantized = {name: p.quantized(sym=looks_symmetric(shards, p)) for name, p in self._packed.items()}
        notes = contradictions(quant_config, self._packed, specs)
        for name, scales in self._scaled.items():
            c, n_bytes = quantized[name], specs[scales].nbytes
            dense = TensorSpec(name, "F32", c.spec.shape, c.spec.nbytes + n_bytes)
            quantized[name] = QuantizedWeight(dense, c.scheme, (*c.files, scales))
            notes.append(f"{scales} divides what {name} reads; that weight is divided by it and read as dense")
        super().__init__(path, kind="awq", config=config, shards=shards, quantized=quantized, quantization=quant_config, notes=notes)
        self.schemes = {name: scheme for name, scheme in self.schemes.items() if name not in self._scaled}

    @override
    def load(self, name: str) -> Tensor:
        if name not in self._scaled:
            return super().load(name)
        return int_qtype.QTYPE.unpack(self.load_quantized(name)) / self.shards.read(self._scaled[name]).float()

    @override
    def load_quantized(self, name: str) -> QuantizedTensor:
        p = self._packed[name]
        parts = unpacked(self.shards, p)
        return QuantizedTensor(p.scheme(sym=is_symmetric(parts["zero"], p.bits)), p.spec.shape, parts)


def detect(path: Path, config: dict[str, Any] | None) -> bool:
    """A folder whose config.json declares awq, or an old one that declares it in AutoAWQ's own file alone."""
    if config is None:
        return False
    quant_config = config.get("quantization_config")
    if not quant_config:
        return legacy_config(path) is not None
    return isinstance(quant_config, dict) and str(quant_config.get("quant_method")).lower() == "awq"


def read(path: Path) -> AwqCheckpoint:
    """The AWQ folder at ``path``: headers, and the first zero points of each module."""
    config = read_config(path)
    return AwqCheckpoint(path, config, config.get("quantization_config") or legacy_config(path) or {}, open_folder(path))


def legacy_config(path: Path) -> dict[str, Any] | None:
    """AutoAWQ's own settings file, which newer folders have in config.json."""
    for file in (path / name for name in LEGACY_CONFIGS):
        quant_config = read_json(file, unique=False) if file.is_file() else None
        if isinstance(quant_config, dict) and "w_bit" in quant_config:
            return quant_config
    return None


def check_version(path: Path, quant_config: Mapping[str, Any]) -> None:
    """Raise :class:`UnsupportedError` for AWQ in another layout than GEMM's."""
    version = quant_config.get("version") or quant_config.get("format") or quant_config.get("checkpoint_format") or "gemm"
    if str(version).lower() != "gemm":
        raise UnsupportedError(
            f"{path}: AWQ version {shown(version)} is packed for one kernel; quantcli reads gemm: take the model's gemm folder, or pack it "
            "again by the tool that made it"
        )


def contradictions(quant_config: Mapping[str, Any], packed: Mapping[str, Packed], specs: Mapping[str, TensorSpec]) -> list[str]:
    """Notes on where the metadata and the tensors differ."""
    notes = []
    if (bits := quant_config.get("bits", quant_config.get("w_bit", 4))) != 4:
        notes.append(f"bits is {shown(bits)}, and the tensors are packed in 4; so they are read")
    declared = quant_config.get("group_size", quant_config.get("q_group_size", 128))
    if other := [p for p in packed.values() if p.n_groups > 1 and p.group_size != declared]:
        p, more = other[0], f" (and {len(other) - 1} more)" if len(other) > 1 else ""
        notes.append(f"group_size is {shown(declared)}, and {p.module}{more} has {p.n_groups} groups of {p.group_size}; they are used")
    return notes + ignored_in_vain(quant_config.get("modules_to_not_convert"), packed, specs)


def ignored_in_vain(ignored: object, packed: Mapping[str, Packed], specs: Mapping[str, TensorSpec]) -> list[str]:
    """Notes on a list of dense modules that names a quantized one, or nothing at all. Readers look for its entries inside of names."""
    notes = []
    for entry in ignored if isinstance(ignored, list) else []:
        if not isinstance(entry, str) or not entry:
            continue
        if quantized := [name for name in packed if entry in name]:
            notes.append(f"modules_to_not_convert has {shown(entry)}, and {quantized[0]} is quantized; it is read as it is")
        elif not any(entry in name for name in specs) and unknown([entry], specs):
            notes.append(f"modules_to_not_convert has {shown(entry)}, which is in no tensor's name")
    return notes


def scaled_activations(path: Path, specs: Mapping[str, TensorSpec], packed: Mapping[str, Packed]) -> dict[str, str]:
    """Weight of a linear → the tensor of scales that its input is divided by; :class:`UnsupportedError` when it is ambiguous.

    AutoAWQ hangs them on the activation, ``<mlp>.act.scales`` [n]; the one linear of that MLP that reads n inputs is meant.
    """
    found = {}
    for name, spec in specs.items():
        module = name.removesuffix(ACT_SCALES)
        if module == name or f"{module}.qweight" in specs:
            continue
        parent = module.rpartition(".")[0]
        readers = [w for w, p in packed.items() if p.module.rpartition(".")[0] == parent and (p.in_features,) == spec.shape]
        if len(readers) != 1 or spec.dtype not in ("F16", "BF16", "F32"):
            raise UnsupportedError(
                f"{path}: {name} {spec.dtype} {list(spec.shape)} scales an activation, and {len(readers)} linears next to it could read "
                "that; start from the model before it was quantized"
            )
        found[readers[0]] = name
    return found


def supports(scheme: Scheme) -> bool:
    """Integers of 4 bits in groups of 32, 64, 128 or a row, in order, with float16 scales and activations left alone."""
    if is_dense(scheme):
        return True
    options = {**int_qtype.QTYPE.options, **dict(scheme.options)}
    plain = not options["desc_act"] and options["scale_dtype"] == "F16" and not options["act"]
    return scheme.qtype == "int" and plain and options["bits"] == 4 and options["group_size"] in GROUP_SIZES


def layout(source: Checkpoint, schemes: Mapping[str, Scheme], request: Request = DEFAULTS) -> AwqLayout:
    """How ``source`` is written with ``schemes``. How the model was made goes into ``meta.quantcli``.

    Raises :class:`RecipeError` for what AWQ's config cannot express or its engines cannot load.
    """
    quantized = quantized_only(source, schemes, "AWQ")
    for name in quantized:
        if not split_block(name)[0]:
            raise RecipeError(
                f"{name}: AWQ's readers expect the embedding and lm_head dense; keep this one, or use --format gptq for lm_head"
            )
    sizes = {scheme.option("group_size"): name for name, scheme in quantized.items()}
    if len(sizes) > 1:
        (one, first), (two, second), *_ = sizes.items()
        raise RecipeError(f"{first} has groups of {one}, {second} of {two}: AWQ has one group size for the whole model")
    check_fused(source.specs, quantized, lambda scheme: True)  # how groups are coded is the same for all
    left = dense_modules(source, quantized, request.modules)
    # Readers look for an entry inside of names.
    left = harmless(left, quantized, request.modules, lambda entry, module: entry in module)
    quant_config = quantization_config(next(iter(sizes)), left, quantized)
    return AwqLayout(
        config=source.config,
        quantization=quant_config,
        dtypes=dense_dtypes(source),
        sidecars=source.sidecars().files,
        max_shard_bytes=shard_bytes(request),
    )


def quantization_config(group_size: int, left: Sequence[str], quantized: Mapping[str, Scheme]) -> dict[str, Any]:
    """``quantization_config``; ``left``: the linears that stay dense; the output embedding alone is known to."""
    left = [] if set(left) <= {"lm_head"} else left
    quant_config: dict[str, Any] = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": list(left) or None,
        "meta": {"quantizer": [f"quantcli:{__version__}"], "quantcli": {}},
    }
    if left:  # which GPTQModel's own loader looks for in its rules instead
        quant_config["dynamic"] = dynamic.written(
            {**dict.fromkeys(f"{module}.weight" for module in left), **dict.fromkeys(quantized, ())}, ()
        )
    return quant_config


@dataclass(frozen=True, kw_only=True)
class AwqLayout(QuantizedFolderLayout):
    """An AWQ folder, version gemm."""

    @override
    def quantized_outputs(self, spec: TensorSpec, scheme: Scheme) -> list[TensorSpec]:
        if not supports(scheme):
            raise UnsupportedError(f"{spec.name}: {scheme} cannot be stored as AWQ, which holds 4 bits in groups of 32, 64, 128 or a row")
        if not spec.name.endswith(".weight"):
            raise RecipeError(f"{spec.name}: AWQ stores linears, whose tensor is named <module>.weight; exclude this one")
        with about(spec.name):
            n_groups = int_qtype.QTYPE.layout(spec.shape, scheme)["scale"].shape[1]
        (out, n_in), module = spec.shape, module_of(spec.name)
        if out % 8:
            raise RecipeError(f"{spec.name}: out_features {out} is not a multiple of 8, which AWQ needs to fill 32-bit words; exclude it")
        return [
            TensorSpec.dense(f"{module}.qweight", "I32", (n_in, out // 8)),
            TensorSpec.dense(f"{module}.qzeros", "I32", (n_groups, out // 8)),
            TensorSpec.dense(f"{module}.scales", "F16", (n_groups, out)),
        ]

    @override
    def quantized_parts(self, name: str, tensor: QuantizedTensor) -> dict[str, Tensor]:
        codes, scale, zero = (tensor.parts[part] for part in ("codes", "scale", "zero"))
        module = module_of(name)
        return {
            f"{module}.qweight": pack_interleaved(codes.T.contiguous()),
            f"{module}.qzeros": pack_interleaved(zero.T.contiguous()),
            f"{module}.scales": stored_as(f"{module}.scales", scale, "F16").T.contiguous(),
        }


class Awq(Format):
    """AWQ folders, version gemm."""

    usual_scheme = USUAL_SCHEME
    lists_modules = True

    @override
    def detect(self, path: Path, config: dict[str, Any] | None) -> bool:
        return detect(path, config)

    @override
    def read(self, path: Path) -> Checkpoint:
        return read(path)

    @override
    def supports(self, scheme: Scheme) -> bool:
        return supports(scheme)

    @override
    def layout(self, source: Checkpoint, schemes: Mapping[str, Scheme], request: Request = DEFAULTS) -> AwqLayout:
        return layout(source, schemes, request)


FORMAT = Awq()
