"""HQQ folders: what hqq's own HQQLinear saved (tests/data/make_golden_hqq.py) against the weights that it computes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantcli.errors import CheckpointError, RecipeError, UnsupportedError
from quantcli.formats import hqq, open_checkpoint
from quantcli.qtypes.hqq import QTYPE as hqq_qtype
from quantcli.tensors import Scheme
from support.mutations import wrong_answers
from support.places import DATA

GOLDEN = load_file(DATA / "hqq_golden.safetensors")
CASES = sorted({name.partition("/")[0] for name in GOLDEN if "axis" in name})
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
WORDS = {
    "quant_method": "hqq",
    "quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 16, "axis": 1}, "scale_quant_params": None},
    "skip_modules": ["lm_head"],
}


def folder_of(folder: Path, modules: Mapping[str, str], words: Mapping = WORDS, **changed: torch.Tensor | None) -> Path:
    """A folder whose modules are cases of the golden file; ``changed`` tensors by their name in the folder, None removes."""
    folder.mkdir()
    tensors: dict[str, torch.Tensor | None] = {"model.norm.weight": torch.ones(32)}
    for module, case in modules.items():
        tensors |= {
            f"{module}.{n.partition('/')[2]}": t.clone() for n, t in GOLDEN.items() if n.startswith(f"{case}/") and "weight" not in n
        }
    kept = {name: tensor for name, tensor in {**tensors, **changed}.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": words}))
    return folder


@pytest.mark.parametrize("case", CASES)
def test_weights_are_those_that_hqq_computes(tmp_path: Path, case: str) -> None:
    with open_checkpoint(str(folder_of(tmp_path / "x", {Q: case}))) as source:
        assert source.kind == "hqq"
        assert source.notes == ()
        assert source.specs.keys() == {f"{Q}.weight", "model.norm.weight"}
        assert source.specs[f"{Q}.weight"].shape == (32, 48)
        assert torch.equal(source.read(f"{Q}.weight"), GOLDEN[f"{case}/weight"])
        scheme = source.schemes[f"{Q}.weight"]
        assert scheme.get("bits") == float(case.partition("-")[0])
        parts = source.quantized(f"{Q}.weight").parts
        for name, spec in hqq_qtype.layout((32, 48), scheme).items():
            assert tuple(parts[name].shape) == spec.shape
        assert int(parts["codes"].max()) <= 2 ** float(case.partition("-")[0])


def test_every_byte_of_a_module_is_counted(tmp_path: Path) -> None:
    with open_checkpoint(str(folder_of(tmp_path / "x", {Q: "4-g16-axis1"}))) as source:
        assert source.specs[f"{Q}.weight"].nbytes == sum(
            t.nbytes for name, t in GOLDEN.items() if name.startswith("4-g16-axis1/") and "weight" not in name
        )


def test_modules_may_differ(tmp_path: Path) -> None:
    with open_checkpoint(str(folder_of(tmp_path / "x", {Q: "4-g16-axis1", DOWN: "2-g16-axis0"}))) as source:
        assert torch.equal(source.read(f"{DOWN}.weight"), GOLDEN["2-g16-axis0/weight"])
        assert torch.equal(source.read(f"{Q}.weight"), GOLDEN["4-g16-axis1/weight"])


def text(word: str) -> torch.Tensor:
    return torch.tensor(list(word.encode()), dtype=torch.uint8)


BAD: dict[str, tuple[str, torch.Tensor | None, str]] = {
    "no shape": ("shape", None, "shape is missing or no setting"),
    "a shape of three": ("shape", torch.tensor([1, 2, 3]), "shape is .*which hqq never writes"),
    "a shape of another size": ("shape", torch.tensor([64, 48]), "do not fit"),
    "a negative shape": ("shape", torch.tensor([-32, -48]), "which hqq never writes"),
    "a shape of floats": ("shape", torch.tensor([32.0, 48.0]), "which hqq never writes"),
    "a packing of no one": ("packing", text("4bit_u4"), "which hqq never writes"),
    "a packing of other bits": ("packing", text("2bit_u8"), "nbits is 4, which"),
    "bits of no one": ("nbits", torch.tensor(7, dtype=torch.int32), "nbits is 7, which"),
    "bits that are not a number": ("nbits", torch.tensor(float("nan")), "nbits is nan, which"),
    "a group size that does not divide": ("group_size", torch.tensor(31, dtype=torch.int32), "groups of 31 do not cover"),
    "a group size of zero": ("group_size", torch.tensor(0, dtype=torch.int32), "which hqq never writes"),
    "a third axis": ("axis", torch.tensor(2, dtype=torch.int32), "which hqq never writes"),
    "half the scales": ("scale", torch.ones(48, 1).half(), "do not fit"),
    "scales of integers": ("scale", torch.ones(96, 1, dtype=torch.int32), "do not fit"),
    "zeros of another dtype": ("zero", torch.ones(96, 1), "do not fit"),
    "half the codes": ("W_q", torch.ones(24, 16, dtype=torch.uint8), "do not fit"),
}


@pytest.mark.parametrize("case", BAD)
def test_settings_and_tensors_that_do_not_fit_are_an_error_by_name(tmp_path: Path, case: str) -> None:
    key, tensor, message = BAD[case]
    folder = folder_of(tmp_path / "x", {Q: "4-g16-axis1"}, **{f"{Q}.{key}": tensor})
    with pytest.raises(CheckpointError, match=rf"{Q}.*{message}"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"quant_scale": torch.tensor(1, dtype=torch.uint8)}, "scales that are quantized themselves"),
        ({"quant_zero": torch.tensor(1, dtype=torch.uint8)}, "scales that are quantized themselves"),
        ({"scale": None, "zero": None, "zero_scale": torch.ones(2, 96, 1)}, "offload_meta=False"),
    ],
)
def test_what_hqq_says_it_cannot_save_is_unsupported(tmp_path: Path, more: Mapping[str, torch.Tensor | None], message: str) -> None:
    folder = folder_of(tmp_path / "x", {Q: "4-g16-axis1"}, **{f"{Q}.{key}": tensor for key, tensor in more.items()})
    with pytest.raises(UnsupportedError, match=message):
        open_checkpoint(str(folder))


def test_a_skipped_module_that_is_quantized_is_noted(tmp_path: Path) -> None:
    words = {**WORDS, "skip_modules": ["lm_head", "self_attn.q_proj", 7]}
    with open_checkpoint(str(folder_of(tmp_path / "x", {Q: "4-g16-axis1"}, words))) as source:
        assert source.notes == (f"skip_modules has 'self_attn.q_proj', and {Q}.weight is quantized; it is read as it is",)


def test_words_over_a_dense_folder_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tensor's name ends in \.W_q"):
        open_checkpoint(str(folder_of(tmp_path / "x", {})))


def test_it_is_neither_written_nor_made(tmp_path: Path) -> None:
    scheme = Scheme.parse("hqq4-g16")
    with open_checkpoint(str(folder_of(tmp_path / "x", {Q: "4-g16-axis1"}))) as source:
        assert not hqq.FORMAT.supports(scheme)
        with pytest.raises(UnsupportedError, match="--method hqq writes"):
            hqq.FORMAT.layout(source, source.schemes)
    with pytest.raises(UnsupportedError, match="hqq-int4"):
        hqq_qtype.fit(torch.ones(4, 16), scheme)
    with pytest.raises(RecipeError, match="groups of 16 do not cover"):
        hqq_qtype.layout((3, 5), scheme)


@pytest.mark.parametrize("n", [300, pytest.param(5000, marks=pytest.mark.slow)])
def test_damaged_folders_are_an_error_or_read(tmp_path: Path, n: int) -> None:
    folder = folder_of(tmp_path / "x", {Q: "4-g16-axis1", DOWN: "3-g16-axis1-float"})
    assert wrong_answers(folder, tmp_path, seed=0, n=n) == []
