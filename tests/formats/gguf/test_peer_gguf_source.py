"""llama-quantize and llama-gguf-split as the second hand for GGUF sources: the same bytes of the same file, whatever the model.

Needs a built llama.cpp source tree at QUANTCLI_LLAMA_CPP.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import quantcli as qc
from quantcli.cli import app
from quantcli.formats.gguf.file.container import Container
from quantcli.formats.gguf.file.headers import read_header
from quantcli.planning.selection import of_type
from support.gguf_export import measured
from support.gguf_files import write_model

pytestmark = pytest.mark.peer

BIN = Path(os.environ.get("QUANTCLI_LLAMA_CPP", "/nowhere")) / "build/bin"
if not (BIN / "llama-quantize").is_file():
    pytest.skip("QUANTCLI_LLAMA_CPP names no built llama.cpp", allow_module_level=True)


def run(program: str, *arguments: str | Path) -> None:
    done = subprocess.run([BIN / program, *arguments], capture_output=True, text=True, errors="replace", check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def ours(*arguments: str | Path) -> None:
    result = CliRunner().invoke(app, ["export", *map(str, arguments), "-q"])
    assert result.exit_code == 0, result.output


def plain(container: Container) -> dict:
    """Every key but ours, in order, with its types and value."""

    def value(field: object) -> object:
        return field.value.tolist() if isinstance(field.value, np.ndarray) else field.value  # type: ignore[attr-defined]

    return {key: (f.type, f.element, value(f)) for key, f in container.fields.items() if not key.startswith("quantcli.")}


def assert_same(a: Path, b: Path) -> None:
    """Every key, its place and value; every tensor's name, place, type, shape and bytes."""
    one, two = read_header(a), read_header(b)
    assert list(plain(one).items()) == list(plain(two).items())
    assert list(one.specs.values()) == list(two.specs.values())
    first, second = a.read_bytes(), b.read_bytes()
    for name, spec in one.specs.items():
        x, y = one.offsets[name], two.offsets[name]
        assert first[x : x + spec.nbytes] == second[y : y + spec.nbytes], name


@pytest.fixture(scope="module", params=["llama", "mamba", "starcoder2", "mixtral as GGUF has it"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model in a GGUF file, of one architecture that ``archs/`` reads back, and of some that it does not."""
    return write_model(tmp_path_factory.mktemp("models") / "m.gguf", request.param.split()[0])


@pytest.mark.parametrize("file_type", ["Q4_K_M", "Q4_0", "Q8_0", "Q5_K_S", "Q6_K", "F16", "F32"])
def test_a_gguf_source_gives_llama_quantizes_bytes(model: Path, file_type: str, tmp_path: Path) -> None:
    run("llama-quantize", model, tmp_path / "theirs.gguf", file_type, "2")
    ours(model, file_type, "-o", tmp_path / "ours.gguf")
    assert_same(tmp_path / "ours.gguf", tmp_path / "theirs.gguf")


@pytest.mark.parametrize(("first", "second"), [("Q8_0", "Q4_K_M"), ("Q4_K_M", "Q4_K_S"), ("Q5_0", "F16"), ("Q6_K", "Q8_0")])
def test_a_quantized_gguf_source_is_requantized_as_by_llama_quantize(model: Path, first: str, second: str, tmp_path: Path) -> None:
    run("llama-quantize", model, tmp_path / "first.gguf", first, "2")
    run("llama-quantize", "--allow-requantize", tmp_path / "first.gguf", tmp_path / "theirs.gguf", second, "2")
    ours(tmp_path / "first.gguf", second, "-o", tmp_path / "ours.gguf")
    assert_same(tmp_path / "ours.gguf", tmp_path / "theirs.gguf")


@pytest.mark.parametrize(
    "options", [["--leave-output-tensor"], ["--pure"], ["--tensor-type", "ffn_up=q8_0"], ["--token-embedding-type", "q6_k"]]
)
def test_options_mean_the_same_for_a_quantized_source(model: Path, options: list[str], tmp_path: Path) -> None:
    run("llama-quantize", model, tmp_path / "first.gguf", "Q5_K_M", "2")
    run("llama-quantize", "--allow-requantize", *options, tmp_path / "first.gguf", tmp_path / "theirs.gguf", "Q4_K_S", "2")
    ours(tmp_path / "first.gguf", "Q4_K_S", *options, "-o", tmp_path / "ours.gguf")
    assert read_header(tmp_path / "ours.gguf").specs == read_header(tmp_path / "theirs.gguf").specs


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], tuple[Path, Path]]:
    """(our file, the folder with its shards by llama-gguf-split)."""
    folder = tmp_path_factory.mktemp("split")
    whole = write_model(folder / "m.gguf", "llama")
    ours(whole, "Q4_K_M", "-o", folder / "whole.gguf")
    run("llama-gguf-split", "--split", "--split-max-size", "1M", folder / "whole.gguf", folder / "theirs")
    return lambda: (whole, folder)


def test_our_shards_are_llama_gguf_splits_bytes(shards: Callable[[], tuple[Path, Path]], tmp_path: Path) -> None:
    _, folder = shards()
    ours(folder / "whole.gguf", "-o", tmp_path / "theirs.gguf", "--split-max-size", "1M")
    made, expected = sorted(tmp_path.glob("*.gguf")), sorted(folder.glob("theirs-*.gguf"))
    assert [p.name for p in made] == [p.name for p in expected]
    assert len(made) > 2
    for a, b in zip(made, expected, strict=True):
        assert_same(a, b)


def test_llama_cpp_reads_our_shards_and_joins_them_to_our_whole_file(shards: Callable[[], tuple[Path, Path]], tmp_path: Path) -> None:
    whole, folder = shards()
    ours(whole, "Q4_K_M", "-o", tmp_path / "cut.gguf", "--split-max-size", "1M")
    first = next(tmp_path.glob("cut-00001-of-*.gguf"))
    run("llama-gguf-split", "--merge", first, tmp_path / "joined.gguf")
    a, b = read_header(tmp_path / "joined.gguf"), read_header(folder / "whole.gguf")
    assert {n: s.dtype for n, s in a.specs.items()} == {n: s.dtype for n, s in b.specs.items()}
    run("llama-quantize", "--allow-requantize", first, tmp_path / "again.gguf", "Q8_0", "2")


def test_llama_cpps_shards_are_a_source(shards: Callable[[], tuple[Path, Path]], tmp_path: Path) -> None:
    _, folder = shards()
    ours(max(folder.glob("theirs-*.gguf")), "-o", tmp_path / "joined.gguf")
    assert_same(tmp_path / "joined.gguf", folder / "whole.gguf")


def test_a_calibrated_walk_from_a_gguf_source_keeps_its_metadata(tmp_path: Path) -> None:
    """Through Hugging Face's names, which a calibrated pass needs, the untouched tensors are the source's own too."""
    whole = write_model(tmp_path / "m.gguf", "llama")
    windows = qc.Windows(torch.zeros(1, 32, dtype=torch.int64))
    qc.quantize(whole, tmp_path / "ours.gguf", measured(of_type("gguf", "BF16")), data=windows, device="cpu")
    run("llama-quantize", whole, tmp_path / "theirs.gguf", "BF16", "2")
    assert_same(tmp_path / "ours.gguf", tmp_path / "theirs.gguf")
