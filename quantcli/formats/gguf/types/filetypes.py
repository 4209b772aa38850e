"""A GGUF file type applied to a model: which of its tensors gets which type, and the options by which a user changes that."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
from gguf import GGUFValueType, GGUFWriter

from quantcli.errors import RecipeError
from quantcli.formats.gguf.file.container import BLOCKS, Field, ggml_type_of, qtype_of
from quantcli.formats.gguf.model import metadata as keyed
from quantcli.formats.gguf.model.naming import architecture, file_order, gguf_names, slices_of
from quantcli.formats.gguf.types.chooser import DENSE, EMBEDDINGS, Chooser, fit, is_quantizable
from quantcli.formats.gguf.types.mixes import CONVERTED, TABLE, FileType, Model
from quantcli.ops.blocks import KINDS
from quantcli.tensors import Scheme, TensorSpec

NO_OPTIONS: Mapping[str, Any] = MappingProxyType({})

ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
WRITABLE = (*DENSE, *map(ggml_type_of, KINDS))
"""The types of tensors that quantcli writes."""

FILE_TYPES: dict[str, FileType] = {name: kind for name, kind in TABLE.items() if kind.types <= set(WRITABLE)}
"""Those of llama-quantize's whose tensors are all of a type that quantcli writes."""


@dataclass(frozen=True)
class Options:
    """Options for a GGUF file, under llama-quantize's names; a recipe's ``format_options``.

    ``tensor_type``: "REGEX=TYPE" on GGUF names, the first match wins; ``prune_layers``: numbers of layers to leave out; ``override_kv``:
    "KEY=TYPE:VALUE" with the types int, float, bool and str; ``pre_tokenizer``: replaces the name found from tokenizer.json;
    ``split_max_size``: of the files, when there may be several.
    """

    pure: bool = False
    tensor_type: Sequence[str] = ()
    output_tensor_type: str | None = None
    token_embedding_type: str | None = None
    leave_output_tensor: bool = False
    prune_layers: Sequence[int] = ()
    override_kv: Sequence[str] = ()
    pre_tokenizer: str | None = None
    split_max_size: str | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Options:
        """The options by name; :class:`RecipeError` for one that GGUF does not have."""
        known = [f.name for f in fields(cls)]
        if "imatrix" in given:
            raise RecipeError("an importance matrix is no option of the format; give it as --imatrix FILE, or as the data of a call")
        if unknown := sorted(given.keys() - set(known)):
            raise RecipeError(f"the gguf format has no option '{unknown[0]}'; there are: {', '.join(known)}")
        options = cls(**given)
        if wrong := [n for n in options.prune_layers if type(n) is not int or n < 0]:
            raise RecipeError(f"prune_layers takes numbers of layers, not {wrong[0]!r}")
        return options

    def manual(self, gguf_name: str) -> str | None:
        """The type that ``tensor_type`` gives a tensor, or None. As for llama-quantize the case of letters does not count."""
        for rule in self.tensor_type:
            pattern, _, ggml_type = rule.rpartition("=")
            try:
                if re.search(pattern, gguf_name, re.IGNORECASE):
                    return ggml_type.upper()
            except re.error as error:
                raise RecipeError(f"--tensor-type {rule}: expected REGEX=TYPE: {error}") from error
        return None

    @cached_property
    def overrides(self) -> dict[str, Field]:
        """``override_kv`` as metadata: integers become UINT32, as for llama-quantize."""
        return dict(_override(text) for text in self.override_kv)


def _override(text: str) -> tuple[str, Field]:
    match = re.fullmatch(r"([^=]{1,127})=(int|float|bool|str):(.*)", text, re.DOTALL)
    try:
        if match and match[2] == "int":
            return match[1], Field(GGUFValueType.UINT32, int(np.array(abs(int(match[3])), np.uint32)))
        if match and match[2] == "float":
            return match[1], Field(GGUFValueType.FLOAT32, float(match[3]))
        if match and match[2] == "bool":
            return match[1], Field(GGUFValueType.BOOL, {"true": True, "false": False}[match[3]])
        if match:
            return match[1], Field(GGUFValueType.STRING, match[3])
    except (ValueError, KeyError, OverflowError):
        pass  # worded below
    raise RecipeError(f"--override-kv {text}: expected KEY=TYPE:VALUE with a TYPE of int, float, bool (true or false) or str")


def file_type(name: str) -> FileType:
    """The file type called ``name`` (any case; Q4_K means Q4_K_M as for llama-quantize)."""
    known = FILE_TYPES.get(ALIASES.get(name.upper(), name.upper()))
    if known is None:
        raise RecipeError(f"'{name}' is no GGUF file type quantcli writes; there are: {', '.join(FILE_TYPES)}")
    return known


def without_layers(names: Mapping[str, str], layers: Collection[int]) -> dict[str, str]:
    """``names`` (HF → GGUF) without the tensors of these layers, those behind them closed up; :class:`RecipeError` for one not there."""
    n_layers = n_layers_of(names.values())
    if missing := sorted(set(layers) - set(range(n_layers))):
        raise RecipeError(f"--prune-layers {missing[0]}: the model has layers 0 … {n_layers - 1}")
    kept: dict[str, str] = {}
    for hf, target in names.items():
        layer = file_order(target)[0]
        if layer not in layers:
            kept[hf] = target.replace(f"blk.{layer}.", f"blk.{layer - sum(n < layer for n in layers)}.", 1)
    return kept


def n_layers_of(gguf_names: Iterable[str]) -> int:
    """How many layers tensors of these names make."""
    return 1 + max((file_order(name)[0] for name in gguf_names), default=-1)


def mix(
    name: str,
    specs: Mapping[str, TensorSpec],
    config: Mapping[str, Any],
    *,
    is_weighed: bool = False,
    options: Mapping[str, Any] = NO_OPTIONS,
) -> dict[str, Scheme]:
    """The scheme of every matrix in a file of type ``name``: HF name → scheme. What is missing here is kept dense.

    ``specs``: the model's tensors by HF name; ``is_weighed``: rounding knows which inputs count, by an importance matrix or by passes that
    read statistics, and llama-quantize's rules then choose otherwise; ``options``: :class:`Options`. Raises :class:`RecipeError` for a
    type that quantcli cannot write, and where a user's own type does not fit a row.
    """
    kind, parsed = file_type(name), Options.of(options)
    names = without_layers(gguf_names(specs, config), parsed.prune_layers)
    shapes = shapes_of(names, specs)
    chosen = choose_types(kind, parsed, model_of(config, shapes, parsed.overrides), shapes, is_weighed=is_weighed)
    return _schemes(chosen, names, specs)


def general_file_type(
    schemes: Mapping[str, Scheme],
    names: Mapping[str, str],
    specs: Mapping[str, TensorSpec],
    config: Mapping[str, Any],
    *,
    asked: str | None = None,
    is_weighed: bool = False,
    options: Mapping[str, Any] = NO_OPTIONS,
) -> FileType:
    """The value of general.file_type: the file type that was ``asked`` for, if with ``options`` it gave these ``schemes``, as it does
    but for rules and kept codes; else the one whose own mix gives the most weights the type they have.

    ``names``: HF → GGUF name of the file's tensors; the rest as for :func:`mix`.
    """
    parsed = Options.of(options)
    shapes = shapes_of(names, specs)
    if asked is not None and asked in FILE_TYPES:
        model = model_of(config, shapes, parsed.overrides)
        chosen = choose_types(FILE_TYPES[asked], parsed, model, shapes, is_weighed=is_weighed)
        if _schemes(chosen, names, specs) == schemes:
            return FILE_TYPES[asked]
    model = model_of(config, shapes, {})
    n_weights: dict[str, Counter[str]] = defaultdict(Counter)  # of the tensor, by type
    for hf, scheme in schemes.items():
        if hf in names:
            n_weights[names[hf]][ggml_type_of(scheme.qtype)] += specs[hf].n_elements

    known = FILE_TYPES | CONVERTED

    def agreement(name: str) -> tuple[int, bool]:
        chosen = choose_types(known[name], Options(), model, shapes)
        return sum(n_weights[target][ggml_type] for target, ggml_type in chosen.items() if ggml_type is not None), name == asked

    return known[max(known, key=agreement)]


def model_of(config: Mapping[str, Any], names: Collection[str], overrides: dict[str, Field]) -> Model:
    """What the rules ask about the model of ``config`` whose file has tensors ``names``; ``overrides`` of the metadata count."""
    if "gguf_metadata" in config:  # of a GGUF file taken as it is
        return Model.of({**config["gguf_metadata"], **overrides}, names)
    arch = architecture(config)
    keys = GGUFWriter(None, arch.gguf_arch)
    keyed.hyperparameters(keys, arch, arch.usual(config))
    return Model.of(keyed.fields_of(keys) | overrides, names)


def shapes_of(names: Mapping[str, str], specs: Mapping[str, TensorSpec]) -> dict[str, tuple[int, ...]]:
    """GGUF name → shape of the tensors called ``names`` (HF → GGUF); experts stored one by one lie in one tensor."""
    return {
        target: specs[parts[0]].shape if len(parts) == 1 else (len(parts), *specs[parts[0]].shape)
        for target, parts in slices_of(names).items()
    }


def choose_types(
    kind: FileType, options: Options, model: Model, shapes: Mapping[str, tuple[int, ...]], *, is_weighed: bool = False
) -> dict[str, str | None]:
    """GGUF name → ggml type of every matrix among a file's tensors of these ``shapes``, None for one that is to stay as it is."""
    chooser = Chooser(kind, model, shapes, is_weighed=is_weighed)
    chosen: dict[str, str | None] = {}
    for name in sorted(shapes, key=file_order):
        if is_quantizable(name, shapes[name], model.arch):
            chosen[name] = _choose(kind, options, chooser, name, shapes[name])
    return chosen


def _choose(kind: FileType, options: Options, chooser: Chooser, name: str, shape: tuple[int, ...]) -> str | None:
    """The ggml type of the matrix with GGUF name ``name``, by the user's options and then by the mix; None when it is to stay as it is."""
    if options.leave_output_tensor and name == "output.weight":
        return None
    manual, in_features = options.manual(name), shape[-1]
    if options.token_embedding_type and name in EMBEDDINGS and (manual is None or name == "token_embd.weight"):
        return options.token_embedding_type.upper()
    if options.output_tensor_type and name == "output.weight":
        return options.output_tensor_type.upper()
    if kind.default in DENSE:
        return kind.default
    if manual is not None or options.pure:
        return fit(manual or kind.default, in_features)
    if options.output_tensor_type and name in EMBEDDINGS and not chooser.model.has_head:
        return fit(options.output_tensor_type.upper(), in_features)
    return fit(chooser.choose(name, in_features, math.prod(shape[:-2])), in_features)


def _schemes(chosen: Mapping[str, str | None], names: Mapping[str, str], specs: Mapping[str, TensorSpec]) -> dict[str, Scheme]:
    """HF name → scheme of what is to be quantized. ``chosen``: GGUF name → ggml type of the matrices; ``names``: HF → GGUF name.

    What has the chosen type already, and one that quantcli does not write, needs no scheme to stay as it is.
    """
    schemes: dict[str, Scheme] = {}
    for hf, target in names.items():
        ggml_type = chosen.get(target)
        if ggml_type is not None and (ggml_type in WRITABLE or ggml_type != specs[hf].dtype):
            schemes[hf] = _scheme(hf, ggml_type, specs[hf])
    return schemes


def _scheme(name: str, ggml_type: str, spec: TensorSpec) -> Scheme:
    """The scheme of ``ggml_type``; :class:`RecipeError` when quantcli has none, or the rows do not fill its blocks."""
    if ggml_type not in WRITABLE:
        raise RecipeError(f"{name}: quantcli writes no tensors of type {ggml_type}; there are: {', '.join(WRITABLE)}")
    if spec.shape[-1] % BLOCKS[ggml_type][0]:
        raise RecipeError(
            f"{name}: in_features {spec.shape[-1]} is not a multiple of the {ggml_type} block {BLOCKS[ggml_type][0]}; use F16"
        )
    return Scheme.of(qtype_of(ggml_type))
