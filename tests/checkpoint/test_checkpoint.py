"""Opening: what a source may be, what is refused, and that every refusal says why and what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, errors
from safetensors.torch import load_file, save_file

from quantcli.checkpoint import locations
from quantcli.checkpoint.hub import hub_way_out
from quantcli.checkpoint.shards import layout
from quantcli.errors import CheckpointError, UnsupportedError
from quantcli.formats import open_checkpoint
from quantcli.output import disk
from quantcli.tensors import TensorSpec
from support.gguf_export import export

TinyLlama = Callable[..., Path]
SMALL = {"hidden": 64, "intermediate": 96, "layers": 1, "heads": 2, "vocab": 300}


def test_a_folder_opens_with_its_config_and_specs_and_reads_what_is_stored(tiny_llama: TinyLlama) -> None:
    folder = tiny_llama(**SMALL)
    stored = load_file(folder / "model.safetensors")
    with open_checkpoint(str(folder)) as checkpoint:
        assert (checkpoint.kind, checkpoint.source, checkpoint.path) == ("hf", str(folder), folder)
        assert (checkpoint.schemes, checkpoint.quantization, checkpoint.notes) == ({}, None, ())
        assert checkpoint.config == json.loads((folder / "config.json").read_text())
        assert {name: spec.shape for name, spec in checkpoint.specs.items()} == {name: tuple(t.shape) for name, t in stored.items()}
        for name, tensor in stored.items():
            assert torch.equal(checkpoint.read(name), tensor)
            assert checkpoint.read(name).dtype == tensor.dtype


def test_a_home_path_is_expanded(tiny_llama: TinyLlama, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_llama(**SMALL)
    monkeypatch.setenv("HOME", str(folder.parent))
    assert open_checkpoint(f"~/{folder.name}").specs


def test_unknown_and_unquantized_tensors_are_errors_by_name(tiny_llama: TinyLlama) -> None:
    with open_checkpoint(str(tiny_llama(**SMALL))) as checkpoint:
        for read in (checkpoint.read, checkpoint.quantized):
            with pytest.raises(CheckpointError, match=r"no tensor x\.weight among its"):
                read("x.weight")
        with pytest.raises(CheckpointError, match=r"lm_head\.weight is not quantized"):
            checkpoint.quantized("lm_head.weight")


def fingerprint(source: Path) -> str:
    with open_checkpoint(str(source)) as checkpoint:
        return checkpoint.fingerprint()


def test_a_copy_has_the_fingerprint_of_its_model_in_other_shards_and_with_another_config_too(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    folder = tiny_llama(**SMALL)
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / "config.json").write_text(json.dumps({**json.loads((folder / "config.json").read_text()), "transformers_version": "9"}))
    assert fingerprint(copy) == fingerprint(tiny_llama(**SMALL, shards=3)) == fingerprint(folder)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight", "model.norm.weight"])
def test_a_fine_tune_of_the_same_shapes_has_another_fingerprint(tiny_llama: TinyLlama, tmp_path: Path, name: str) -> None:
    folder = tiny_llama(**SMALL)
    tuned = Path(shutil.copytree(folder, tmp_path / "tuned"))
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = tensors[name] * 1.01
    save_file(tensors, tuned / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(tuned) != fingerprint(folder)


def test_the_same_bytes_under_another_shape_have_another_fingerprint(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    folder = tiny_llama(**SMALL)
    turned = Path(shutil.copytree(folder, tmp_path / "turned"))
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    save_file({**tensors, name: tensors[name].view(tensors[name].T.shape)}, turned / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(turned) != fingerprint(folder)


def test_a_gguf_file_has_a_fingerprint_of_its_data(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    with open_checkpoint(str(tiny_llama(**{**SMALL, "vocab": 512}))) as source:
        files = [export(source, tmp_path / f"{i}.gguf", kind) for i, kind in enumerate(("F32", "F32", "F16"))]
    first, same, other = map(fingerprint, files)
    assert first == same != other


def test_a_fingerprint_reads_a_kib_of_each_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (file,), _ = layout([TensorSpec.dense(f"t{i}", "F32", (1024, 1024)) for i in range(16)])
    with open(tmp_path / file.name, "wb") as out:
        out.write(file.header)
        out.truncate(file.size)
    (tmp_path / "config.json").write_text("{}")
    n_read: list[int] = []
    real = disk.read_exactly
    monkeypatch.setattr(disk, "read_exactly", lambda fd, n: n_read.append(n) or real(fd, n))
    monkeypatch.setattr(locations, "mapped", lambda *_: pytest.fail("a whole tensor was mapped"))
    assert len(fingerprint(tmp_path)) == 64
    assert sum(n_read) < 16 * 1024 + 3 * len(file.header)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "model.ckpt"])
@pytest.mark.parametrize("as_file", [True, False])
def test_pickles_are_refused_with_the_reason_and_the_way_out(tmp_path: Path, name: str, as_file: bool) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch /tmp/owned'\ntR.")
    with pytest.raises(CheckpointError, match=r"pickle runs whatever code .*save_pretrained") as caught:
        open_checkpoint(str(tmp_path / name if as_file else tmp_path))
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("word", "value"),
    [("model_type", ["llama"]), ("model_type", {}), ("architectures", 3), ("architectures", ["A", None]), ("text_config", "llama")],
)
def test_words_that_name_a_model_by_values_of_another_kind_are_told(tiny_llama: TinyLlama, word: str, value: object) -> None:
    folder = tiny_llama(**SMALL)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {word: value}))
    with pytest.raises(CheckpointError, match=rf"config\.json: {word} is .* where .* belongs"):
        open_checkpoint(str(folder))


def test_a_pickle_beside_safetensors_is_ignored(tiny_llama: TinyLlama) -> None:
    folder = tiny_llama(**SMALL)
    (folder / "training_args.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    assert open_checkpoint(str(folder)).kind == "hf"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, r"config\.json: missing"),
        ("{", r"config\.json: not valid JSON"),
        ("[]", r"config\.json: is not a JSON object"),
        ("[" * 100_000, r"config\.json: not valid JSON: nested too deeply"),
        ('{"a": "\udcff"}', r"config\.json: not valid JSON"),
    ],
)
def test_a_config_that_is_none_is_an_error(tiny_llama: TinyLlama, config: str | None, message: str) -> None:
    folder = tiny_llama(**SMALL)
    (folder / "config.json").unlink()
    if config is not None:
        (folder / "config.json").write_bytes(config.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(str(folder))


def test_a_sloppy_config_is_read_as_every_reader_reads_it(tiny_llama: TinyLlama) -> None:
    folder = tiny_llama(**SMALL)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text('{"vocab_size": 1, "time_step_limit": [0.0, Infinity],' + text.lstrip()[1:])
    assert open_checkpoint(str(folder)).config["vocab_size"] == 300


def test_a_dialect_nobody_reads_is_unsupported_by_name(tiny_llama: TinyLlama) -> None:
    folder = tiny_llama(**SMALL)
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "exl3"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match=r"is quantized by 'exl3'; quantcli reads .*gptq"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: d / "nowhere", "no such file or folder, and not a Hub id"),
        (lambda d: (d / "config.json").write_text("{}") and d / "config.json", "give the folder it lies in"),
        (lambda d: (d / "model.safetensors").write_text("{}") and d / "model.safetensors", "give the folder it lies in"),
        (lambda d: (d / "notes.md").write_text("x") and d / "notes.md", "no model file that quantcli reads"),
        (lambda d: (d / "config.json").write_text("{}") and d, "no weights"),
        (lambda d: (d / "m-Q4_K_M.gguf").write_text("x") and d, r"name one of them: .*m-Q4_K_M\.gguf"),
    ],
)
def test_a_source_that_is_no_model_says_what_to_give_instead(tmp_path: Path, make: Callable[[Path], Path], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(str(make(tmp_path)))


def cached(monkeypatch: pytest.MonkeyPatch, cache: Path, folder: Path, commit: str) -> None:
    """Put ``folder`` into a Hub cache as a download of ``acme/tiny`` would: blobs, and a snapshot of links."""
    repo = cache / "models--acme--tiny"
    for file in folder.iterdir():
        blob = repo / "blobs" / f"{commit}-{file.name}"
        link = repo / "snapshots" / commit / file.name
        for path in (blob, link):
            path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, blob)
        link.symlink_to(f"../../blobs/{blob.name}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def refer(cache: Path, revision: str, commit: str) -> None:
    path = cache / "models--acme--tiny" / "refs" / revision
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(commit)


def test_a_hub_id_and_its_revision_open_offline_from_the_cache(
    tiny_llama: TinyLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for commit, revision, seed in (("a" * 40, "main", 1), ("b" * 40, "v2", 2)):
        folder = tiny_llama(**SMALL, seed=seed, shards=2)
        cached(monkeypatch, tmp_path, folder, commit)
        refer(tmp_path, revision, commit)
        source = "acme/tiny" if revision == "main" else f"acme/tiny@{revision}"
        with open_checkpoint(source) as checkpoint, open_checkpoint(str(folder)) as original:
            assert checkpoint.source == source
            assert torch.equal(checkpoint.read("lm_head.weight"), original.read("lm_head.weight"))


def test_a_hub_id_that_is_not_in_the_cache_says_so_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"acme/none@main: .*not in the local cache"):
        open_checkpoint("acme/none@main")


def test_only_what_is_read_is_downloaded(monkeypatch: pytest.MonkeyPatch, tiny_llama: TinyLlama) -> None:
    asked: dict = {}
    folder = tiny_llama(**SMALL)

    def snapshot(repo: str, **options: object) -> str:
        asked.update(repo=repo, **options)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    open_checkpoint("acme/tiny@refs/pr/3")
    assert (asked["repo"], asked["revision"]) == ("acme/tiny", "refs/pr/3")
    assert "*.safetensors" in asked["allow_patterns"]
    pickles = [
        f"{name}{ending}" for name in ("pytorch_model", "LICENSE", "1_Pooling/model") for ending in (".bin", ".pt", ".pth", ".pkl", ".npy")
    ]
    assert not any(fnmatch(name, pattern) for name in pickles for pattern in asked["allow_patterns"])
    needed = ["LICENSE", "USE_POLICY.md", "modules.json", "1_Pooling/config.json", "2_Dense/model.safetensors", "tekken.json", "README.md"]
    assert all(any(fnmatch(name, pattern) for pattern in asked["allow_patterns"]) for name in needed)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.LocalEntryNotFoundError("x"), "not in the local cache"),
        (ConnectionError("boom\nand more"), r"the download failed \(boom\); try again"),
        (TimeoutError(), r"the download failed \(TimeoutError\)"),
    ],
)
def test_errors_of_the_hub_say_what_to_do(error: Exception, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        raise CheckpointError(hub_way_out(error))


@pytest.mark.parametrize(
    ("kind", "message"),
    [("GatedRepoError", "set HF_TOKEN"), ("RepositoryNotFoundError", "no such repository"), ("RevisionNotFoundError", "no such revision")],
)
def test_answers_of_the_hub_say_what_to_do(kind: str, message: str) -> None:
    error_class = getattr(errors, kind)
    assert message in hub_way_out(error_class.__new__(error_class))
