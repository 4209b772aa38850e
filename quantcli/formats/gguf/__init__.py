"""GGUF, llama.cpp's single file: written straight from a checkpoint's shards, read back under Hugging Face's names."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_VERSION, GGUFValueType, GGUFWriter
from torch import Tensor

from quantcli import cuts
from quantcli.archs import Architecture, StoredNames
from quantcli.checkpoint import Checkpoint
from quantcli.errors import CheckpointError, NumericsError, RecipeError
from quantcli.formats.gguf import filetypes, importance, naming, rope, splits
from quantcli.formats.gguf import metadata as keyed
from quantcli.formats.gguf.chooser import DENSE, is_quantizable
from quantcli.formats.gguf.container import MAGIC, Field, ggml_type_of, qtype_of, tensor_spec
from quantcli.formats.gguf.filetypes import mix
from quantcli.formats.gguf.importance import Importance
from quantcli.formats.gguf.naming import architecture
from quantcli.formats.gguf.reader import GgufCheckpoint
from quantcli.formats.gguf.tokenizer import add_tokenizer
from quantcli.ops.blocks import KINDS
from quantcli.tensors import DTYPE_NAMES, DTYPES, QuantizedTensor, Scheme, TensorSpec
from quantcli.writer import Writer

__all__ = ["Context", "context", "detect", "mix", "outputs", "parts", "read", "supports", "writer"]
__all__ += ["USUAL_SCHEME", "arranged", "check_importance", "native", "why_not"]

USUAL_SCHEME = "q8_0"
"""What ``export`` codes to where the source's own codes do not fit."""

SCALED_IN = ("llama", "qwen3", "qwen3moe")
"""GGUF architectures where llama.cpp multiplies by the scale beside every matrix; in others it loads those of the MLP and forgets them."""

NOT_INHERITED = (*keyed.QUANTIZATION_KEYS, "general.alignment", "split.", "quantcli.")
"""Metadata that says how a file was made, and that a file made from it must say for itself."""


@dataclass(frozen=True)
class Context:
    """What one output needs to know. ``config``: in the usual words; ``names``: the source's → GGUF name in file order; ``dropped``: every
    other tensor → why; ``extras``: tensors no checkpoint stores; ``split_bytes``: how much tensor data a file may hold before another is
    begun, None for any; ``importance``: the source's name of a weight → the mean squares of its inputs; ``notes``: what a user should know.
    """

    arch: Architecture
    config: Mapping[str, Any]
    schemes: Mapping[str, Scheme]
    names: Mapping[str, str]
    dropped: Mapping[str, str]
    fields: Mapping[str, Field]
    extras: Mapping[str, Tensor]
    split_bytes: int | None = None
    importance: Mapping[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def detect(path: Path, config: dict | None) -> bool:
    """Is ``path`` a GGUF file, by its name or by its first bytes?"""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return path.suffix == ".gguf" or file.read(len(MAGIC)) == MAGIC


def supports(scheme: Scheme) -> bool:
    """ggml's own types: ``q4_k`` and its kin, and the dense ``f32``, ``f16``, ``bf16``."""
    return scheme.qtype in KINDS or scheme.qtype.upper() in DENSE


def why_not(scheme: Scheme, config: Mapping[str, Any]) -> str | None:
    """Why llama.cpp would run a model of ``config`` wrongly with ``scheme``; None where it would not."""
    if not scheme.get("scaled") or (gguf_arch := architecture(config).gguf_arch) in SCALED_IN:
        return None
    return f"llama.cpp does not multiply by a matrix's own scale everywhere in {gguf_arch}, only in {', '.join(SCALED_IN)}"


def suited(scheme: Scheme, config: Mapping[str, Any]) -> Scheme:
    """``scheme``, and for ``mxfp4`` and ``nvfp4`` what ggml calls by these names."""
    if scheme.qtype not in ("mxfp4", "nvfp4") or scheme.get("act"):
        return scheme
    return Scheme.of(qtype_of(scheme.qtype))


def read(path: Path) -> GgufCheckpoint:
    """The model in a GGUF file, its header read and checked."""
    return GgufCheckpoint(path)


def native(source: Checkpoint) -> Checkpoint:
    """``source`` as this format itself stores it: a GGUF file goes to a GGUF file tensor by tensor, with all its metadata, as
    llama-quantize takes it, and by way of no other names."""
    if not isinstance(source, GgufCheckpoint) or source.is_stored:
        return source
    stored = GgufCheckpoint(source.path, as_stored=True)
    stored.source = source.source
    return stored


def file_behind(source: Checkpoint) -> GgufCheckpoint | None:
    """The GGUF file that ``source`` is, or shows under other names."""
    while isinstance(source, cuts.View):
        source = source.inner
    return source if isinstance(source, GgufCheckpoint) else None


def arranged(source: Checkpoint) -> Checkpoint:
    """``source`` as GGUF cuts it: experts one by one, and what else of its architecture a file stores otherwise than a folder."""
    arch = architecture(source.config)
    return cuts.cut(cuts.unfused(source), arch.cuts)


def context(
    source: Checkpoint,
    schemes: Mapping[str, Scheme],
    metadata: Mapping[str, Any],
    *,
    mix: str | None = None,
    is_measured: bool = False,
    **options: Any,
) -> Context:
    """Everything but the tensors' data of a GGUF file made from ``source``.

    ``schemes``: as :func:`mix` chose them for the file type ``mix``, where one was asked for, and ``is_measured``; ``metadata``: written
    as ``quantcli.<key>``; ``options``: :class:`filetypes.Options`, of which ``pre_tokenizer`` and ``split_max_size`` count here. A GGUF
    source hands on its own metadata.
    """
    arch = architecture(source.config)
    config = arch.usual(source.config)
    table = naming.naming(source.specs, source.config)
    chosen = filetypes.Options.of(options)
    names = filetypes.without_layers(table.names, chosen.prune_layers)
    split_bytes = None if chosen.split_max_size is None else splits.parse_size(chosen.split_max_size)
    notes: tuple[str, ...] = ()
    if (file := file_behind(source)) is not None:
        fields, extras = inherited(file, chosen.pre_tokenizer), file.unnamed()
    else:
        check_complete(source, config, table.names.values())
        extras = extra_tensors(arch, config)
        fields, notes = describe(source, arch, config, table.names, extras, chosen.pre_tokenizer)
    said = {
        "general.quantization_version": Field(GGUFValueType.UINT32, GGML_QUANT_VERSION),
        "general.file_type": file_type(source, schemes, names, mix, {"is_measured": is_measured, **options}),
        **chosen.overrides,
    }
    weighed = Importance({})
    if chosen.imatrix is not None:
        weighed = importance.of_file(Path(chosen.imatrix), source, schemes, {name: table.names[name] for name in names}, arch)
    said |= weighed.fields
    if chosen.prune_layers:
        said[f"{arch.gguf_arch}.block_count"] = Field(GGUFValueType.UINT32, filetypes.n_layers_of(names.values()))
    fields = {key: field for key, field in fields.items() if key not in said} | said  # behind the others, as llama-quantize's
    dropped = {**table.dropped, **{name: "its layer is pruned" for name in table.names if name not in names}}
    ours = {**metadata, **({"dropped": dropped} if dropped and metadata else {})}
    fields |= {f"quantcli.{key}": keyed.plain_field(value) for key, value in ours.items()}
    return Context(arch, config, schemes, names, dropped, fields, extras, split_bytes, weighed, (*notes, *weighed.notes))


def check_importance(context: Context, needs: Collection[str], carried: Collection[str]) -> None:
    """Raise :class:`RecipeError` where a weight's type demands an importance that is not there, or one is that no pass would read.

    ``needs``: the statistics that the recipe's passes read, which then weigh the inputs themselves; ``carried``: weights that keep the
    codes of the source, for which nothing is weighed.
    """
    if needs and context.importance:
        raise RecipeError("an importance matrix weighs plain rounding; this recipe's passes learn from --dataset or --stats: leave one out")
    if not needs:
        coded = {name: scheme for name, scheme in context.schemes.items() if name not in carried}
        importance.check(context.importance, coded, context.names, context.fields["general.file_type"].value)


def file_type(
    source: Checkpoint, schemes: Mapping[str, Scheme], names: Mapping[str, str], asked: str | None, options: Mapping[str, Any]
) -> Field:
    """general.file_type: that of a GGUF source whose tensors are handed on, else of the mix that ``schemes`` are nearest to."""
    if asked is None and (file := file_behind(source)) and (stated := file.container.fields.get("general.file_type")):
        return stated
    kind = filetypes.general_file_type(schemes, names, source.specs, source.config, asked=asked, **options)
    return Field(GGUFValueType.UINT32, int(kind.number))


def check_complete(source: Checkpoint, config: Mapping, gguf_names: Collection[str]) -> None:
    """Raise :class:`CheckpointError` when an embedding or a head that the config speaks of is not there."""
    needed = ["token_embd.weight"] + ([] if config.get("tie_word_embeddings") else ["output.weight"])
    for name in needed:
        if name not in gguf_names:
            hint = "; if the head shares the embedding, config.json must say tie_word_embeddings" if name == "output.weight" else ""
            raise CheckpointError(f"{source.source}: no tensor gives GGUF's {name}{hint}")


def describe(
    source: Checkpoint,
    arch: Architecture,
    config: Mapping,
    names: Mapping[str, str],
    extras: Mapping[str, Tensor],
    pre_tokenizer: str | None,
) -> tuple[dict[str, Field], tuple[str, ...]]:
    """The metadata convert_hf_to_gguf writes for a Hugging Face folder, in its order, and notes on it. ``config``: in the usual words."""
    keys = GGUFWriter(None, arch.gguf_arch)
    hub_id = None if Path(source.source).expanduser().exists() else source.source.partition("@")[0]
    stored = [TensorSpec.dense(slot(arch, hf, name), "F32", source.specs[hf].shape) for hf, name in names.items()]
    for spec, _ in naming.whole([*stored, *(TensorSpec.dense(name, "F32", tuple(extra.shape)) for name, extra in extras.items())]):
        keys.add_tensor_info(spec.name, spec.shape, np.dtype(np.float32), spec.nbytes)
    keyed.general(keys, source.path, name=hub_id)
    keyed.hyperparameters(keys, arch, config)
    notes = add_tokenizer(keys, source.path, config["vocab_size"], pre_tokenizer)
    return keyed.fields_of(keys), notes


def slot(arch: Architecture, hf_name: str, gguf_name: str) -> str:
    """What the file's writer calls the place of HF tensor ``hf_name``: the GGUF name, numbered where it is a slice of that."""
    number = naming.slice_number(arch, hf_name, gguf_name)
    return gguf_name if number is None else naming.slice_name(gguf_name, number)


def inherited(source: GgufCheckpoint, pre_tokenizer: str | None) -> dict[str, Field]:
    """The metadata of a GGUF source, without what says how that file was made."""
    fields = {key: field for key, field in source.container.fields.items() if not key.startswith(NOT_INHERITED)}
    if pre_tokenizer is not None:
        fields["tokenizer.ggml.pre"] = Field(GGUFValueType.STRING, pre_tokenizer)
    return fields


def extra_tensors(arch: Architecture, config: Mapping) -> dict[str, Tensor]:
    """Tensors that GGUF computes from the config, such as the factors of Llama 3's rotary scaling. ``config``: in the usual words."""
    return {name: tensor for word in arch.computed for name, tensor in rope.COMPUTED[word](config).items()}


def outputs(spec: TensorSpec, scheme: Scheme | None, context: Context) -> list[TensorSpec]:
    """The file's tensor for a logical one: ``scheme``'s type, F32 for norms and biases, and the stored type for a matrix left alone; and
    the tensor of its scale where it has one for the whole matrix."""
    target = context.names.get(spec.name)
    if target is None:
        return []
    name = slot(context.arch, spec.name, target)
    stored = tensor_spec(name, stored_type(target, spec, scheme, context), spec.shape)
    if scheme is None or not scheme.get("scaled"):
        return [stored]
    return [stored, TensorSpec.dense(naming.scale_name(name), "F32", () if name != target else (1,))]  # of experts: one number each


def stored_type(target: str, spec: TensorSpec, scheme: Scheme | None, context: Context) -> str:
    if scheme is not None:
        return ggml_type_of(scheme.qtype)
    if isinstance(context.arch, StoredNames):
        return spec.dtype
    return spec.dtype if is_quantizable(target, spec.shape) and spec.dtype in DENSE else "F32"


def parts(name: str, tensor: Tensor | QuantizedTensor, context: Context) -> dict[str, Tensor]:
    """The file's tensor for the logical tensor ``name``, rows in GGUF's order: dense in its stored type, or blocks U8 [out, row_bytes].

    ``tensor``: what a pass made of it, or the dense tensor [out, in] (then its scheme in ``context`` is a dense one, or there is none).
    """
    if (target := context.names.get(name)) is None:
        return {}
    if isinstance(tensor, QuantizedTensor):
        data = tensor.parts["data" if "data" in tensor.parts else "blocks"]
    else:
        data = dense(name, target, tensor, context)
    order = context.arch.row_order(name, data.shape[0], context.config)
    place = slot(context.arch, name, target)
    found = {place: data if order is None else data[order]}
    if isinstance(tensor, QuantizedTensor) and "scale" in tensor.parts:
        found[naming.scale_name(place)] = tensor.parts["scale"].view(() if place != target else (1,))
    return found


def dense(name: str, target: str, tensor: Tensor, context: Context) -> Tensor:
    """``tensor`` in the type :func:`outputs` announced; :class:`NumericsError` when a weight is too large for float16."""
    spec = TensorSpec.dense(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
    dtype = DTYPES[stored_type(target, spec, context.schemes.get(name), context)]
    if target.endswith("_norm.weight"):
        tensor = tensor.float() + context.arch.norm_offset
    data = tensor.to(dtype)
    if dtype == torch.float16 and tensor.dtype != dtype and not data.isfinite().all():
        raise NumericsError(f"{name}: a weight of {tensor.float().abs().max():g} does not fit F16 (65504); use BF16 or F32")
    return data


def writer(path: Path, outputs: Sequence[TensorSpec], context: Context, *, overwrite: bool) -> Writer:
    """A declared writer of the file at ``path``, or of llama.cpp's shards beside it: tensors in llama-quantize's order, the computed ones
    already put. A tensor of several slices has a slot for each, so that experts are written one by one as they come.
    """
    extras = [tensor_spec(name, "F32", tuple(tensor.shape)) for name, tensor in context.extras.items()]
    tensors = naming.whole([*outputs, *extras])
    slices = {spec.name: parts_of for spec, parts_of in tensors}
    files = splits.layouts(path, context.fields, [spec for spec, _ in tensors], context.split_bytes, slices=slices)
    out = Writer(path.with_name(files[0].name), overwrite=overwrite, folder=False)
    try:
        out.declare(files)
        for name, tensor in context.extras.items():
            out.put(name, tensor)
    except BaseException:
        out.abort()
        raise
    return out
