"""Checkpoints: opened by their headers, tensors read on demand, from a folder, a Hub id or a file, in any dialect of ``formats/``."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from quantcli import qtypes
from quantcli.checkpoint.hub import HUB_ID, download
from quantcli.checkpoint.json_files import read_json, shown
from quantcli.checkpoint.locations import Location, first_bytes
from quantcli.checkpoint.shards import open_folder
from quantcli.checkpoint.side_files import SideFiles, side_files
from quantcli.errors import CheckpointError, QuantcliError, UnsupportedError
from quantcli.tensors import DTYPES, QuantizedTensor, Scheme, TensorSpec

RECORD = "quantcli.json"
"""The file in an output folder that records how quantcli made it."""

FORMAT_FILES = ("config.json", "quantize_config.json", "quant_config.json", "hf_quant_config.json", RECORD, "trainer_state.json")
"""Written by the output's own format, or a record of how *this* folder was made: not copied to another."""

FINGERPRINT_BYTES = 1024
"""What a fingerprint reads of each tensor: hundreds of a matrix's weights, some of which change with any training."""

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")

NO_PICKLE = (
    "is a pickle file, and pickle runs whatever code the file carries when it is read. Convert it to safetensors where you trust it: "
    "transformers' AutoModelForCausalLM.from_pretrained(SOURCE).save_pretrained(FOLDER)"
)


class Checkpoint(ABC):
    """What every format's reader returns. A context manager; reads are thread-safe.

    ``source``: what the user named; ``path``: where it lies; ``kind``: the format module that reads it; ``config``: HF's config.json;
    ``specs``: the logical tensors under their names on disk, with dense shapes and the bytes of all their parts; ``schemes``: those of
    them that are quantized; ``quantization``: the format's own description; ``notes``: contradictions between metadata and tensors;
    ``kv_cache``: attention module → how its engine stores keys and values (``tensors.KV_CACHES``), by scales that the file has.
    """

    def __init__(
        self,
        path: Path,
        *,
        kind: str,
        config: dict[str, Any],
        specs: Mapping[str, TensorSpec],
        schemes: Mapping[str, Scheme] | None = None,
        quantization: dict[str, Any] | None = None,
        notes: Sequence[str] = (),
        kv_cache: Mapping[str, str] | None = None,
    ) -> None:
        self.source = str(path)
        self.path = path
        self.kind = kind
        self.config = config
        self.specs = dict(specs)
        self.schemes = dict(schemes or {})
        self.quantization = quantization
        self.notes = tuple(notes)
        self.kv_cache = dict(kv_cache or {})
        self._side_files: SideFiles | None = None

    def read(self, name: str) -> Tensor:
        """The tensor ``name``: its stored dtype when dense, float32 as its engine decodes it when quantized."""
        if name in self.schemes:
            return qtypes.of(self.schemes[name].qtype).unpack(self.quantized(name))
        self._check(name)
        return self.load(name)

    def quantized(self, name: str) -> QuantizedTensor:
        """The codes of a quantized tensor as stored in the file, in the parts of its qtype."""
        self._check(name)
        if name not in self.schemes and not self.is_opaque(name):
            raise CheckpointError(f"{self.source}: {name} is not quantized")
        return self.load_quantized(name)

    def is_opaque(self, name: str) -> bool:
        """Whether the tensor is of a type that quantcli cannot decode: :meth:`quantized` gives its bytes, in a scheme without a qtype."""
        return name not in self.schemes and self.specs[name].dtype not in DTYPES

    @abstractmethod
    def load(self, name: str) -> Tensor:
        """A dense tensor of ``specs`` in its stored dtype."""

    def load_quantized(self, name: str) -> QuantizedTensor:
        """The parts of a tensor of ``schemes``, or of an opaque one; not needed in a format that has neither."""
        raise UnsupportedError(f"{self.kind} holds no quantized tensors")

    def cache_scales(self, attention: str) -> tuple[Tensor, Tensor]:
        """The scales of keys and of values of a module in ``kv_cache``: float32 [1] or [heads]."""
        raise UnsupportedError(f"{self.kind} holds no scales of a key-value cache")

    @property
    def file_metadata(self) -> Mapping[str, Any]:
        """Key → value of the metadata of a single-file format, in the file's order and under that format's own keys; {} for a folder."""
        return {}

    def unnamed(self) -> dict[str, Tensor]:
        """Tensors of the file that ``specs`` leaves out because the config holds the same values: by the file's own names."""
        return {}

    @property
    def provenance(self) -> Mapping[str, Any]:
        """How quantcli made this model: the content of quantcli.json, or of a file's ``quantcli.*`` keys; {} without any."""
        record = self.path / RECORD
        known = read_json(record, unique=False) if record.is_file() else None
        return known if isinstance(known, dict) else {}

    def locations(self) -> Iterable[Location]:
        """Where the tensors of the file or files lie, by their own names; overridden by formats other than a folder of safetensors."""
        return open_folder(self.path).locations.values()

    def fingerprint(self) -> str:
        """sha256 that differs between fine-tunes of one model, though all shapes are equal.

        Of every stored tensor's name, dtype, shape and first KiB: about a megabyte, where a checksum of a large model would take minutes.
        A copy has the same one, even in other shards or with another config.json; weights in another dtype have another.
        """
        return fingerprint(self.locations())

    def sidecars(self) -> SideFiles:
        """The small files beside the weights that any copy of the model needs: tokenizer, templates, modules, code, licence, model card.

        Raises :class:`UnsupportedError` for a source that is a single file.
        """
        if not self.path.is_dir():
            raise UnsupportedError(
                f"{self.source}: a single file lacks the tokenizer's files of a Hugging Face folder; start from the folder"
            )
        if self._side_files is None:
            self._side_files = side_files(self.path, FORMAT_FILES, {location.path for location in self.locations()})
        return self._side_files

    def close(self) -> None:
        """Release what the reader holds open."""
        return

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _check(self, name: str) -> None:
        if name not in self.specs:
            raise CheckpointError(f"{self.source}: no tensor {name} among its {len(self.specs)}")


def fingerprint(locations: Iterable[Location]) -> str:
    """sha256 of the name, dtype, shape and first KiB of each tensor."""
    digest = hashlib.sha256()
    for location in sorted(locations, key=lambda location: location.spec.name):
        spec = location.spec
        digest.update(json.dumps([spec.name, spec.dtype, spec.shape]).encode())
        digest.update(first_bytes(location, FINGERPRINT_BYTES))
    return digest.hexdigest()


def locate(source: str) -> Path:
    """The folder or file that ``source`` names; a Hub id is downloaded, or taken from the cache when there is no network."""
    path = Path(source).expanduser()
    if path.is_file():
        check_file(path)
        return path
    if path.is_dir():
        check_folder(path)
        return path
    match = HUB_ID.fullmatch(source)
    if not match:
        raise CheckpointError(f"{source}: no such file or folder, and not a Hub id (org/name or org/name@revision)")
    folder = download(match["repo"], match["revision"])
    check_folder(folder)
    return folder


def check_file(path: Path) -> None:
    if path.suffix in PICKLE_SUFFIXES:
        raise CheckpointError(f"{path}: {NO_PICKLE}")
    if path.suffix in (".safetensors", ".json"):
        raise CheckpointError(f"{path}: give the folder it lies in, {path.parent}: a model is its weights and its config.json")


def check_folder(path: Path) -> None:
    """Refuse a folder whose only weights are pickles, or GGUF files, of which one must be named."""
    files = sorted(f.name for f in path.iterdir() if f.is_file())
    if any(name.endswith((".safetensors", ".safetensors.index.json")) and not name.startswith("adapter_") for name in files):
        return
    check_no_adapter(path)
    if pickles := [name for name in files if name.endswith((*PICKLE_SUFFIXES, ".bin.index.json")) and name != "training_args.bin"]:
        raise CheckpointError(f"{path / pickles[0]}: {NO_PICKLE}")
    if ggufs := [name for name in files if name.endswith(".gguf")]:
        raise CheckpointError(f"{path}: holds {len(ggufs)} .gguf files; name one of them: {path / ggufs[0]}")


ADAPTER_CONFIG = "adapter_config.json"


def check_no_adapter(folder: Path) -> None:
    """Refuse a folder that holds an adapter (LoRA) and no model of its own."""
    if (folder / ADAPTER_CONFIG).is_file():
        base = adapter_of(folder) or "the model that it was trained on"
        raise CheckpointError(
            f"{folder}: an adapter (LoRA), not a model: its base is {base}; merge it first (peft: "
            f"AutoPeftModelForCausalLM.from_pretrained({str(folder)!r}).merge_and_unload().save_pretrained(FOLDER))"
        )


def adapter_of(folder: Path) -> str | None:
    """The model that the adapter in ``folder`` belongs to, as it says itself; None where there is none, or it does not say."""
    path = folder / ADAPTER_CONFIG
    words = read_json(path, unique=False) if path.is_file() else None
    base = words.get("base_model_name_or_path") if isinstance(words, dict) else None
    return base if isinstance(base, str) and base else None


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of ``folder``."""
    path = folder / "config.json"
    if not path.is_file():
        check_no_adapter(folder)
        raise CheckpointError(f"{path}: missing; a Hugging Face model folder has one (is this the right folder, the download complete?)")
    # Duplicate keys in a config are harmless: every other reader takes the last one.
    config = read_json(path, unique=False)
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: is not a JSON object")
    _check_kinds(path, config)
    return config


def _check_kinds(path: Path, config: Mapping[str, Any]) -> None:
    """Raise :class:`CheckpointError` where a word by which a model's classes are found has a value of another kind."""
    names = config.get("architectures")
    expected = {
        "model_type": ("a text", isinstance(config.get("model_type"), str | None)),
        "architectures": ("a list of texts", names is None or (isinstance(names, list) and all(isinstance(x, str) for x in names))),
        "text_config": ("an object", isinstance(config.get("text_config"), dict | None)),
    }
    for word, (kind, is_sound) in expected.items():
        if not is_sound:
            raise CheckpointError(f"{path}: {word} is {shown(config[word])} where {kind} belongs; take the model's own config.json")


def unread(path: Path, config: dict[str, Any] | None, formats: Sequence[str]) -> QuantcliError:
    """The error for a source that none of ``formats`` claims."""
    if config is None:
        return CheckpointError(f"{path}: no model file that quantcli reads (a folder, or a .gguf file)")
    quant_config = config.get("quantization_config")
    if (
        path.is_dir()
        and isinstance(quant_config, dict)
        and {"group_size", "bits"} <= quant_config.keys()
        and "quant_method" not in quant_config
    ):
        coded = next((name for name in open_folder(path).locations if name.endswith(".scales")), "its weights")
        return UnsupportedError(
            f"{path}: {coded}: quantized by MLX, whose codes quantcli does not read; fuse or convert the model with --de-quantize "
            "(mlx_lm.fuse, mlx_lm.convert)"
        )
    method = quant_config.get("quant_method") if isinstance(quant_config, dict) else quant_config
    return UnsupportedError(f"{path}: is quantized by {shown(method)}; quantcli reads {', '.join(formats)}")
