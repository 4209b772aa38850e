"""GGUF, llama.cpp's single file: written straight from a checkpoint's shards, read back under Hugging Face's names."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_VERSION, GGUFValueType, GGUFWriter
from torch import Tensor
from typing_extensions import override

from quantcli.archs import Architecture, Cut, StoredNames
from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.json_files import shown
from quantcli.errors import CheckpointError, NumericsError
from quantcli.formats import DEFAULTS, Format, OutputLayout, Request
from quantcli.formats.gguf.file import splits
from quantcli.formats.gguf.file.container import MAGIC, Field, ggml_type_of, qtype_of, tensor_spec
from quantcli.formats.gguf.imatrix import importance as weighing
from quantcli.formats.gguf.model import losses, naming, rope
from quantcli.formats.gguf.model import metadata as keyed
from quantcli.formats.gguf.model.naming import architecture
from quantcli.formats.gguf.model.pooling import add_pooling
from quantcli.formats.gguf.read import GgufCheckpoint
from quantcli.formats.gguf.tokens.tokenizer import add_tokenizer
from quantcli.formats.gguf.tokens.vocabulary import twice
from quantcli.formats.gguf.types import filetypes
from quantcli.formats.gguf.types.chooser import DENSE, is_quantizable
from quantcli.importance import Importance, ImportanceSource
from quantcli.ops.blocks import KINDS
from quantcli.output.journal import Run
from quantcli.output.writer import Writer
from quantcli.tensors import DTYPE_NAMES, DTYPES, QuantizedTensor, Scheme, TensorSpec

SCALED_IN = ("llama", "qwen3", "qwen3moe")
"""GGUF architectures where llama.cpp multiplies by the scale of every matrix; in others it loads those of the MLP and forgets them."""

NOT_INHERITED = (*keyed.QUANTIZATION_KEYS, "general.alignment", "split.", "quantcli.")
"""Metadata that records how a file was made; a file made from it gets its own."""


@dataclass(frozen=True, kw_only=True)
class GgufLayout(OutputLayout):
    """A model in a GGUF file.

    ``config``: with the usual keys; ``names``: the source's → GGUF name in file order; ``unpruned``: the same as they are where no layer is
    left out; ``extras``: tensors no checkpoint stores; ``fields``: the metadata but for how the file was made; ``quantization``: the keys
    of its types; ``n_layers``: written as block_count where layers were pruned; ``split_bytes``: how much tensor data a file may hold
    before another is begun, None for any.
    """

    arch: Architecture
    config: Mapping[str, Any]
    schemes: Mapping[str, Scheme]
    names: Mapping[str, str]
    unpruned: Mapping[str, str]
    fields: Mapping[str, Field]
    quantization: Mapping[str, Field]
    extras: Mapping[str, Tensor]
    n_layers: int | None = None
    split_bytes: int | None = None

    @override
    def outputs(self, spec: TensorSpec, scheme: Scheme | None) -> list[TensorSpec]:
        """The file's tensor for a logical one: ``scheme``'s type, F32 for norms and biases, and the stored type for a matrix left alone;
        and the tensor of its scale where it has one for the whole matrix."""
        target = self.names.get(spec.name)
        if target is None:
            return []
        name = slot(self.arch, spec.name, target)
        stored = tensor_spec(name, self.stored_type(target, spec, scheme), spec.shape)
        if scheme is None or not scheme.get("scaled"):
            return [stored]
        return [stored, TensorSpec.dense(naming.scale_name(name), "F32", () if name != target else (1,))]  # of experts: one number each

    def stored_type(self, target: str, spec: TensorSpec, scheme: Scheme | None) -> str:
        """The type of the file's tensor ``target``."""
        if scheme is not None:
            return ggml_type_of(scheme.qtype)
        if isinstance(self.arch, StoredNames):
            return spec.dtype
        return spec.dtype if is_quantizable(target, spec.shape) and spec.dtype in DENSE else "F32"

    @override
    def parts(self, name: str, tensor: Tensor | QuantizedTensor) -> dict[str, Tensor]:
        """The file's tensor for the logical tensor ``name``, rows in GGUF's order: dense in its stored type, or blocks U8 [out, row_bytes].

        ``tensor``: what a pass made of it, or the dense tensor [out, in] (then its scheme in ``schemes`` is a dense one, or there is none).
        """
        if (target := self.names.get(name)) is None:
            return {}
        if isinstance(tensor, QuantizedTensor):
            data = tensor.parts["data" if "data" in tensor.parts else "blocks"]
        else:
            data = self.dense(name, target, tensor)
        order = self.arch.row_order(name, data.shape[0], self.config)
        place = slot(self.arch, name, target)
        found = {place: data if order is None else data[order]}
        if isinstance(tensor, QuantizedTensor) and "scale" in tensor.parts:
            found[naming.scale_name(place)] = tensor.parts["scale"].view(() if place != target else (1,))
        return found

    def dense(self, name: str, target: str, tensor: Tensor) -> Tensor:
        """``tensor`` in the type :meth:`outputs` announced; :class:`NumericsError` when a weight is too large for float16."""
        spec = TensorSpec.dense(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
        dtype = DTYPES[self.stored_type(target, spec, self.schemes.get(name))]
        if target.endswith("_norm.weight"):
            tensor = tensor.float() + self.arch.norm_offset
        data = tensor.to(dtype)
        if dtype == torch.float16 and tensor.dtype != dtype and not data.isfinite().all():
            raise NumericsError(f"{name}: a weight of {tensor.float().abs().max():g} does not fit F16 (65504); use BF16 or F32")
        return data

    @override
    def importance(self, matrix: ImportanceSource, source: Checkpoint, schemes: Mapping[str, Scheme]) -> Importance:
        return weighing.of(matrix, source, schemes, self.unpruned, self.arch)

    @override
    def check_importance(self, importance: Collection[str], kept: Collection[str]) -> None:
        quantized = {name: scheme for name, scheme in self.schemes.items() if name not in kept}
        weighing.check(importance, quantized, self.names, self.quantization["general.file_type"].value)

    def metadata(self, record: Mapping[str, Any], importance: Importance | None) -> dict[str, Field]:
        """All of the file's keys: ``fields``, behind them as llama-quantize has them those of quantization, and ``quantcli.*``."""
        made = dict(self.quantization) | ({} if importance is None else weighing.described(importance))
        if self.n_layers is not None:
            made[f"{self.arch.gguf_arch}.block_count"] = Field(GGUFValueType.UINT32, self.n_layers)
        ours = {**record, **({"dropped": self.dropped} if self.dropped and record else {})}
        fields = {key: field for key, field in self.fields.items() if key not in made} | made
        return fields | {f"quantcli.{key}": keyed.plain_field(value) for key, value in ours.items()}

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
        """A declared writer of the file at ``path``, or of llama.cpp's shards next to it: tensors in llama-quantize's order, the computed
        ones already put. A tensor of several slices has a slot for each, so that experts are written one by one as they come.
        """
        extras = [tensor_spec(name, "F32", tuple(tensor.shape)) for name, tensor in self.extras.items()]
        tensors = naming.whole([*outputs, *extras])
        slices = {spec.name: parts_of for spec, parts_of in tensors}
        fields = self.metadata(record, importance)
        files = splits.layouts(path, fields, [spec for spec, _ in tensors], self.split_bytes, slices=slices)
        out = Writer(path.with_name(files[0].name), overwrite=overwrite, folder=False, run=run)
        try:
            out.declare(files)
            for name, tensor in self.extras.items():
                if not out.has(name):
                    out.put(name, tensor)
        except BaseException:
            out.abort(keep=bool(out.steps))
            raise
        return out


class Gguf(Format):
    """GGUF files."""

    usual_scheme = "q8_0"
    has_own_names = True
    has_mixes = True

    @override
    def detect(self, path: Path, config: dict[str, Any] | None) -> bool:
        """Is ``path`` a GGUF file, by its name or by its first bytes?"""
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return path.suffix == ".gguf" or file.read(len(MAGIC)) == MAGIC

    @override
    def read(self, path: Path) -> GgufCheckpoint:
        return GgufCheckpoint(path)

    @override
    def supports(self, scheme: Scheme) -> bool:
        """ggml's own types: ``q4_k`` and its kin, and the dense ``f32``, ``f16``, ``bf16``."""
        return scheme.qtype in KINDS or scheme.qtype.upper() in DENSE

    @override
    def why_not(self, scheme: Scheme, config: Mapping[str, Any]) -> str | None:
        if not scheme.get("scaled") or (gguf_arch := architecture(config).gguf_arch) in SCALED_IN:
            return None
        return f"llama.cpp does not multiply by a matrix's own scale everywhere in {gguf_arch}, only in {', '.join(SCALED_IN)}"

    @override
    def suited(self, scheme: Scheme, config: Mapping[str, Any]) -> Scheme:
        """``scheme``, and for ``mxfp4`` and ``nvfp4`` what ggml calls by these names."""
        if scheme.qtype not in ("mxfp4", "nvfp4") or scheme.get("act"):
            return scheme
        return Scheme.of(qtype_of(scheme.qtype))

    @override
    def cuts(self, config: Mapping[str, Any]) -> Mapping[str, Cut]:
        return architecture(config).cuts

    @override
    def as_stored(self, source: Checkpoint) -> Checkpoint:
        """A GGUF file goes to a GGUF file tensor by tensor, with all its metadata, as llama-quantize takes it, by way of no other names."""
        if source.kind != "gguf" or "gguf_architecture" in source.config:
            return source
        stored = GgufCheckpoint(source.path, as_stored=True)
        stored.source = source.source
        return stored

    @override
    def mix(self, name: str, specs: Mapping[str, TensorSpec], config: Mapping[str, Any], request: Request) -> dict[str, Scheme]:
        return filetypes.mix(name, specs, config, is_weighed=request.is_measured or request.is_weighed, options=request.options)

    @override
    def check_options(self, options: Mapping[str, Any]) -> None:
        filetypes.Options.of(options)

    @override
    def layout(self, source: Checkpoint, schemes: Mapping[str, Scheme], request: Request = DEFAULTS) -> GgufLayout:
        """Everything but the tensors' data of a GGUF file made from ``source``; a GGUF source hands on its own metadata.

        ``schemes``: as :meth:`mix` chose them for the file type ``request.mix``, where one was asked for.
        """
        arch = architecture(source.config)
        config = arch.usual(source.config)
        table = naming.naming(source.specs, source.config)
        chosen = filetypes.Options.of(request.options)
        names = filetypes.without_layers(table.names, chosen.prune_layers)
        notes: tuple[str, ...] = ()
        if source.kind == "gguf":
            fields, extras = inherited(source.file_metadata, chosen.pre_tokenizer), source.unnamed()
            notes = notes_on_tokens(fields)
        else:
            check_complete(source, config, table.names.values())
            extras = extra_tensors(arch, config)
            fields, notes = describe(source, arch, config, table.names, extras, chosen.pre_tokenizer)
        quantization = {
            "general.quantization_version": Field(GGUFValueType.UINT32, GGML_QUANT_VERSION),
            "general.file_type": file_type(source, schemes, names, request),
            **chosen.overrides,
        }
        return GgufLayout(
            arch=arch,
            config=config,
            schemes=schemes,
            names=names,
            unpruned={name: table.names[name] for name in names},
            dropped={**table.dropped, **{name: "its layer is pruned" for name in table.names if name not in names}},
            fields=fields,
            quantization=quantization,
            extras=extras,
            n_layers=filetypes.n_layers_of(names.values()) if chosen.prune_layers else None,
            split_bytes=None if chosen.split_max_size is None else splits.parse_size(chosen.split_max_size),
            notes=notes,
        )


FORMAT = Gguf()


def file_type(source: Checkpoint, schemes: Mapping[str, Scheme], names: Mapping[str, str], request: Request) -> Field:
    """general.file_type: that of a GGUF source whose tensors are handed on, else of the mix that ``schemes`` are nearest to."""
    stated: Field | None = source.file_metadata.get("general.file_type")
    if request.mix is None and stated:
        return stated
    is_weighed = request.is_measured or request.is_weighed
    kind = filetypes.general_file_type(
        schemes, names, source.specs, source.config, asked=request.mix, is_weighed=is_weighed, options=request.options
    )
    return Field(GGUFValueType.UINT32, int(kind.number))


def check_complete(source: Checkpoint, config: Mapping[str, Any], gguf_names: Collection[str]) -> None:
    """Raise :class:`CheckpointError` when an embedding or a head that the config declares is missing."""
    needed = ["token_embd.weight"] + ([] if config.get("tie_word_embeddings") else ["output.weight"])
    for name in needed:
        if name not in gguf_names:
            hint = "; if the head shares the embedding, config.json must have tie_word_embeddings" if name == "output.weight" else ""
            raise CheckpointError(f"{source.source}: no tensor gives GGUF's {name}{hint}")


def describe(
    source: Checkpoint,
    arch: Architecture,
    config: Mapping[str, Any],
    names: Mapping[str, str],
    extras: Mapping[str, Tensor],
    pre_tokenizer: str | None,
) -> tuple[dict[str, Field], tuple[str, ...]]:
    """The metadata convert_hf_to_gguf writes for a Hugging Face folder, in its order, and notes on it. ``config``: with the usual keys."""
    keys = GGUFWriter(None, arch.gguf_arch)
    hub_id = None if Path(source.source).expanduser().exists() else source.source.partition("@")[0]
    stored = [TensorSpec.dense(slot(arch, hf, name), "F32", source.specs[hf].shape) for hf, name in names.items()]
    for spec, _ in naming.whole([*stored, *(TensorSpec.dense(name, "F32", tuple(extra.shape)) for name, extra in extras.items())]):
        keys.add_tensor_info(spec.name, spec.shape, np.dtype(np.float32), spec.nbytes)
    keyed.general(keys, source.path, name=hub_id)
    keyed.hyperparameters(keys, arch, config)
    notes = add_pooling(keys, source.path)
    notes += add_tokenizer(keys, source.path, config["vocab_size"], pre_tokenizer)
    return keyed.fields_of(keys), (*losses.told(arch, source.config), *notes)


def slot(arch: Architecture, hf_name: str, gguf_name: str) -> str:
    """What the file's writer calls the place of HF tensor ``hf_name``: the GGUF name, numbered where it is a slice of that."""
    number = naming.slice_number(arch, hf_name, gguf_name)
    return gguf_name if number is None else naming.slice_name(gguf_name, number)


def inherited(metadata: Mapping[str, Field], pre_tokenizer: str | None) -> dict[str, Field]:
    """The ``metadata`` of a GGUF source, without the keys that record how that file was made."""
    fields = {key: field for key, field in metadata.items() if not key.startswith(NOT_INHERITED)}
    if pre_tokenizer is not None:
        fields["tokenizer.ggml.pre"] = Field(GGUFValueType.STRING, pre_tokenizer)
    return fields


def notes_on_tokens(fields: Mapping[str, Field]) -> tuple[str, ...]:
    """A note where a vocabulary that is handed on has a token twice."""
    tokens = fields["tokenizer.ggml.tokens"].value if "tokenizer.ggml.tokens" in fields else ()
    if (found := twice(list(tokens))) is None:
        return ()
    token, one, other = found
    return (
        f"the source's vocabulary has {shown(token)} twice, as {one} and {other}, and goes over as it is: llama.cpp loads no such file",
    )


def extra_tensors(arch: Architecture, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors that GGUF computes from the config, such as the factors of Llama 3's rotary scaling. ``config``: with the usual keys."""
    return {name: tensor for table in arch.computed for name, tensor in rope.COMPUTED[table](config).items()}
