"""What the dialects of a Hugging Face folder share: packed tensors behind the name of their weight, and how a folder is written."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from typing_extensions import override

from quantcli import qtypes
from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.shards import MAX_SHARD_BYTES, Shards, layout, stored_as
from quantcli.errors import CheckpointError, RecipeError, UnsupportedError
from quantcli.formats import OutputLayout, Request
from quantcli.importance import Importance
from quantcli.output.journal import Run
from quantcli.output.writer import Writer
from quantcli.tensors import DTYPES, QuantizedTensor, Scheme, TensorSpec

DENSE_QTYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
"""The qtypes that are plain dtypes, and safetensors' names for them."""

CONFIG_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""config.json's names for a model's dtype."""


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A quantized tensor of a folder: ``spec`` (its name as a dense weight, dense shape, bytes of all parts), ``scheme``, and the
    ``files``: the names of the file tensors that make it."""

    spec: TensorSpec
    scheme: Scheme
    files: tuple[str, ...]

    @classmethod
    def of(cls, name: str, shape: tuple[int, ...], dtype: str, *, scheme: Scheme, files: Iterable[TensorSpec]) -> QuantizedWeight:
        """``dtype``: what its engine decodes it to, as far as the file shows (the scales' dtype, say)."""
        parts = tuple(files)
        return cls(TensorSpec(name, dtype, tuple(shape), sum(spec.nbytes for spec in parts)), scheme, tuple(spec.name for spec in parts))


class FolderCheckpoint(Checkpoint):
    """A folder of safetensors in some dialect: ``quantized`` tensors by the names of their weights, everything else as it is stored.

    A dialect's reader derives from it and gives ``load_quantized``; ``self.shards`` reads file tensors.
    """

    def __init__(
        self,
        path: Path,
        *,
        kind: str,
        config: dict[str, Any],
        shards: Shards,
        quantized: Mapping[str, QuantizedWeight],
        quantization: dict[str, Any],
        notes: Sequence[str] = (),
        kv_cache: Mapping[str, str] | None = None,
    ) -> None:
        self.shards = shards
        self.quantized_weights = dict(quantized)
        super().__init__(
            path,
            kind=kind,
            config=config,
            specs=logical_specs(path, shards.specs, self.quantized_weights),
            schemes={name: c.scheme for name, c in self.quantized_weights.items()},
            quantization=quantization,
            notes=[*shards.notes, *notes],
            kv_cache=kv_cache,
        )

    @override
    def load(self, name: str) -> Tensor:
        return self.shards.read(name)


def logical_specs(path: Path, specs: Mapping[str, TensorSpec], quantized: Mapping[str, QuantizedWeight]) -> dict[str, TensorSpec]:
    """Weights under their dense names, and every tensor that is part of none, in the order of the files.

    Raises :class:`CheckpointError` for a weight that is stored dense as well, or a file tensor that two weights claim.
    """
    owner: dict[str, str] = {}
    for name, c in quantized.items():
        for file in c.files:
            if file in owner:
                raise CheckpointError(f"{path}: {file} is part of both {owner[file]} and {name}")
            owner[file] = name
    out: dict[str, TensorSpec] = {}
    for file, spec in specs.items():
        name = owner.get(file, file)
        if file not in owner and file in quantized:
            raise CheckpointError(f"{path}: {file} is stored both dense and quantized")
        out.setdefault(name, quantized[name].spec if name in quantized else spec)
    return out


@dataclass(frozen=True, kw_only=True)
class FolderLayout(OutputLayout):
    """A model in a folder of safetensors. ``dtypes``: of what stays dense; ``sidecars``: the files next to the weights, except for what
    :meth:`config_files` gives; ``max_shard_bytes``: of tensor data in a file."""

    dtypes: Mapping[str, str]
    sidecars: Mapping[str, bytes | Path] = field(default_factory=dict)
    max_shard_bytes: int = MAX_SHARD_BYTES

    @override
    def outputs(self, spec: TensorSpec, scheme: Scheme | None) -> list[TensorSpec]:
        """A tensor that stays dense, in its stored dtype or in another plain one; the others are the dialect's."""
        if is_dense(scheme):
            dtype = self.dtypes[spec.name] if scheme is None else DENSE_QTYPES[scheme.qtype]
            return [TensorSpec.dense(spec.name, dtype, spec.shape)]
        assert scheme is not None
        return self.quantized_outputs(spec, scheme)

    @override
    def parts(self, name: str, tensor: Tensor | QuantizedTensor) -> dict[str, Tensor]:
        """The same, with its data."""
        if not isinstance(tensor, QuantizedTensor):
            return {name: stored_as(name, tensor, self.dtypes[name])}
        return {name: tensor.parts["data"]} if is_dense(tensor.scheme) else self.quantized_parts(name, tensor)

    def quantized_outputs(self, spec: TensorSpec, scheme: Scheme) -> list[TensorSpec]:
        """The file tensors of ``spec`` quantized by ``scheme``."""
        raise UnsupportedError(f"{spec.name}: {scheme} is quantized, and a folder of plain weights holds {', '.join(DENSE_QTYPES)}")

    def quantized_parts(self, name: str, tensor: QuantizedTensor) -> dict[str, Tensor]:
        """Their data."""
        raise UnsupportedError(f"{name}: {tensor.scheme} is quantized, and a folder of plain weights holds {', '.join(DENSE_QTYPES)}")

    def config_files(self, record: Mapping[str, Any]) -> dict[str, bytes | Path]:
        """config.json first of all, and whatever else describes the quantization; ``record``: how the output was made."""
        raise NotImplementedError

    @override
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
        files, index = layout(outputs, max_shard_bytes=self.max_shard_bytes)
        out = Writer(path, overwrite=overwrite, run=run)
        out.declare(files, {**self.config_files(record), **self.sidecars, **index})
        return out


@dataclass(frozen=True, kw_only=True)
class QuantizedFolderLayout(FolderLayout):
    """A folder whose config.json has a ``quantization_config``. ``config``: the source's config.json; ``quantization``: that block."""

    config: Mapping[str, Any]
    quantization: Mapping[str, Any]

    @override
    def config_files(self, record: Mapping[str, Any]) -> dict[str, bytes | Path]:
        return {"config.json": as_json({**self.config, "quantization_config": self.recorded(record)})}

    def recorded(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """``quantization`` with ``record`` in its ``meta``, in dialects that have one."""
        quant_config = dict(self.quantization)
        return quant_config | {"meta": {**quant_config["meta"], "quantcli": dict(record)}} if "meta" in quant_config else quant_config


def shard_bytes(request: Request) -> int:
    """How much tensor data a file of the folder may hold."""
    return int(request.options.get("max_shard_bytes", MAX_SHARD_BYTES))


def model_dtype(config: Mapping[str, Any]) -> str:
    """The dtype that config.json names, for tensors whose stored form has none of its own."""
    declared = config.get("dtype") or config.get("torch_dtype")
    return next((dtype for dtype, known in CONFIG_DTYPES.items() if known == declared), "F32")


def dense_dtypes(source: Checkpoint) -> dict[str, str]:
    """The dtype in which each tensor of ``source`` is stored where no scheme gives another."""
    return {name: spec.dtype if spec.dtype in DTYPES else model_dtype(source.config) for name, spec in source.specs.items()}


def is_dense(scheme: Scheme | None) -> bool:
    return scheme is None or scheme.qtype in DENSE_QTYPES


def quantized_only(source: Checkpoint, schemes: Mapping[str, Scheme], format_: str) -> dict[str, Scheme]:
    """The schemes that are no plain dtype; :class:`RecipeError` when there is none, since the folder would only pretend."""
    quantized = {name: scheme for name, scheme in schemes.items() if not is_dense(scheme)}
    if not quantized:
        raise RecipeError(f"{source.source}: no tensor is quantized, so there is nothing to write as {format_}; use --format hf")
    return quantized


def part_specs(spec: TensorSpec, scheme: Scheme) -> dict[str, TensorSpec]:
    """The qtype's parts of ``spec``."""
    return qtypes.of(scheme.qtype).layout(spec.shape, scheme)


def module_of(name: str) -> str:
    """The module whose weight ``name`` is."""
    return name.removesuffix(".weight")


def split_block(name: str) -> tuple[str, str]:
    """("model.layers", "self_attn.q_proj") of "model.layers.3.self_attn.q_proj.weight"; ("", module) outside of blocks."""
    match = re.fullmatch(r"(.*?)\.\d+\.(.+)", module_of(name))
    return (match[1], match[2]) if match else ("", module_of(name))


def as_json(value: Any) -> bytes:
    """``value`` as the text of a JSON file."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
