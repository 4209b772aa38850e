"""A Hugging Face folder of dense weights: safetensors in f32, f16 or bf16, beside config.json and the tokenizer's files.

Written: the tensors of the source under their names on disk (a tied lm_head that the source leaves out stays out), in their stored dtype
unless a scheme (``f32``, ``f16``, ``bf16``) says otherwise; config.json, with ``dtype`` adjusted then and any quantization of the source
removed; everything small that is not weights, as it is.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from quantcli.checkpoint import Checkpoint, read_config
from quantcli.errors import UnsupportedError
from quantcli.shards import MAX_SHARD_BYTES, Shards, layout, open_folder, stored_as
from quantcli.tensors import DTYPES, QuantizedTensor, Scheme, TensorSpec
from quantcli.writer import Writer

QTYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
"""The qtypes that can be stored here, and their safetensors dtypes."""

CONFIG_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""config.json's words for a model's dtype."""


@dataclass(frozen=True, slots=True)
class Context:
    """What writing needs to know: ``dtypes`` of every output tensor, and the files that go beside the weights."""

    dtypes: Mapping[str, str]
    sidecars: Mapping[str, bytes | Path]
    max_shard_bytes: int


class HfCheckpoint(Checkpoint):
    """A folder of dense tensors."""

    def __init__(self, path: Path, config: dict[str, Any], shards: Shards) -> None:
        super().__init__(path, kind="hf", config=config, specs=shards.specs, notes=shards.notes)
        self._shards = shards

    def load(self, name: str) -> Tensor:
        return self._shards.read(name)


def detect(path: Path, config: dict[str, Any] | None) -> bool:
    """A folder whose config.json speaks of no quantization."""
    return config is not None and not config.get("quantization_config")


def read(path: Path) -> HfCheckpoint:
    """The dense folder at ``path``; headers only."""
    return HfCheckpoint(path, read_config(path), open_folder(path))


def supports(scheme: Scheme) -> bool:
    return scheme.qtype in QTYPES


def context(
    source: Checkpoint, schemes: Mapping[str, Scheme], metadata: Mapping[str, Any], *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> Context:
    """How ``source`` is written when ``schemes`` names new dtypes. A folder of plain weights has no place for ``metadata``."""
    if not source.path.is_dir():
        raise UnsupportedError(
            f"{source.source}: a Hugging Face folder cannot be made from a single file, which lacks the tokenizer's files"
        )
    dtypes = {name: spec.dtype if spec.dtype in DTYPES else model_dtype(source.config) for name, spec in source.specs.items()}
    dtypes |= {name: dtype_of(name, scheme) for name, scheme in schemes.items()}
    sidecars = {"config.json": config_file(source, dtypes if schemes else {}), **source.sidecars()}
    return Context(dtypes, sidecars, max_shard_bytes)


def outputs(spec: TensorSpec, scheme: Scheme | None, context: Context) -> list[TensorSpec]:
    """The one tensor that ``spec`` becomes."""
    return [TensorSpec.dense(spec.name, context.dtypes[spec.name], spec.shape)]


def parts(name: str, tensor: Tensor | QuantizedTensor, context: Context) -> dict[str, Tensor]:
    """``tensor`` as it is stored."""
    if isinstance(tensor, QuantizedTensor):
        return {name: tensor.parts["data"]}
    return {name: stored_as(name, tensor, context.dtypes[name])}


def writer(path: Path, outputs: Sequence[TensorSpec], context: Context, *, overwrite: bool) -> Writer:
    """A declared writer of the folder ``path``."""
    files, index = layout(outputs, max_shard_bytes=context.max_shard_bytes)
    out = Writer(path, overwrite=overwrite)
    out.declare(files, {**context.sidecars, **index})
    return out


def dtype_of(name: str, scheme: Scheme) -> str:
    """The stored dtype of ``scheme``; :class:`UnsupportedError` for one that is no dtype."""
    if scheme.qtype not in QTYPES:
        raise UnsupportedError(f"{name}: {scheme} cannot be stored in a dense Hugging Face folder; it holds {', '.join(QTYPES)}")
    return QTYPES[scheme.qtype]


def model_dtype(config: Mapping[str, Any]) -> str:
    """The dtype that config.json names, for tensors whose stored form has none of its own."""
    word = config.get("dtype") or config.get("torch_dtype")
    return next((dtype for dtype, known in CONFIG_DTYPES.items() if known == word), "F32")


def config_file(source: Checkpoint, new_dtypes: Mapping[str, str]) -> bytes | Path:
    """config.json of the output: the source's own file where nothing changes."""
    config = {key: value for key, value in source.config.items() if key != "quantization_config"}
    if new_dtypes:
        n_elements: Counter[str] = Counter()
        for name, dtype in new_dtypes.items():
            n_elements[dtype] += source.specs[name].n_elements
        commonest, _ = n_elements.most_common(1)[0]
        keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
        config |= dict.fromkeys(keys, CONFIG_DTYPES.get(commonest))
    file = source.path / "config.json"
    return file if config == source.config and file.is_file() else (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
