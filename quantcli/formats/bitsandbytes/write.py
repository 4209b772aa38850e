"""Writing bitsandbytes folders: the file tensors of a weight, and config.json as transformers writes it and needs it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.modules import Modules
from quantcli.errors import RecipeError, UnsupportedError
from quantcli.experts import expert_of
from quantcli.formats import DEFAULTS, Request
from quantcli.formats.bitsandbytes.read import ROWS, BitsAndBytesCheckpoint
from quantcli.formats.bitsandbytes.state import LEVELS, NAMES, PREFIX, Nested, State
from quantcli.formats.shared.dense import dense_modules, harmless, transformers_hits
from quantcli.formats.shared.folder import (
    QuantizedFolderLayout,
    dense_dtypes,
    is_dense,
    module_of,
    part_specs,
    quantized_only,
    shard_bytes,
    split_block,
)
from quantcli.formats.shared.fused import check_fused
from quantcli.qtypes.shared import float4
from quantcli.tensors import QuantizedTensor, Scheme, TensorSpec


@dataclass(frozen=True, kw_only=True)
class BitsAndBytesLayout(QuantizedFolderLayout):
    """``state_sizes``: bytes of each 4-bit tensor's JSON."""

    state_sizes: Mapping[str, int]

    @override
    def quantized_outputs(self, spec: TensorSpec, scheme: Scheme) -> list[TensorSpec]:
        if not supports(scheme):
            raise UnsupportedError(f"{spec.name}: {scheme} cannot be stored by bitsandbytes, which has nf4, fp4 and llm_int8")
        layout = part_specs(spec, scheme)
        if scheme.qtype == "llm_int8":
            module = module_of(spec.name)
            return [
                replace(layout["codes"], name=spec.name),
                replace(layout["scb"], name=f"{module}.SCB"),
                TensorSpec.dense(f"{module}.weight_format", "U8", ()),
            ]
        files = [
            TensorSpec.dense(spec.name, "U8", (*layout["packed"].shape, 1)),
            replace(layout["absmax"], name=f"{spec.name}.absmax"),
            TensorSpec.dense(f"{spec.name}.quant_map", "F32", (16,)),
            TensorSpec.dense(f"{spec.name}.{PREFIX}{scheme.qtype}", "U8", (self.state_sizes[spec.name],)),
        ]
        if scheme.option("double_quant"):
            files += [
                replace(layout["nested_absmax"], name=f"{spec.name}.nested_absmax"),
                TensorSpec.dense(f"{spec.name}.nested_quant_map", "F32", (256,)),
            ]
        return files

    @override
    def quantized_parts(self, name: str, tensor: QuantizedTensor) -> dict[str, Tensor]:
        if tensor.scheme.qtype == "llm_int8":
            module = module_of(name)
            form = torch.tensor(ROWS, dtype=torch.uint8)
            return {name: tensor.parts["codes"], f"{module}.SCB": tensor.parts["scb"], f"{module}.weight_format": form}
        scheme = tensor.scheme
        nested = scheme.option("double_quant")
        offset = float(tensor.parts["nested_offset"]) if nested else 0.0
        text = state_of(tensor.shape, scheme, self.dtypes[name], offset).to_json(self.state_sizes[name])
        files = {
            name: tensor.parts["packed"].view(-1, 1),
            f"{name}.absmax": tensor.parts["absmax"],
            f"{name}.quant_map": torch.tensor(LEVELS[scheme.qtype]),
            f"{name}.{PREFIX}{scheme.qtype}": torch.frombuffer(bytearray(text), dtype=torch.uint8),
        }
        if nested:
            files |= {f"{name}.nested_absmax": tensor.parts["nested_absmax"], f"{name}.nested_quant_map": float4.dynamic_map()}
        return files


def supports(scheme: Scheme) -> bool:
    return is_dense(scheme) or scheme.qtype in (*LEVELS, "llm_int8")


def stays_dense(name: str) -> bool:
    """Whether engines load ``name`` dense whatever its scheme: experts, which transformers 5 holds in one parameter and no linears."""
    return expert_of(name) is not None


def layout(source: Checkpoint, schemes: Mapping[str, Scheme], request: Request = DEFAULTS) -> BitsAndBytesLayout:
    """How ``source`` is written with ``schemes``. config.json has no place for a record that transformers would leave alone."""
    quantized = quantized_only(source, schemes, "bitsandbytes")
    check_fused(source.specs, quantized, compared_by=lambda scheme: True)  # each weight of a joined one has a QuantState of its own
    for name in quantized:
        check_place(name, tied=bool(source.config.get("tie_word_embeddings")))
    dtypes = dense_dtypes(source)
    return BitsAndBytesLayout(
        config=source.config,
        quantization=quantization_config(source, quantized, dtypes, request.modules),
        dtypes=dtypes,
        sidecars=source.sidecars().files,
        max_shard_bytes=shard_bytes(request),
        state_sizes={name: state_size(source, name, scheme, dtypes[name]) for name, scheme in quantized.items() if scheme.qtype in LEVELS},
    )


def check_place(name: str, *, tied: bool) -> None:
    """Engines replace linears of the model; an embedding, or an lm_head that is one, they load dense."""
    if not name.endswith(".weight"):
        raise RecipeError(f"{name}: bitsandbytes stores linears, whose tensor is named <module>.weight; keep this one")
    if split_block(name)[0] or (name == "lm_head.weight" and not tied):
        return
    why = "the model ties it to the embedding" if name == "lm_head.weight" else "readers expect it dense"
    raise RecipeError(f"{name}: bitsandbytes quantizes the linears of decoder layers and an untied lm_head; {why}: keep this one")


def quantization_config(source: Checkpoint, quantized: Mapping[str, Scheme], dtypes: Mapping[str, str], modules: Modules) -> dict[str, Any]:
    """``quantization_config``: every key that transformers writes, in its order; of mixed schemes the commonest."""
    (kind, _), *others = Counter(scheme.qtype for scheme in quantized.values()).most_common()
    if others and "llm_int8" in (kind, *(other for other, _ in others)):
        raise RecipeError(
            f"{source.source}: 4 bits and 8 in one folder, of which bitsandbytes loads one; let all rules have nf4 or fp4, or none"
        )
    is_8bit = kind == "llm_int8"
    nested = Counter(bool(scheme.get("double_quant", False)) for scheme in quantized.values()).most_common(1)[0][0]
    dtype = Counter(dtypes[name] for name in quantized).most_common(1)[0][0]
    return {
        "_load_in_4bit": not is_8bit,
        "_load_in_8bit": is_8bit,
        "bnb_4bit_compute_dtype": "float32" if is_8bit else NAMES.get(dtype, "float32"),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "fp4" if is_8bit else kind,
        "bnb_4bit_use_double_quant": nested,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": skipped(source, quantized, modules),
        "llm_int8_threshold": 6.0,
        "load_in_4bit": not is_8bit,
        "load_in_8bit": is_8bit,
        "quant_method": "bitsandbytes",
    }


def skipped(source: Checkpoint, quantized: Mapping[str, Scheme], modules: Modules) -> list[str]:
    """The linears that stay dense: engines replace every one not named here. vLLM asks by the name of what it runs, so modules that it
    joins are named so, too; a layer's experts go by the module around them."""
    return harmless(dense_modules(source, quantized, modules, joined=True), quantized, modules, transformers_hits)


def state_of(spec_shape: tuple[int, ...], scheme: Scheme, dtype: str, offset: float = 0.0) -> State:
    """What the JSON of a weight states; ``dtype``: the one it had, or F32 for one that bitsandbytes has no name for."""
    out, n_in = spec_shape
    nested = Nested(float4.NESTED_BLOCK, offset) if scheme.option("double_quant") else None
    return State(scheme.qtype, scheme.option("block_size"), dtype if dtype in NAMES else "F32", (out, n_in), nested)


def state_size(source: Checkpoint, name: str, scheme: Scheme, dtype: str) -> int:
    """Bytes announced for the JSON of ``name``: enough for any offset. A bitsandbytes folder's own are kept where they are enough, too."""
    state = state_of(source.specs[name].shape, scheme, dtype)
    if isinstance(source, BitsAndBytesCheckpoint) and source.schemes.get(name) == scheme:
        own = source.state_sizes[name]
        if own >= state.shortest_safe():
            return own
    return state.longest()
