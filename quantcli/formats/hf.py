"""A Hugging Face folder of dense weights: safetensors in f32, f16 or bf16, next to config.json and the tokenizer's files.

Written: the tensors of the source under their names on disk (a tied lm_head that the source leaves out stays out), in their stored dtype
unless a scheme (``f32``, ``f16``, ``bf16``) gives another; config.json, with ``dtype`` adjusted then and any quantization of the source
removed; everything small that is not weights, as it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from typing_extensions import override

from quantcli.checkpoint.checkpoint import Checkpoint, read_config
from quantcli.checkpoint.shards import Shards, open_folder
from quantcli.errors import UnsupportedError
from quantcli.formats import DEFAULTS, Format, OutputLayout, Request
from quantcli.formats.shared.folder import CONFIG_DTYPES, DENSE_QTYPES, FolderLayout, as_json, dense_dtypes, shard_bytes
from quantcli.tensors import Scheme


class HfCheckpoint(Checkpoint):
    """A folder of dense tensors."""

    def __init__(self, path: Path, config: dict[str, Any], shards: Shards) -> None:
        super().__init__(path, kind="hf", config=config, specs=shards.specs, notes=shards.notes)
        self._shards = shards

    @override
    def load(self, name: str) -> Tensor:
        return self._shards.read(name)


class Hf(Format):
    """Dense weights in a Hugging Face folder; ``export`` to it decodes whatever is quantized."""

    @override
    def detect(self, path: Path, config: dict[str, Any] | None) -> bool:
        """A folder whose config.json declares no quantization."""
        return config is not None and not config.get("quantization_config")

    @override
    def read(self, path: Path) -> HfCheckpoint:
        return HfCheckpoint(path, read_config(path), open_folder(path))

    @override
    def supports(self, scheme: Scheme) -> bool:
        return scheme.qtype in DENSE_QTYPES

    @override
    def layout(self, source: Checkpoint, schemes: Mapping[str, Scheme], request: Request = DEFAULTS) -> OutputLayout:
        if not source.path.is_dir():
            raise UnsupportedError(
                f"{source.source}: a Hugging Face folder cannot be made from a single file, which lacks the tokenizer's files"
            )
        dtypes = dense_dtypes(source) | {name: dtype_of(name, scheme) for name, scheme in schemes.items()}
        return DenseLayout(
            dtypes=dtypes,
            sidecars=source.sidecars().files,
            max_shard_bytes=shard_bytes(request),
            config=config_file(source, dtypes if schemes else {}),
        )


@dataclass(frozen=True, kw_only=True)
class DenseLayout(FolderLayout):
    """A folder of plain weights. ``config``: its config.json, or the source's own where nothing changes."""

    config: bytes | Path

    @override
    def config_files(self, record: Mapping[str, Any]) -> dict[str, bytes | Path]:
        return {"config.json": self.config}


FORMAT = Hf()


def dtype_of(name: str, scheme: Scheme) -> str:
    """The stored dtype of ``scheme``; :class:`UnsupportedError` for one that is no dtype."""
    if scheme.qtype not in DENSE_QTYPES:
        raise UnsupportedError(f"{name}: {scheme} cannot be stored in a dense Hugging Face folder; it holds {', '.join(DENSE_QTYPES)}")
    return DENSE_QTYPES[scheme.qtype]


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
    return file if file.is_file() and config == read_config(source.path) else as_json(config)
