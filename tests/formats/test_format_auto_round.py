"""AutoRound folders: words packed by auto-round's own classes (tests/data/make_golden_auto_round.py) against the weights those compute."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantcli.errors import CheckpointError, UnsupportedError
from quantcli.formats import auto_round, open_checkpoint
from quantcli.tensors import Scheme
from support.mutations import wrong_answers
from support.places import DATA

GOLDEN = load_file(DATA / "auto_round_golden.safetensors")
CASES = sorted({name.partition("/")[0] for name in GOLDEN})
PACKINGS = {"zp": "auto_round:auto_gptq", "plain": "auto_round", "awq": "auto_round:auto_awq"}
DOWN, UP = "model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj"


def folder_of(folder: Path, modules: Mapping[str, str], words: Mapping[str, Any]) -> Path:
    """A folder whose modules are cases of the golden file, with words as auto-round writes them; None removes one."""
    folder.mkdir()
    tensors = {
        f"{module}.{part}": GOLDEN[f"{case}/{part}"].clone() for module, case in modules.items() for part in ("qweight", "qzeros", "scales")
    }
    save_file({**tensors, "model.norm.weight": torch.ones(64)}, folder / "model.safetensors")
    kind, bits = next(iter(modules.values())).split("-")
    common = {
        "autoround_version": "0.15.1",
        "bits": int(bits),
        "block_name_to_quantize": "model.layers",
        "data_type": "int",
        "group_size": 32,
        "packing_format": PACKINGS[kind],
        "quant_method": "auto-round",
        "sym": False,
    }
    merged = {key: value for key, value in {**common, **words}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": merged}))
    return folder


@pytest.mark.parametrize("case", CASES)
def test_weights_are_those_that_auto_round_computes(tmp_path: Path, case: str) -> None:
    with open_checkpoint(str(folder_of(tmp_path / "x", {DOWN: case}, {}))) as source:
        assert source.kind == "auto-round"
        assert source.notes == ()
        assert source.schemes == {f"{DOWN}.weight": Scheme.of("int", bits=int(case[-1]), group_size=32, sym=False)}
        assert torch.equal(source.read(f"{DOWN}.weight"), GOLDEN[f"{case}/weight"])
        assert torch.equal(source.read("model.norm.weight"), torch.ones(64))


@pytest.mark.parametrize(
    ("words", "case"),
    [
        ({"packing_format": "auto_round:gptq"}, "zp-4"),
        ({"packing_format": "auto_gptq"}, "zp-4"),
        ({"packing_format": "auto_round:auto_gptq:exllamav2"}, "zp-4"),
        ({"packing_format": None}, "zp-4"),
        ({"packing_format": "auto"}, "zp-4"),
        ({"packing_format": "auto_round:exllamav2"}, "plain-4"),
        ({"packing_format": "auto_round:tritonv2"}, "plain-4"),
        ({"packing_format": "auto_round:gptqmodel"}, "plain-4"),
        ({"packing_format": None, "backend": "auto_round:gptq:exllamav2"}, "zp-4"),
        ({"packing_format": "auto_round:awq"}, "awq-4"),
        ({"quant_method": "intel/auto-round"}, "zp-4"),
    ],
)
def test_the_packing_is_told_as_auto_round_tells_it(tmp_path: Path, words: Mapping[str, Any], case: str) -> None:
    with open_checkpoint(str(folder_of(tmp_path / "x", {DOWN: case}, words))) as source:
        assert torch.equal(source.read(f"{DOWN}.weight"), GOLDEN[f"{case}/weight"])


def test_settings_by_module_are_read(tmp_path: Path) -> None:
    words = {"extra_config": {DOWN: {"bits": 8}, ".*\\.k_proj": {"bits": 16}, "(": {"bits": 3}, "lm_head": 7}}
    with open_checkpoint(str(folder_of(tmp_path / "x", {UP: "zp-4", DOWN: "zp-8"}, words))) as source:
        assert source.notes == ()
        assert [str(scheme) for scheme in source.schemes.values()] == ["int8-g32-asym", "int4-g32-asym"]
        assert torch.equal(source.read(f"{DOWN}.weight"), GOLDEN["zp-8/weight"])


@pytest.mark.parametrize(
    ("words", "note"),
    [
        ({"bits": 8}, f"the bits declared are not those of {DOWN}"),
        ({"group_size": 64}, f"the group_size declared is not that of {DOWN}"),
        ({"extra_config": {".*down": {"bits": 16}}}, f"the metadata leave {DOWN} (4 bits, groups of 32) dense, which is quantized"),
        ({"sym": True}, f"sym is true, and the zero points of {DOWN}"),
    ],
)
def test_words_that_contradict_the_tensors_are_noted(tmp_path: Path, words: Mapping[str, Any], note: str) -> None:
    with open_checkpoint(str(folder_of(tmp_path / "x", {DOWN: "zp-4"}, words))) as source:
        assert len(source.notes) == 1
        assert note in source.notes[0]
        assert torch.equal(source.read(f"{DOWN}.weight"), GOLDEN["zp-4/weight"])


@pytest.mark.parametrize(("packing", "word", "noted"), [("auto_round", 0x77777777, True), ("auto_round:auto_gptq", 0x77777777, False)])
def test_symmetric_zero_points_tell_how_they_are_stored(tmp_path: Path, packing: str, word: int, noted: bool) -> None:
    folder = folder_of(tmp_path / "x", {DOWN: "zp-4"}, {"sym": True, "packing_format": packing})
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{DOWN}.qzeros"].fill_(word)
    save_file(tensors, folder / "model.safetensors")
    with open_checkpoint(str(folder)) as source:
        assert bool(source.notes) == noted
        assert set(source.quantized(f"{DOWN}.weight").parts["zero"].flatten().tolist()) == {8}


@pytest.mark.parametrize(
    "words",
    [
        {"data_type": "mx_fp"},
        {"data_type": "fp", "act_bits": 8},
        {"act_bits": 8},
        {"rotation_config": {"kind": "hadamard"}},
        *({"packing_format": f"auto_round:{p}"} for p in ("fp8_static", "llm_compressor", "mlx", "mx_fp4", "nv_fp4")),
        {"packing_format": ["auto_round:auto_gptq"]},
    ],
)
def test_what_is_more_than_integers_is_unsupported(tmp_path: Path, words: Mapping[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match="export it by auto-round as auto_gptq"):
        open_checkpoint(str(folder_of(tmp_path / "x", {DOWN: "zp-4"}, words)))


def test_awq_of_other_bits_is_unsupported(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "x", {DOWN: "awq-4"}, {})
    tensors = load_file(folder / "model.safetensors")
    more = {f"{DOWN}.qweight": torch.ones(64, 8, dtype=torch.int32), f"{DOWN}.qzeros": torch.ones(2, 8, dtype=torch.int32)}
    save_file({**tensors, **more}, folder / "model.safetensors")
    with pytest.raises(UnsupportedError, match="has 8 bits"):
        open_checkpoint(str(folder))


def test_words_over_a_dense_folder_are_an_error(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "x", {DOWN: "zp-4"}, {})
    save_file({"model.norm.weight": torch.ones(64)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="declares auto-round, and no tensor's name"):
        open_checkpoint(str(folder))


def test_it_is_not_written(tmp_path: Path) -> None:
    with open_checkpoint(str(folder_of(tmp_path / "x", {DOWN: "zp-4"}, {}))) as source:
        assert not auto_round.FORMAT.supports(source.schemes[f"{DOWN}.weight"])
        with pytest.raises(UnsupportedError, match="--format gptq or awq"):
            auto_round.FORMAT.layout(source, source.schemes)


@pytest.mark.parametrize("n", [300, pytest.param(5000, marks=pytest.mark.slow)])
def test_damaged_folders_are_an_error_or_read(tmp_path: Path, n: int) -> None:
    words = {"extra_config": {UP: {"bits": 8}, ".*\\.k_proj": {"bits": 16}}}
    folder = folder_of(tmp_path / "x", {DOWN: "zp-4", UP: "zp-8"}, words)
    assert wrong_answers(folder, tmp_path, seed=0, n=n) == []
