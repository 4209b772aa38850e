"""llama-imatrix and llama-quantize --imatrix: ours measures what theirs does, and the files made with either's matrix are the same.

Needs a built llama.cpp source tree at QUANTCLI_LLAMA_CPP.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from data.make_imatrix import N_CTX, TEXT, imatrix_of
from quantcli import recipe as recipes
from quantcli.errors import RecipeError
from quantcli.formats import open_checkpoint
from quantcli.formats.gguf.file.container import Field
from quantcli.formats.gguf.file.headers import read_header
from quantcli.formats.gguf.imatrix import imatrix, importance
from quantcli.forward import tokenizer
from quantcli.walk import pipeline
from support import families
from support.gguf_export import export
from support.importance_files import GOLDEN, PICO, chunks, measure, quantize, written

pytestmark = pytest.mark.peer

LLAMA_CPP = Path(os.environ.get("QUANTCLI_LLAMA_CPP", "/nowhere"))
if not (LLAMA_CPP / "build/bin/llama-imatrix").is_file():
    pytest.skip("QUANTCLI_LLAMA_CPP names no built llama.cpp with llama-imatrix", allow_module_level=True)

RECIPES = [name for name in recipes.shipped() if recipes.load(name).format == "gguf"]


def pico(path: Path, file_type: str) -> Path:
    with open_checkpoint(str(PICO)) as source:
        return export(source, path, file_type)


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [((), 1e-4), (("-ctk", "f16", "-ctv", "f16", "-fa", "auto"), 5e-3), (("--output-format", "dat"), 1e-4), (("-b", "256"), 1e-4)],
    ids=["float32", "llama.cpp's defaults", "legacy", "four windows at once"],
)
def test_llama_imatrix_measures_what_we_measure(options: tuple[str, ...], tolerance: float, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    theirs = imatrix.read(
        imatrix_of(LLAMA_CPP, pico(tmp_path / "m.gguf", "F32"), tmp_path / "text.txt", tmp_path / "theirs.gguf", *options)
    )
    ours = written(measure(tmp_path / "stats.safetensors", chunks(), hessian=False), tmp_path / "ours.gguf")
    assert (list(ours), ours.n_chunks, theirs.datasets) == (sorted(theirs), theirs.n_chunks, ("text.txt",))
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=tolerance, atol=0)


def test_llama_imatrix_reads_and_adds_up_our_file(tmp_path: Path) -> None:
    """Merging two of one file doubles sums and counts, and leaves the means."""
    ours = written(measure(tmp_path / "stats.safetensors", chunks()[:8], hessian=False), tmp_path / "ours.gguf")
    command = [LLAMA_CPP / "build/bin/llama-imatrix", "-m", pico(tmp_path / "m.gguf", "F16"), "-c", str(N_CTX), "-o", tmp_path / "sum.gguf"]
    files = ["--in-file", ours.path, "--in-file", ours.path]
    subprocess.run([*command, *files], check=True, capture_output=True, stdin=subprocess.DEVNULL)
    both = imatrix.read(tmp_path / "sum.gguf")
    assert both.datasets == ("some.txt", "some.txt")
    for name in ours:
        assert both.entries[name].counts == (2 * ours.entries[name].counts[0],)
        torch.testing.assert_close(both[name], ours[name])


@pytest.mark.parametrize("matrix", ["llama-imatrix's", "legacy", "ours", "none"])
@pytest.mark.parametrize("name", RECIPES)
def test_a_weighed_file_equals_llama_quantizes(name: str, matrix: str, tmp_path: Path) -> None:
    """Every key, value and byte; what llama-quantize refuses without an importance matrix, we refuse too."""
    path = matrix_file(matrix, tmp_path)
    recipe = recipes.load(name)
    assert recipe.mix is not None
    options = [] if path is None else ["--imatrix", path]
    theirs = tmp_path / "theirs.gguf"
    command = [LLAMA_CPP / "build/bin/llama-quantize", *options, pico(tmp_path / "bf16.gguf", "BF16"), theirs, recipe.mix, "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    data = None if path is None else importance.read(path)
    with open_checkpoint(str(PICO)) as source:
        if done.returncode:
            with pytest.raises(RecipeError, match=r"garbage|needs importance"):
                list(pipeline.quantize(source, tmp_path / "ours.gguf", recipe, data=data))
            assert "requires an importance matrix" in done.stderr + done.stdout
            return
        list(pipeline.quantize(source, tmp_path / "ours.gguf", recipe, data=data))
    assert_same(tmp_path / "ours.gguf", theirs)


def matrix_file(word: str, folder: Path) -> Path | None:
    if word == "none":
        return None
    if word == "llama-imatrix's":
        return GOLDEN
    if word == "ours":
        return written(measure(folder / "stats.safetensors", chunks()[:4], hessian=False), folder / "ours-file.gguf").path
    (folder / "text.txt").write_text(TEXT)
    return imatrix_of(LLAMA_CPP, pico(folder / "f32.gguf", "F32"), folder / "text.txt", folder / "i.dat", "--output-format", "dat")


def assert_same(ours: Path, theirs: Path) -> None:
    """Every key and value but what only ours says, and every tensor's type, shape and bytes."""
    a, b = read_header(ours), read_header(theirs)
    assert [key for key in a.fields if not key.startswith("quantcli.")] == [key for key in b.fields if not key.startswith("quantcli.")]
    for key, field in b.fields.items():
        assert key.startswith("quantcli.") or plain(a.fields[key]) == plain(field), key
    assert list(a.specs.values()) == list(b.specs.values())
    A, B = ours.read_bytes(), theirs.read_bytes()
    for name, spec in a.specs.items():
        assert A[a.offsets[name] : a.offsets[name] + spec.nbytes] == B[b.offsets[name] : b.offsets[name] + spec.nbytes], name


def plain(field: Field) -> tuple:
    value = field.value.tolist() if isinstance(field.value, np.ndarray) else field.value
    return field.type, field.element, np.float32(value) if isinstance(value, float) else value


ABSORBED = ("attn_k_b.weight", "attn_v_b.weight")
"""Of MLA: what llama.cpp multiplies queries and attention's outcome by, which transformers never computes, so that we have no entry."""


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe", "deepseek v2"])
def experts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of eight experts, or of so many that the text leaves some without a token; or with MLA."""
    few = {"num_experts_per_tok": 2, "num_local_experts": 8}
    many = {"num_experts_per_tok": 2, "num_experts": 48, "moe_intermediate_size": 256, "norm_topk_prob": True}
    wide = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    latent = families.DEEPSEEK | {"kv_lora_rank": 256, "q_lora_rank": 256, "qk_nope_head_dim": 64, "moe_intermediate_size": 256}
    sizes = {"mixtral": few, "qwen3_moe": many, "deepseek v2": latent}[request.param]
    case = families.Case(families.CASES[request.param].model_type, wide | sizes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(families.CASES, request.param, case)
        return families.make(request.param, tmp_path_factory.mktemp("experts") / "tiny")


def test_experts_are_measured_and_weighed_as_llama_cpp_does(experts: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT[:700])
    with open_checkpoint(str(experts)) as source:
        ids = tokenizer(source)(TEXT[:700], add_special_tokens=False)["input_ids"]
        dense = export(source, tmp_path / "f32.gguf", "F32", pre_tokenizer="gpt-2")
        stored = export(source, tmp_path / "bf16.gguf", "BF16", pre_tokenizer="gpt-2")
    n = len(ids) // N_CTX
    windows = torch.tensor(ids[: n * N_CTX]).view(n, N_CTX)
    theirs = imatrix.read(imatrix_of(LLAMA_CPP, dense, tmp_path / "text.txt", tmp_path / "theirs.gguf"))
    ours = written(measure(tmp_path / "stats.safetensors", windows, hessian=False, folder=experts), tmp_path / "ours.gguf", experts)
    measured = [name for name in theirs if not name.endswith(ABSORBED)]
    assert {name: entry.counts for name, entry in ours.entries.items()} == {name: theirs.entries[name].counts for name in measured}
    for name in measured:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4 * float(theirs[name].max()))
    options = {"imatrix": str(theirs.path), "pre_tokenizer": "gpt-2"}
    for name in ("q4_k_m", "q4_0", "q5_k_s"):
        made = tmp_path / f"{name}.gguf"
        words = ["--imatrix", theirs.path, stored, made, name, "1"]
        subprocess.run([LLAMA_CPP / "build/bin/llama-quantize", *words], check=True, capture_output=True)
        notes = quantize(tmp_path / f"ours-{name}.gguf", name, experts, **options)
        assert_same(tmp_path / f"ours-{name}.gguf", made)
        unseen = [name for name, entry in theirs.entries.items() if 0 in entry.counts]
        assert [name for name in unseen if not any(f"{name}: no token reached expert" in note for note in notes)] == []
