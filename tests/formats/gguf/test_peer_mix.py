"""llama-quantize's own choice, asked live: the types of its dry run are ours, whatever the file type and the options.

Needs a built llama.cpp source tree at QUANTCLI_LLAMA_CPP.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from quantcli.formats.gguf.types.filetypes import Options, choose_types, without_layers
from quantcli.formats.gguf.types.mixes import TABLE, Model
from support.mix_models import MODELS, some_imatrix, sparse_file, types_by_llama_quantize

pytestmark = pytest.mark.peer

PROGRAM = Path(os.environ.get("QUANTCLI_LLAMA_CPP", "/nowhere")) / "build/bin/llama-quantize"
if not PROGRAM.is_file():
    pytest.skip("QUANTCLI_LLAMA_CPP names no built llama.cpp", allow_module_level=True)

FILE_TYPES = [name for name in TABLE if name != "F32"]


@pytest.mark.parametrize("weighed", [False, True], ids=["plain", "weighed"])
@pytest.mark.parametrize("name", MODELS)
def test_every_file_type_chooses_the_types_of_llama_quantize(name: str, weighed: bool, tmp_path: Path) -> None:
    model = MODELS[name]
    path = sparse_file(model, tmp_path / "model.gguf")
    words = ["--imatrix", some_imatrix(tmp_path / "imatrix.dat")] if weighed else []
    facts = Model.of(model.fields, model.shapes)
    for file_type in FILE_TYPES:
        ours = choose_types(TABLE[file_type], Options(), facts, model.shapes, is_weighed=weighed)
        assert ours == types_by_llama_quantize(PROGRAM, path, file_type, *words), file_type


OPTIONS: dict[str, dict[str, Any]] = {
    "pure": {"pure": True},
    "a type for some": {"tensor_type": [r"blk\.[013]\.attn_v=q8_0", "FFN_UP=q6_K", "attn_v=f16", "token=q4_0"]},
    "a type for the head": {"output_tensor_type": "q8_0"},
    "a type for the embedding": {"token_embedding_type": "q5_K", "tensor_type": ["per_layer=q8_0", "token_embd=q4_0"]},
    "a type for both": {"output_tensor_type": "iq4_nl", "token_embedding_type": "q3_K"},
    "the head left alone": {"leave_output_tensor": True},
    "fewer layers": {"prune_layers": [0, 3, 4]},
    "other metadata": {"override_kv": ["llama.attention.head_count_kv=int:1", "llama.block_count=int:40", "a.note=str:as said"]},
}


@pytest.mark.parametrize("what", OPTIONS)
@pytest.mark.parametrize("name", ["llama", "llama, tied, five queries a key", "llama, rows of 288", "mixtral", "matrices of other kinds"])
def test_options_choose_the_types_of_llama_quantizes_own(name: str, what: str, tmp_path: Path) -> None:
    model, options = MODELS[name], OPTIONS[what]
    path = sparse_file(model, tmp_path / "model.gguf")
    words: list[str] = []
    for key, value in options.items():
        flag = f"--{key.replace('_', '-')}"
        if key == "prune_layers":
            words += [flag, ",".join(map(str, value))]
        else:
            words += [flag] if value is True else [word for item in ([value] if isinstance(value, str) else value) for word in (flag, item)]
    wanted = Options.of(options)
    facts = Model.of(model.fields | wanted.overrides, model.shapes)
    kept = without_layers({name: name for name in model.shapes}, wanted.prune_layers)
    shapes = {new: model.shapes[old] for old, new in kept.items()}
    for file_type in ("Q4_K_M", "IQ2_M", "Q3_K_L", "IQ3_XS", "F16"):
        ours = choose_types(TABLE[file_type], wanted, facts, shapes)
        theirs = types_by_llama_quantize(PROGRAM, path, file_type, *words)
        assert {tensor: ggml_type for tensor, ggml_type in ours.items() if ggml_type is not None} == theirs, file_type
