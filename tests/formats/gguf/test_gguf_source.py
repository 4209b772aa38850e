"""GGUF files as sources of GGUF files: of any architecture, with all they say, tensor by tensor as llama-quantize takes them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from quantcli import ops
from quantcli.calibration.data import Windows
from quantcli.errors import CheckpointError, RecipeError, UnsupportedError
from quantcli.formats import gguf, open_checkpoint
from quantcli.formats.gguf.file.container import Container, Field
from quantcli.formats.gguf.file.headers import read_header
from quantcli.formats.gguf.read import GgufCheckpoint
from quantcli.planning.arrange import open_forward
from quantcli.planning.inspection import describe, estimate
from quantcli.planning.selection import of_type, that_keeps
from quantcli.recipe import Recipe, Rule
from quantcli.tensors import DTYPES, Scheme
from quantcli.walk import pipeline
from quantcli.walk.events import Finished, Planned
from support.gguf_export import LLAMA3, edit_config, export, measured
from support.gguf_files import LAYERS, MODELS, text, write_model
from support.gguf_rewriting import rewrite
from support.runs import run

UNKNOWN = [name for name in MODELS if name not in ("llama", "mixtral")]


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / f"{request.param}.gguf", request.param)


def go(source: Path, target: Path, recipe: Recipe) -> tuple[Finished, tuple[str, ...]]:
    """(the last event, the plan's notes) of an export."""
    events = run(source, target, recipe)
    assert isinstance(events[0], Planned)
    assert isinstance(events[-1], Finished)
    return events[-1], events[0].plan.notes


def copied() -> Recipe:
    """What ``export`` does with a GGUF source when no type is named."""

    class OfGguf:
        kind = "gguf"

    return that_keeps(OfGguf(), "gguf")  # type: ignore[arg-type]


def data(container: Container, name: str) -> bytes:
    start = container.offsets[name]
    return container.path.read_bytes()[start : start + container.specs[name].nbytes]


def test_a_copy_has_every_byte_and_every_key(model: Path, tmp_path: Path) -> None:
    finished, _ = go(model, tmp_path / "copy.gguf", copied())
    a, b = read_header(model), read_header(tmp_path / "copy.gguf")
    assert finished.lossless
    assert a.specs == b.specs
    assert all(data(a, name) == data(b, name) for name in a.specs)
    assert {key: field for key, field in b.fields.items() if not key.startswith("quantcli.")} == a.fields


def test_every_matrix_gets_ggmls_bytes_and_the_rest_stays(model: Path, tmp_path: Path) -> None:
    go(model, tmp_path / "out.gguf", of_type("gguf", "Q8_0"))
    before, after = read_header(model), read_header(tmp_path / "out.gguf")
    assert before.specs.keys() == after.specs.keys()
    coded = [name for name, spec in after.specs.items() if spec.dtype == "Q8_0"]
    assert len(coded) > 2 * LAYERS
    for name, spec in before.specs.items():
        W = torch.frombuffer(bytearray(data(before, name)), dtype=DTYPES[spec.dtype]).view(-1, spec.shape[-1])
        if name in coded:
            W = ops.quantize_blocks(W, "q8_0")
        elif len(spec.shape) > 1 and spec.shape[-1] % 32:  # rows that fill no block
            W = W.to(DTYPES[after.specs[name].dtype])
        assert data(after, name) == W.reshape(-1).view(torch.uint8).numpy().tobytes(), name


def test_metadata_goes_over_but_for_what_tells_of_the_making(model: Path, tmp_path: Path) -> None:
    go(model, tmp_path / "out.gguf", of_type("gguf", "Q4_K_M"))
    before, after = read_header(model).fields, read_header(tmp_path / "out.gguf").fields
    theirs = [key for key in after if not key.startswith("quantcli.")]
    made = ["general.quantization_version", "general.file_type"]
    assert theirs == [key for key in before if key not in made] + made
    assert all(after[key] == before[key] for key in theirs if key != "general.file_type")
    assert after["general.file_type"].value == 15


def test_inspect_describes_any_architecture(model: Path) -> None:
    with open_checkpoint(str(model)) as source:
        told = describe(source)
    assert told["kind"] == "gguf"
    assert told["n_params"] == sum(spec.n_elements for spec in read_header(model).specs.values())


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_architecture_keeps_its_names_and_says_why(name: str, tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", name)
    with open_checkpoint(str(path)) as source:
        assert set(source.specs) == set(read_header(path).specs)
        assert ("serves as a source of other GGUF files" in source.notes[0]) == source.is_stored  # type: ignore[attr-defined]


def test_an_unknown_architecture_cannot_be_run(tmp_path: Path) -> None:
    with open_checkpoint(str(write_model(tmp_path / "m.gguf", "mamba"))) as source, pytest.raises(UnsupportedError, match="'mamba'"):
        open_forward(source)


def test_requantizing_says_so_and_is_not_lossless(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", "starcoder2")
    first, _ = go(path, tmp_path / "q8_0.gguf", of_type("gguf", "Q8_0"))
    finished, notes = go(first.output, tmp_path / "q4_0.gguf", of_type("gguf", "Q4_0"))
    assert not finished.lossless
    assert any("decoded and coded anew, with some loss" in note for note in notes)
    before, after = read_header(first.output), read_header(finished.output)
    name = "blk.0.ffn_up.weight"
    W = ops.dequantize_blocks(blocks(before, name), "q8_0", before.specs[name].shape[-1])
    assert data(after, name) == ops.quantize_blocks(W, "q4_0").numpy().tobytes()


def blocks(container: Container, name: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(data(container, name)), dtype=torch.uint8).view(container.specs[name].shape[0], -1)


def test_tensors_that_have_the_type_already_keep_their_bytes(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", "llama")
    first, _ = go(path, tmp_path / "a.gguf", of_type("gguf", "Q4_K_M"))
    second, _ = go(first.output, tmp_path / "b.gguf", of_type("gguf", "Q4_K_S"))
    a, b = read_header(first.output), read_header(second.output)
    alike = [name for name in a.specs if a.specs[name] == b.specs[name]]
    assert any(a.specs[name].dtype == "Q4_K" for name in alike)
    assert all(data(a, name) == data(b, name) for name in alike)


def test_a_quantized_head_left_alone_keeps_its_codes(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", "llama")
    first, _ = go(path, tmp_path / "a.gguf", of_type("gguf", "Q5_0"))
    recipe = of_type("gguf", "Q4_0")
    second, _ = go(first.output, tmp_path / "b.gguf", replace(recipe, format_options={"leave_output_tensor": True}))
    a, b = read_header(first.output), read_header(second.output)
    assert b.specs["output.weight"].dtype == "Q6_K"
    assert data(a, "output.weight") == data(b, "output.weight")


def test_rotary_factors_go_over_as_they_are(tiny_llama: Any, tmp_path: Path) -> None:
    with open_checkpoint(str(edit_config(tiny_llama(), rope_parameters=LLAMA3))) as source:
        first = export(source, tmp_path / "a.gguf", "BF16")
    go(first, tmp_path / "b.gguf", of_type("gguf", "Q4_0"))
    run(first, tmp_path / "c.gguf", measured(of_type("gguf", "BF16")), Windows(torch.zeros(1, 32, dtype=torch.int64)))
    a, b, c = (read_header(tmp_path / f"{x}.gguf") for x in "abc")
    assert data(a, "rope_freqs.weight") == data(b, "rope_freqs.weight") == data(c, "rope_freqs.weight")
    assert all(data(a, name) == data(c, name) for name in a.specs)


def test_a_scaling_of_the_rotation_that_has_no_words_here_leaves_the_file_as_it_is(tiny_llama: Any, tmp_path: Path) -> None:
    with open_checkpoint(str(tiny_llama())) as source:
        path = export(source, tmp_path / "a.gguf", "BF16")
    odd = rewrite(path, tmp_path / "b.gguf", fields={"llama.rope.scaling.type": Field(gguf.GGUFValueType.STRING, "longrope")})
    with open_checkpoint(str(odd)) as source:
        assert "longrope" in source.notes[0]
        assert "blk.0.attn_q.weight" in source.specs


def test_rules_go_by_the_names_of_the_file(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", "starcoder2")
    rules = (Rule.parse(r"blk\.0\.attn_q", "keep"), Rule.parse(r"ffn_down", "q8_0"))
    go(path, tmp_path / "out.gguf", replace(of_type("gguf", "Q4_0"), rules=rules))
    specs = read_header(tmp_path / "out.gguf").specs
    assert specs["blk.0.attn_q.weight"].dtype == "BF16"
    assert {specs[f"blk.{i}.ffn_down.weight"].dtype for i in range(LAYERS)} == {"Q8_0"}


def test_stacks_of_experts_decode_in_their_shape(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", "mixtral")
    finished, _ = go(path, tmp_path / "out.gguf", of_type("gguf", "Q6_K"))
    with GgufCheckpoint(path, as_stored=True) as dense, GgufCheckpoint(finished.output, as_stored=True) as coded:
        name = "blk.1.ffn_down_exps.weight"
        assert coded.schemes[name] == Scheme.of("q6_k")
        W, W_hat = dense.read(name).float(), coded.read(name)
    assert W.shape == W_hat.shape
    assert 0 < float((W - W_hat).square().sum() / W.square().sum()) < 1e-3


@pytest.mark.parametrize("key", ["block_count", "attention.head_count"])
def test_a_size_that_is_no_number_is_refused(tmp_path: Path, key: str) -> None:
    path = rewrite(write_model(tmp_path / "a.gguf", "mamba"), tmp_path / "b.gguf", fields={f"mamba.{key}": text("many")})
    with pytest.raises(CheckpointError, match=key):
        open_checkpoint(str(path))


def test_an_output_does_not_replace_the_source(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", "llama")
    with pytest.raises(RecipeError, match="replace the model"):
        go(path, path, of_type("gguf", "Q8_0"))


@pytest.mark.parametrize("format_", ["hf", "gptq", "awq", "compressed-tensors", "bitsandbytes", "fp8"])
def test_a_file_taken_as_it_is_becomes_no_folder(tmp_path: Path, format_: str) -> None:
    path = write_model(tmp_path / "m.gguf", "starcoder2")
    with open_checkpoint(str(path)) as source, pytest.raises(UnsupportedError):
        list(pipeline.quantize(source, tmp_path / "out", that_keeps(source, format_)))


def test_its_memory_is_estimated(tmp_path: Path) -> None:
    with open_checkpoint(str(write_model(tmp_path / "m.gguf", "mixtral"))) as source:
        rows = {row["recipe"]: row["bpw"] for row in estimate(source, 512)["recipes"]}
    assert rows["q4_k_m"] < rows["q8_0"] < rows["bf16"]
