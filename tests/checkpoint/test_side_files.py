"""What lies beside the weights goes along: all that is small, no weight, no pickle and no link out of the folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from quantcli.checkpoint import side_files
from quantcli.checkpoint.hub import model_name, repository_of
from quantcli.formats import open_checkpoint
from support.runs import run
from support.tiny_models import TinyLlama

SMALL = {"hidden": 64, "intermediate": 128, "layers": 1}
USUAL = {"generation_config.json", "tokenizer.json", "tokenizer_config.json"}


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"of {name}")


def found(folder: Path) -> side_files.SideFiles:
    with open_checkpoint(str(folder)) as source:
        return source.sidecars()


def modules(folder: Path, *paths: str) -> None:
    (folder / "modules.json").write_text(json.dumps([{"name": str(i), "path": path} for i, path in enumerate(paths)]))


def test_every_small_file_is_in_the_output_byte_for_byte(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    folder = tiny_llama(**SMALL)
    names = ["USE_POLICY.md", "README.md", "LICENSE", "Notice.txt", "merges.txt", ".gitattributes", "preprocessor_config.json", "code.py"]
    names += ["1_Pooling/config.json", "additional_chat_templates/tool.jinja", "assets/voices/one.json"]
    put(folder, *names)
    run(folder, tmp_path / "out", "fp8-dynamic")
    assert {name for name in names if (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()} == set(names)


def test_weights_pickles_and_caches_stay_behind_and_the_plan_says_so(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    folder = tiny_llama(**SMALL, shards=2)
    silent = ["__pycache__/code.cpython-311.pyc", ".git/config", ".cache/huggingface/x.json", ".env", "pytorch_model.bin.index.json"]
    silent += ["quantcli.json", "trainer_state.json", "hf_quant_config.json"]
    told = [
        "pytorch_model.bin",
        "training_args.bin",
        "scaler.pkl",
        "tf_model.h5",
        "flax_model.msgpack",
        "consolidated.safetensors",
        "x.npy",
    ]
    inside = ["onnx/model.onnx", "onnx/config.json", "checkpoint-5/model.safetensors", "checkpoint-5/tokenizer.json", "runs/a/b.pt"]
    put(folder, *silent, *told, *inside)
    result = found(folder)
    assert set(result.files) == USUAL
    assert set(result.left) == {*told, "onnx/", "checkpoint-5/", "runs/"}
    planned, *_ = run(folder, tmp_path / "out", "fp8-dynamic")
    note = next(note for note in planned.notes if "not copied" in note)
    assert "pytorch_model.bin, scaler.pkl and 2 more (pickle)" in note
    assert "\n" not in note
    written = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert written == USUAL | {"config.json", "quantcli.json", "model.safetensors"}


def test_a_module_of_an_embedding_model_has_weights_that_belong_to_it(tiny_llama: TinyLlama) -> None:
    folder = tiny_llama(**SMALL)
    modules(folder, "", "1_Pooling", "2_Dense", "../elsewhere", "3_Normalize")
    put(folder, "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors", "2_Dense/pytorch_model.bin")
    result = found(folder)
    expected = {"modules.json", "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"}
    assert set(result.files) == USUAL | expected
    assert result.left == {"2_Dense/pytorch_model.bin": "pickle"}


def test_a_link_goes_along_only_where_it_stays_inside(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    folder = tiny_llama(**SMALL)
    put(tmp_path, "secret.txt", "far/notes.md")
    put(folder, "real.md")
    (folder / "inside.md").symlink_to("real.md")
    (folder / "outside.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "far").symlink_to(tmp_path / "far")
    (folder / "gone.txt").symlink_to("nowhere")
    result = found(folder)
    assert set(result.files) == USUAL | {"real.md", "inside.md"}
    assert result.left == {"outside.txt": "a link out of the folder", "far/": "a link"}


def snapshot(folder: Path, cache: Path, name: str = "models--acme--Tiny-Llama Ü") -> Path:
    """``folder`` as the Hub's cache has it: a snapshot of links to blobs, read-only."""
    snap, blobs = cache / name / "snapshots" / ("0123456789" * 4), cache / name / "blobs"
    for i, file in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        link = snap / file.relative_to(folder)
        for path in (link, blobs / "x"):
            path.parent.mkdir(parents=True, exist_ok=True)
        (blobs / str(i)).write_bytes(file.read_bytes())
        link.symlink_to(os.path.relpath(blobs / str(i), link.parent))
    return snap


def test_a_snapshot_of_the_hub_has_its_links_and_its_repositorys_name(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    folder = tiny_llama(**SMALL)
    put(folder, "1_Pooling/config.json", "LICENSE")
    snap = snapshot(folder, tmp_path / "hub")
    put(tmp_path, "secret.txt")
    (snap / "outside.txt").symlink_to(tmp_path / "secret.txt")
    result = found(snap)
    assert set(result.files) == USUAL | {"1_Pooling/config.json", "LICENSE"}
    assert set(result.left) == {"outside.txt"}
    assert repository_of(snap) == "acme/Tiny-Llama Ü"
    assert model_name(str(snap)) == "Tiny-Llama Ü"
    assert repository_of(folder) is None
    assert repository_of(snapshot(folder, tmp_path / "old", "models--gpt2")) == "gpt2"


def test_what_is_too_large_or_too_much_is_named(tiny_llama: TinyLlama, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_llama(**SMALL)
    put(folder, "big.json", "z1.json", "z2.json")
    (folder / "big.json").write_text("x" * 100_000)
    monkeypatch.setattr(side_files, "MAX_FILE_BYTES", 90_000)
    assert "big.json" in found(folder).left
    monkeypatch.setattr(side_files, "MAX_FILES", 4)
    result = found(folder)
    assert len(result.files) == 4
    assert "z2.json" in result.left


@pytest.mark.parametrize("text", ["{", "5", '[{"path": 3}, 7, {"path": ".."}, {"path": "a/../../b"}, {"path": "/etc"}]'])
def test_a_strange_list_of_modules_names_no_folder(tmp_path: Path, text: str) -> None:
    (tmp_path / "modules.json").write_text(text)
    assert side_files.module_folders(tmp_path) == set()
