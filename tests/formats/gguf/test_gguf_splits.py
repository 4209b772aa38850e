"""A model in several GGUF files: cut as llama-gguf-split cuts it, read by any of its files, refused when they do not belong together."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from quantcli.cli import app
from quantcli.errors import CheckpointError, RecipeError
from quantcli.formats import open_checkpoint
from quantcli.formats.gguf.file import splits
from quantcli.formats.gguf.file.container import tensor_spec
from quantcli.formats.gguf.file.headers import read_header
from support.gguf_files import write_model

SPECS = [tensor_spec(name, "F32", (8,)) for name in "abcde"]  # 32 bytes each


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "m.gguf", "llama")


def export(*arguments: object) -> dict:
    result = CliRunner().invoke(app, ["export", *map(str, arguments), "--json", "-q"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def shards(whole: Path) -> list[Path]:
    """The model in files of at most 2 MB."""
    out = export(whole, "-o", whole.parent / "cut.gguf", "--split-max-size", "2M")
    paths = sorted(whole.parent.glob("cut-*.gguf"))
    assert len(paths) > 2
    assert Path(out["output"]) == paths[0]
    return paths


def test_shards_are_filled_to_the_size_and_no_further() -> None:
    assert [[s.name for s in share] for share in splits.cut(SPECS, 64)] == [["a", "b"], ["c", "d"], ["e"]]
    assert [len(share) for share in splits.cut(SPECS, 95)] == [2, 2, 1]
    assert [len(share) for share in splits.cut(SPECS, 1)] == [1] * 5
    assert [len(share) for share in splits.cut(SPECS, None)] == [5]


def test_each_shard_says_which_it_is_and_the_first_says_all_else(whole: Path, shards: list[Path]) -> None:
    headers = [read_header(path) for path in shards]
    assert [path.name for path in shards] == [f"cut-{i + 1:05d}-of-{len(shards):05d}.gguf" for i in range(len(shards))]
    for i, header in enumerate(headers):
        told = {key: (f.type.name, f.value) for key, f in header.fields.items() if key.startswith("split.")}
        n_tensors = len(read_header(whole).specs)
        assert told == {"split.no": ("UINT16", i), "split.tensors.count": ("INT32", n_tensors), "split.count": ("UINT16", len(shards))}
        assert i == 0 or len(header.fields) == 3
    assert headers[0].get("general.architecture") == "llama"


def test_any_shard_opens_the_whole_model(whole: Path, shards: list[Path]) -> None:
    with open_checkpoint(str(whole)) as one:
        for path in shards:
            with open_checkpoint(str(path)) as cut:
                assert cut.specs == one.specs
                assert cut.fingerprint() == one.fingerprint()
                assert all(cut.read(name).equal(one.read(name)) for name in one.specs)


def test_shards_are_joined_to_the_file_they_were_cut_from(whole: Path, shards: list[Path], tmp_path: Path) -> None:
    export(whole, "-o", tmp_path / "copy.gguf")
    assert export(shards[1], "-o", tmp_path / "joined.gguf")["lossless"]
    a, b = read_header(tmp_path / "copy.gguf"), read_header(tmp_path / "joined.gguf")
    assert a.specs == b.specs
    assert a.fields.keys() == b.fields.keys()
    assert (tmp_path / "copy.gguf").read_bytes()[a.offsets["output.weight"] :] == (tmp_path / "joined.gguf").read_bytes()[
        b.offsets["output.weight"] :
    ]


def test_what_fits_one_file_is_one_file(whole: Path, tmp_path: Path) -> None:
    assert export(whole, "-o", tmp_path / "m.gguf", "--split-max-size", "1G")["output"] == str(tmp_path / "m.gguf")
    assert not [key for key in read_header(tmp_path / "m.gguf").fields if key.startswith("split.")]


def test_a_missing_shard_is_named(shards: list[Path], tmp_path: Path) -> None:
    first = tmp_path / shards[0].name
    first.write_bytes(shards[0].read_bytes())
    with pytest.raises(CheckpointError, match=rf"{len(shards) - 1} of the model's .* the first is .*{shards[1].name}"):
        open_checkpoint(str(first))


@pytest.mark.parametrize("change", ["renamed", "a file twice", "of another model"])
def test_files_that_do_not_belong_together_are_refused(shards: list[Path], tmp_path: Path, change: str) -> None:
    for path in shards:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    first = tmp_path / shards[0].name
    if change == "renamed":
        first = first.rename(tmp_path / "model.gguf")
    elif change == "a file twice":
        (tmp_path / shards[2].name).write_bytes(shards[1].read_bytes())
    else:
        other = write_model(tmp_path / "other.gguf", "starcoder2")
        export(other, "-o", tmp_path / shards[0].name.split("-")[0], "--split-max-size", "2M", "--overwrite")
        (tmp_path / shards[1].name).write_bytes(other.read_bytes())
    with pytest.raises(CheckpointError):
        open_checkpoint(str(first))


def test_a_tensor_in_two_shards_and_a_wrong_total_are_refused(shards: list[Path]) -> None:
    headers = [read_header(path) for path in shards]
    twice = replace(headers[1], specs=headers[1].specs | dict(list(headers[0].specs.items())[:1]))
    with pytest.raises(CheckpointError, match=r"is in .* already"):
        splits.joined([headers[0], twice, *headers[2:]])
    fewer = replace(headers[1], specs=dict(list(headers[1].specs.items())[1:]))
    with pytest.raises(CheckpointError, match="promises"):
        splits.joined([headers[0], fewer, *headers[2:]])


def test_finished_shards_are_replaced_only_when_asked(whole: Path, tmp_path: Path) -> None:
    arguments = ["export", str(whole), "Q8_0", "-o", str(tmp_path / "m.gguf"), "--split-max-size", "1M", "-q"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    before = {path.name for path in tmp_path.iterdir()}
    again = CliRunner().invoke(app, arguments)
    assert isinstance(again.exception, RecipeError)
    assert CliRunner().invoke(app, [*arguments, "--overwrite"]).exit_code == 0
    assert {path.name for path in tmp_path.iterdir()} == before


def test_shards_do_not_replace_those_they_are_made_of(shards: list[Path]) -> None:
    before = [path.read_bytes() for path in shards]
    result = CliRunner().invoke(
        app, ["export", str(shards[0]), "-o", str(shards[0].parent / "cut.gguf"), "--split-max-size", "2M", "--overwrite"]
    )
    assert isinstance(result.exception, RecipeError)
    assert "replace the model it is made from" in str(result.exception)
    assert [path.read_bytes() for path in shards] == before


@pytest.mark.parametrize(
    ("text", "n_bytes"), [("300M", 300_000_000), ("2G", 2_000_000_000), ("900MB", 900_000_000), ("16GiB", 16 << 30), ("1500", 1500)]
)
def test_sizes_are_llama_cpps_and_ours(text: str, n_bytes: int) -> None:
    assert splits.parse_size(text) == n_bytes


@pytest.mark.parametrize("text", ["", "0", "0M", "-1G", "1.5G", "12 parsecs", "M"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="split-max-size"):
        splits.parse_size(text)


def test_more_shards_than_a_file_name_counts_are_refused() -> None:
    with pytest.raises(RecipeError, match="65535"):
        splits.cut([tensor_spec(str(i), "F32", (8,)) for i in range(splits.MAX_SHARDS + 1)], 1)
