"""transformers and llm-compressor as the second hand: they load our compressed-tensors folders with our perplexity, and we read theirs.

Needs a Python with transformers and compressed-tensors at QUANTCLI_TRANSFORMERS_PYTHON, and one with llm-compressor at
QUANTCLI_LLMCOMPRESSOR_PYTHON; tests/PEERS.md says how to make them.
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import quantcli as qc
from quantcli import recipe
from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.formats import open_checkpoint
from quantcli.forward import tokenizer
from quantcli.planning.arrange import experts_apart
from quantcli.recipe import Rule
from quantcli.tensors import Scheme
from quantcli.text import texts
from quantcli.walk import evaluate
from support import families, gptq_peer
from support.places import PICO, TESTS

pytestmark = pytest.mark.peer

TRANSFORMERS = os.environ.get("QUANTCLI_TRANSFORMERS_PYTHON")
LLMCOMPRESSOR = os.environ.get("QUANTCLI_LLMCOMPRESSOR_PYTHON")
if TRANSFORMERS is None or LLMCOMPRESSOR is None:
    pytest.skip(
        "QUANTCLI_TRANSFORMERS_PYTHON and QUANTCLI_LLMCOMPRESSOR_PYTHON name no Pythons with transformers and llm-compressor",
        allow_module_level=True,
    )

N_LINEARS = 21
N_LAYERS = 3


@dataclass(frozen=True)
class Case:
    """A folder of ours, how the client loads it, and how far its perplexity may be from ours, which has inputs rounded as engines do."""

    scheme: str
    how: str = "float32"
    tolerance: float = 1e-5
    rules: tuple[tuple[str, str], ...] = ()
    passes: str = "rtn"
    n_coded: int = N_LINEARS
    kv_cache: str = ""

    @property
    def name(self) -> str:
        cache = [f"kv={self.kv_cache}"] if self.kv_cache else []
        return "-".join([self.passes, self.scheme, self.how, *cache, *(f"{match}={scheme}" for match, scheme in self.rules)])


BY_BOTH = [
    Case("int2-g32-sym"),
    Case("int4-g128-sym", passes="gptq"),
    Case("int8-g128-sym"),
    Case("int4-channel-sym"),
    Case("fp8-channel"),
    Case("fp8-tensor"),
    Case("int8-channel-sym+int8-token"),
    Case("int4-g128-sym+int8-token"),
    Case("int8-channel-sym+int8-tensor"),
    Case("fp8-channel+fp8-token"),
    Case("fp8-tensor+fp8-tensor"),
    Case("fp8-block+fp8-g128"),
    Case("int4-g128-sym", rules=(("o_proj", "keep"),), n_coded=N_LINEARS - 3),
    Case("int4-g128-sym", rules=(("down_proj", "fp8-channel"), ("layers.1.self_attn", "int8-g32-sym"))),
    Case("fp8-channel+fp8-token", kv_cache="fp8", n_coded=N_LINEARS + N_LAYERS),  # each attention counts as quantized
    Case("int4-g128-sym", kv_cache="int8", passes="gptq", n_coded=N_LINEARS + N_LAYERS),
    Case("bf16", kv_cache="fp8-head", n_coded=N_LAYERS),
    Case("mxfp4", how="widened"),
    Case("mxfp8", how="widened"),
    Case("mxfp4+mxfp4-g32", how="widened"),
    Case("mxfp8+mxfp8-g32", how="widened"),
    Case("nvfp4", how="widened", tolerance=1e-3),  # whose weights need more bits than the bfloat16 that the library decodes them to
    Case("nvfp4+nvfp4-g16", how="widened", tolerance=5e-3),
]
ASYMMETRIC = [Case(scheme) for scheme in ("int4-g128-asym", "int8-g32-asym", "int4-channel-asym")]


def quantized(model: Checkpoint, target: Path, case: Case, windows: torch.Tensor) -> None:
    """Write ``case`` of the model to ``target``."""
    base = recipe.load("gptq-w4a16" if case.passes == "gptq" else "fp8-dynamic")
    rules = tuple(Rule.parse(*rule) for rule in case.rules)
    how = replace(base, scheme=Scheme.parse(case.scheme), rules=rules, kv_cache=case.kv_cache)
    qc.quantize(model, target, how, data=qc.Windows(windows), device="cpu")


def ask(python: str | None, script: str, *words: str) -> None:
    """Run a client; its imports take longer than its work, so one process does all cases."""
    done = subprocess.run([str(python), str(TESTS / script), *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, float]]:
    """Case → (folder, perplexity as quantcli finds it)."""
    root = tmp_path_factory.mktemp("peer-compressed-tensors")
    with open_checkpoint(str(PICO)) as model:
        words = tokenizer(model)
        learned = texts.windows([texts.default_text()], words, n_samples=16, seq_len=128, seed=0)
        measured = texts.eval_windows(texts.default_eval_text(), words, n_samples=8, seq_len=256)
        save_file({"windows": measured}, root / "windows.safetensors")
        found = {}
        for i, case in enumerate([*BY_BOTH, *ASYMMETRIC]):
            quantized(model, root / str(i), case, learned)
            with open_checkpoint(str(root / str(i))) as back:
                assert back.notes == ()
                found[case.name] = (root / str(i), evaluate.perplexity(back, measured).perplexity)
    return found


def answers(python: str | None, ours: dict[str, tuple[Path, float]], cases: list[tuple[Case, str]]) -> dict[str, dict[str, Any]]:
    root = next(iter(ours.values()))[0].parent
    target = root / "answers.json"
    asked = [f"{how}={ours[c.name][0]}" for c, how in cases]
    ask(python, "support/transformers_client.py", str(root / "windows.safetensors"), str(target), *asked)
    return {case.name: answer for (case, _), answer in zip(cases, json.loads(target.read_text()), strict=True)}


@pytest.fixture(scope="module")
def newest(ours: dict[str, tuple[Path, float]]) -> dict[str, dict[str, Any]]:
    """What transformers 5.23 with compressed-tensors 0.20 answers; asymmetric folders it reads only densely."""
    return answers(TRANSFORMERS, ours, [*((case, case.how) for case in BY_BOTH), *((case, "dequantize") for case in ASYMMETRIC)])


@pytest.fixture(scope="module")
def older(ours: dict[str, tuple[Path, float]]) -> dict[str, dict[str, Any]]:
    """What transformers 5.17 with compressed-tensors 0.19 answers."""
    return answers(LLMCOMPRESSOR, ours, [(case, case.how) for case in [*BY_BOTH, *ASYMMETRIC]])


def check(case: Case, answer: dict[str, Any], folder: Path, perplexity: float) -> None:
    assert "error" not in answer, answer["error"]
    assert answer["quantized"] == case.n_coded
    assert answer["perplexity"] == pytest.approx(perplexity, rel=case.tolerance)
    if not case.scheme.startswith("nvfp4"):
        with open_checkpoint(str(folder)) as back:
            mine = {name: float(back.read(name).double().abs().sum()) for name in back.schemes}
        assert {name: answer["weights"][name] for name in mine} == pytest.approx(mine, rel=1e-9)


@pytest.mark.parametrize("case", BY_BOTH, ids=lambda case: case.name)
def test_the_newest_transformers_finds_our_perplexity(
    case: Case, newest: dict[str, dict[str, Any]], ours: dict[str, tuple[Path, float]]
) -> None:
    check(case, newest[case.name], *ours[case.name])


@pytest.mark.parametrize("case", [*BY_BOTH, *ASYMMETRIC], ids=lambda case: case.name)
def test_an_older_transformers_finds_our_perplexity_asymmetric_folders_included(
    case: Case, older: dict[str, dict[str, Any]], ours: dict[str, tuple[Path, float]]
) -> None:
    check(case, older[case.name], *ours[case.name])


@pytest.mark.parametrize("case", ASYMMETRIC, ids=lambda case: case.name)
def test_the_newest_transformers_reads_asymmetric_folders_dense(
    case: Case, newest: dict[str, dict[str, Any]], ours: dict[str, tuple[Path, float]]
) -> None:
    assert newest[case.name]["perplexity"] == pytest.approx(ours[case.name][1], rel=1e-3)  # decoded in bfloat16


@pytest.mark.parametrize("scheme", ["int4-g128-sym", "int8-channel-sym+int8-token"])
def test_a_tied_head_that_was_quantized_is_run_as_we_run_it(tmp_path: Path, scheme: str) -> None:
    case = Case(scheme, rules=(("lm_head", scheme),), passes="gptq")
    with open_checkpoint(str(gptq_peer.PICO)) as model:
        learned, measured = gptq_peer.windows_of_pico(model)
        quantized(model, tmp_path / "out", case, learned)
    save_file({"windows": measured}, tmp_path / "windows.safetensors")
    ask(TRANSFORMERS, "support/transformers_client.py", *(str(tmp_path / name) for name in ("windows.safetensors", "answers.json", "out")))
    (answer,) = json.loads((tmp_path / "answers.json").read_text())
    with open_checkpoint(str(tmp_path / "out")) as back:
        assert "lm_head.weight" in back.schemes
        assert answer["quantized"] == N_LINEARS + 1
        assert answer["perplexity"] == pytest.approx(evaluate.perplexity(back, measured).perplexity, rel=1e-5)


def test_the_cases_differ_by_more_than_the_tolerance(ours: dict[str, tuple[Path, float]]) -> None:
    """Or the tests above could not tell a folder from its neighbour."""
    measured = sorted(perplexity for _, perplexity in ours.values())
    assert measured[-1] > 1.1 * measured[0]


CACHES = {"fp8": "float-tensor", "int8": "int-tensor", "fp8-head": "float-attn_head"}
"""Our word for a cache → the client's."""


@pytest.mark.parametrize("word", CACHES)
def test_scales_of_caches_are_those_that_llm_compressor_computes_on_the_same_windows(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, word: str
) -> None:
    root = tmp_path_factory.getbasetemp() / "llm-compressor-caches"
    if not root.exists():
        root.mkdir()
        ask(LLMCOMPRESSOR, "support/llmcompressor_client.py", str(PICO), str(root), *(f"KV-{how}" for how in CACHES.values()))
    windows = torch.randint(10, 500, (4, 64), generator=torch.Generator().manual_seed(0))
    how = replace(recipe.load("fp8-dynamic-kv"), scheme=Scheme.parse("bf16"), kv_cache=word)
    qc.quantize(PICO, tmp_path / "ours", how, data=qc.Windows(windows), device="cpu")
    with open_checkpoint(str(root / f"KV-{CACHES[word]}")) as theirs, open_checkpoint(str(tmp_path / "ours")) as ours:
        assert theirs.notes == ours.notes == ()
        assert theirs.kv_cache == ours.kv_cache
        assert len(ours.kv_cache) == N_LAYERS
        for attention in ours.kv_cache:
            for part in ("k_scale", "v_scale"):
                assert ours.specs[f"{attention}.{part}"].shape == theirs.specs[f"{attention}.{part}"].shape
            for mine, other in zip(ours.cache_scales(attention), theirs.cache_scales(attention), strict=True):
                of_127 = 127.5 / 127 if word == "int8" else 1.0  # the library's largest value is half a step beyond the largest code
                torch.testing.assert_close(mine, other * of_127, rtol=2**-8, atol=0)


PRESETS = ("W2A16", "W3A16", "W4A16", "W4A16_ASYM", "W8A16", "W4A8", "W8A8", "FP8_DYNAMIC", "FP8", "FP8_BLOCK")
PRESETS += ("NVFP4A16", "NVFP4", "MXFP4A16", "MXFP4", "MXFP8A16", "MXFP8")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of llm-compressor for each preset, and its library's weights beside it."""
    root = tmp_path_factory.mktemp("llm-compressor")
    ask(LLMCOMPRESSOR, "support/llmcompressor_client.py", str(PICO), str(root), *PRESETS)
    return root


@pytest.mark.parametrize("preset", PRESETS)
def test_a_folder_of_llm_compressor_is_read_bit_for_bit(theirs: Path, preset: str) -> None:
    expected = load_file(theirs / f"{preset}.safetensors")
    with open_checkpoint(str(theirs / preset)) as found:
        assert found.notes == ()
        assert found.schemes.keys() == expected.keys()
        for name, W in expected.items():
            assert torch.equal(found.read(name).to(W.dtype), W)


@pytest.mark.parametrize("preset", [preset for preset in PRESETS if preset != "W3A16"])
def test_a_folder_of_llm_compressor_is_written_again_as_it_was(theirs: Path, tmp_path: Path, preset: str) -> None:
    qc.export(theirs / preset, tmp_path / "out", format="compressed-tensors", device="cpu")
    first, second = (load_file(folder / "model.safetensors") for folder in (theirs / preset, tmp_path / "out"))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        same = tensor.float() if name.endswith("input_scale") else tensor  # ours are float32
        assert torch.equal(second[name].view(torch.uint8), same.view(torch.uint8)), name
    words = [json.loads((folder / "config.json").read_text())["quantization_config"] for folder in (theirs / preset, tmp_path / "out")]
    for key in ("format", "ignore", "kv_cache_scheme", "quantization_status", "quant_method"):
        assert words[0][key] == words[1][key]


def test_gpt_oss_is_written_as_llm_compressor_writes_it(tmp_path: Path) -> None:
    """Expert by expert, gate and up being the rows that these are: what transformers has in one tensor."""
    folder = families.make("gpt-oss", tmp_path / "model")
    ask(LLMCOMPRESSOR, "support/llmcompressor_client.py", str(folder), str(tmp_path), "W8A8")
    how = recipe.parse({"format": "compressed-tensors", "passes": ["rtn"], "scheme": "int8-channel-sym+int8-token"}, "w8a8")
    with open_checkpoint(str(folder)) as source:
        qc.quantize(source, tmp_path / "ours", how, device="cpu")
        dense = experts_apart(source)
        with open_checkpoint(str(tmp_path / "ours")) as ours, open_checkpoint(str(tmp_path / "W8A8")) as theirs:
            assert ours.specs.keys() == theirs.specs.keys()
            assert ours.schemes == theirs.schemes
            for name in theirs.schemes:
                W = dense.read(name).float()
                assert (theirs.read(name) - W).norm() < 0.01 * W.norm(), name
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("ours", "W8A8")]
    assert files[0].keys() == files[1].keys()
    assert {name: tensor.shape for name, tensor in files[0].items()} == {name: tensor.shape for name, tensor in files[1].items()}
