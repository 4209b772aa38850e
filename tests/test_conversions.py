"""Every cell of docs/conversions.md, tried: a model in each format and scheme, exported to each format, decodes as the table says."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quantcli import conversions, formats
from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.formats import open_checkpoint
from quantcli.planning.inspection import describe
from quantcli.planning.selection import that_keeps
from quantcli.recipe import PassSpec, Recipe
from quantcli.tensors import Scheme
from quantcli.walk import pipeline
from quantcli.walk.events import Finished, LayerDone, Planned

sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))

import tables

ROWS = [(format_, text) for format_, schemes in tables.CODED.items() for text in schemes]
DOWN = "model.layers.0.mlp.down_proj.weight"


def run(source: Checkpoint, target: Path, recipe: Recipe) -> tuple[Finished, list[LayerDone]]:
    events = list(pipeline.quantize(source, target, recipe))
    assert isinstance(events[-1], Finished)
    return events[-1], [event for event in events if isinstance(event, LayerDone)]


@pytest.fixture(scope="module")
def coded(tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """``coded(format, scheme)``: a small model in it."""
    dense, made = tiny_llama(layers=1, tied=True), {}

    def make(format_: str, text: str) -> Path:
        if (format_, text) not in made:
            made[format_, text] = tmp_path_factory.mktemp("coded") / "model"
            recipe = Recipe("coded", format_, (PassSpec("rtn"),), scheme=Scheme.parse(text))
            with open_checkpoint(str(dense)) as source:
                run(source, made[format_, text], recipe)
        return made[format_, text]

    return make


@pytest.mark.parametrize(("format_", "text"), ROWS)
def test_a_folder_holds_the_scheme_it_was_made_with(coded: Callable[[str, str], Path], format_: str, text: str) -> None:
    with open_checkpoint(str(coded(format_, text))) as source:
        assert source.kind == format_
        assert conversions.exactness(source.schemes[DOWN], Scheme.parse(text), tables.WIDTH) == conversions.EXACT


@pytest.mark.parametrize(("format_", "text"), ROWS)
def test_inspect_tells_every_dialect_in_the_same_words(coded: Callable[[str, str], Path], format_: str, text: str) -> None:
    with open_checkpoint(str(coded(format_, text))) as source:
        told = describe(source)["quantization"]
        assert told is not None
        scheme = source.schemes[DOWN]
    assert (told["dialect"], told["schemes"]) == (format_, {str(scheme): 7})
    assert told["bits"] == int(re.search(r"\d+", text)[0])  # type: ignore[index]
    assert told["group_size"] == scheme.get("group_size", scheme.get("block_size"))
    assert told["sym"] == scheme.get("sym")
    assert told["dense"] == {"model.embed_tokens.weight": 1}


@pytest.mark.parametrize("target", tables.writable())
@pytest.mark.parametrize(("format_", "text"), ROWS)
def test_a_cell_of_the_conversions_is_so(coded: Callable[[str, str], Path], tmp_path: Path, format_: str, text: str, target: str) -> None:
    expected, degree = tables.conversion(Scheme.parse(text), target)
    with open_checkpoint(str(coded(format_, text))) as source:
        recipe = that_keeps(source, target)
        finished, layers = run(source, tmp_path / ("out.gguf" if target == "gguf" else "out"), recipe)
        error = next(layer.relative_error for layer in layers if layer.name == "model.layers.0")
        with open_checkpoint(str(finished.output)) as result:
            assert result.kind == target
            if expected is None:
                assert DOWN not in result.schemes
            else:
                if degree == "requantized":
                    expected = formats.of(target).suited(expected, source.config)
                assert conversions.exactness(result.schemes[DOWN], expected, tables.WIDTH) == conversions.EXACT
            same = all(torch.equal(result.read(name), source.read(name)) for name in source.schemes)
    if degree == "exact":
        assert same
        assert finished.lossless
        assert error == 0
    elif degree == "codes":
        assert finished.lossless == same
        assert error is not None
        assert error < 1e-6
    elif expected is not None:
        assert not finished.lossless
        assert error is not None
        assert 0 < error < 0.05


@pytest.mark.parametrize(("format_", "text"), ROWS)
def test_a_dense_export_in_float32_keeps_every_bit(coded: Callable[[str, str], Path], tmp_path: Path, format_: str, text: str) -> None:
    with open_checkpoint(str(coded(format_, text))) as source:
        recipe = replace(Recipe("f32", "hf", (PassSpec("rtn"),), scheme=Scheme.parse("f32")), codes="reuse")
        finished, _ = run(source, tmp_path / "out", recipe)
        assert finished.lossless
        with open_checkpoint(str(finished.output)) as result:
            assert all(torch.equal(result.read(name), source.read(name)) for name in source.schemes)


@pytest.fixture(scope="module")
def hqq_folder(tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model as hqq saves one of 4 bits in groups of 64 inputs."""
    dense, folder = tiny_llama(layers=1, tied=True), tmp_path_factory.mktemp("hqq") / "model"
    folder.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    with open_checkpoint(str(dense)) as source:
        for name in source.specs:
            W = source.read(name)
            tensors |= as_hqq(name.removesuffix(".weight"), W) if "_proj" in name else {name: W}
        for file, path in source.sidecars().files.items():
            (folder / file).write_bytes(path.read_bytes())
        words = {"quant_method": "hqq", "quant_config": {}, "skip_modules": []}
        (folder / "config.json").write_text(json.dumps(source.config | {"quantization_config": words}))
    save_file(tensors, folder / "model.safetensors")
    return folder


def as_hqq(module: str, W: torch.Tensor) -> dict[str, torch.Tensor]:
    V = W.float().view(-1, 64)
    low, high = V.amin(1, keepdim=True), V.amax(1, keepdim=True)
    scale = ((high - low) / 15).half()
    zero = (-low / scale).half()
    codes = (V / scale + zero).round().clamp(0, 15).to(torch.uint8)
    half = codes.shape[0] // 2
    settings = {"shape": torch.tensor(W.shape), "nbits": torch.tensor(4), "group_size": torch.tensor(64), "axis": torch.tensor(1)}
    settings["packing"] = torch.tensor(list(b"4bit_u8"), dtype=torch.uint8)
    made = {"W_q": codes[:half] << 4 | codes[half:], "scale": scale, "zero": zero, **settings}
    return {f"{module}.{part}": tensor for part, tensor in made.items()}


def test_hqqs_codes_go_to_gguf_and_the_result_says_so(hqq_folder: Path, tmp_path: Path) -> None:
    with open_checkpoint(str(hqq_folder)) as source:
        recipe = that_keeps(source, "gguf")
        events = list(pipeline.quantize(source, tmp_path / "out.gguf", recipe))
        assert isinstance(events[0], Planned)
        assert isinstance(events[-1], Finished)
        with open_checkpoint(str(events[-1].output)) as result:
            assert {str(result.schemes[name]) for name in source.schemes} == {"q4_1"}
            W, W_hat = source.read(DOWN), result.read(DOWN)
    assert not events[-1].lossless
    assert float((W - W_hat).square().sum() / W.square().sum()) < 1e-5  # the minima in float16, and hqq's own rounding
    assert any("keep their codes, and a scale or minimum is rounded to what q4_1 stores" in note for note in events[0].plan.notes)
