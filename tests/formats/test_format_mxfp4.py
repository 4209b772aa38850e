"""gpt-oss's MXFP4 folders: every expert's linear with the codes it has, and the weights that transformers decodes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from quantcli.errors import CheckpointError, UnsupportedError
from quantcli.formats import mxfp4, open_checkpoint
from quantcli.planning.selection import that_keeps
from quantcli.tensors import Scheme
from quantcli.walk import pipeline
from support import families
from support.mutations import wrong_answers

EXPERTS = "model.layers.0.mlp.experts"
HIDDEN, WIDE, N = 64, 96, 3


def tensors() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)

    def stack(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        blocks = torch.randint(0, 256, (N, rows, columns // 32, 16), generator=random, dtype=torch.uint8)
        return blocks, torch.randint(118, 124, (N, rows, columns // 32), generator=random, dtype=torch.uint8)

    out = {"model.norm.weight": torch.ones(HIDDEN), f"{EXPERTS}.gate_up_proj_bias": torch.randn(N, 2 * WIDE, generator=random).bfloat16()}
    for linear, rows, columns in (("gate_up_proj", 2 * WIDE, HIDDEN), ("down_proj", HIDDEN, WIDE)):
        out[f"{EXPERTS}.{linear}_blocks"], out[f"{EXPERTS}.{linear}_scales"] = stack(rows, columns)
    return out


def folder_of(folder: Path, **changed: torch.Tensor | None) -> Path:
    """A folder of one layer's experts; ``changed`` stacks by their last word, None removes."""
    folder.mkdir()
    made: dict[str, torch.Tensor | None] = dict(tensors())
    made |= {f"{EXPERTS}.{name}": tensor for name, tensor in changed.items()}
    save_file({name: tensor for name, tensor in made.items() if tensor is not None}, folder / "model.safetensors")
    words = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt_oss", "quantization_config": words}))
    return folder


def test_weights_are_those_that_transformers_decodes(tmp_path: Path) -> None:
    stored = tensors()
    gate_up, down = (
        convert_moe_packed_tensors(stored[f"{EXPERTS}.{linear}_blocks"], stored[f"{EXPERTS}.{linear}_scales"], dtype=torch.float32)
        for linear in ("gate_up_proj", "down_proj")
    )
    with open_checkpoint(str(folder_of(tmp_path / "x"))) as source:
        assert source.kind == "mxfp4"
        assert {str(scheme) for scheme in source.schemes.values()} == {"mxfp4"}
        for e in range(N):
            for name, expected in (("gate", gate_up[e, :, ::2].T), ("up", gate_up[e, :, 1::2].T), ("down", down[e].T)):
                W = source.read(f"{EXPERTS}.{e}.{name}_proj.weight")
                assert torch.equal(W, expected), (e, name)
                assert source.specs[f"{EXPERTS}.{e}.{name}_proj.weight"].shape == tuple(W.shape)


def test_made_dense_it_is_the_folder_that_transformers_decodes_it_to(tmp_path: Path) -> None:
    folder = families.make("gpt-oss, mxfp4", tmp_path / "model")
    with open_checkpoint(str(folder)) as source:
        list(pipeline.quantize(source, tmp_path / "dense", that_keeps(source, "hf")))
    packed, dense = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "dense"))
    stacks = {name.removesuffix("_blocks") for name in packed if name.endswith("_blocks")}
    assert dense.keys() == {name for name in packed if not name.endswith(("_blocks", "_scales"))} | stacks
    for name in stacks:
        expected = convert_moe_packed_tensors(packed[f"{name}_blocks"], packed[f"{name}_scales"], dtype=torch.bfloat16)
        assert torch.equal(dense[name], expected)
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())


def test_every_byte_is_counted_and_what_is_dense_stays(tmp_path: Path) -> None:
    with open_checkpoint(str(folder_of(tmp_path / "x"))) as source:
        assert sum(spec.nbytes for spec in source.specs.values()) == sum(tensor.nbytes for tensor in tensors().values())
        assert torch.equal(source.read(f"{EXPERTS}.gate_up_proj_bias"), tensors()[f"{EXPERTS}.gate_up_proj_bias"])
        assert len(source.specs) == 3 * N + 2


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"down_proj_scales": None}, "no .*down_proj_scales next to it"),
        ({"down_proj_blocks": None}, "down_proj_scales has no blocks"),
        ({"down_proj_scales": torch.zeros(N, HIDDEN, 7, dtype=torch.uint8)}, "the same groups"),
        ({"down_proj_blocks": torch.zeros(N, HIDDEN, 3, 8, dtype=torch.uint8)}, "expected U8"),
        ({"gate_up_proj_blocks": torch.zeros(N, 7, 2, 16, dtype=torch.uint8)}, "expected U8"),
        ({"down_proj_blocks": torch.zeros(N, HIDDEN, 3, 16)}, "are F32"),
        ({"1.down_proj.weight": torch.zeros(HIDDEN, WIDE)}, "both dense and quantized"),
    ],
)
def test_stacks_that_do_not_fit_are_refused(tmp_path: Path, changed: dict[str, torch.Tensor | None], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(str(folder_of(tmp_path / "x", **changed)))


def test_a_dense_folder_that_says_mxfp4_is_refused(tmp_path: Path) -> None:
    gone = {f"{linear}_{part}": None for linear in ("gate_up_proj", "down_proj") for part in ("blocks", "scales")}
    with pytest.raises(CheckpointError, match="no tensor's name ends in _blocks"):
        open_checkpoint(str(folder_of(tmp_path / "x", **gone)))


def test_damaged_folders_are_answered(tmp_path: Path) -> None:
    assert wrong_answers(folder_of(tmp_path / "x"), tmp_path, seed=0, n=300) == []


def test_it_is_read_and_not_written() -> None:
    assert not mxfp4.FORMAT.supports(Scheme.of("mxfp4"))
    with pytest.raises(UnsupportedError, match="compressed-tensors and gguf"):
        mxfp4.FORMAT.layout(None, {})  # type: ignore[arg-type]
