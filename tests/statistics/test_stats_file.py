"""The file of statistics: what it holds comes back, what it lacks is known from its header, and another model's is not taken."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantcli.checkpoint.shards import file_layout
from quantcli.cli import main
from quantcli.errors import CheckpointError, RecipeError
from quantcli.formats import open_checkpoint
from quantcli.output.writer import Writer
from quantcli.statistics.stats_file import StatsFile, put_stats, stats_metadata, stats_specs
from quantcli.tensors import Stats
from quantcli.text.texts import sha256
from support.tiny_models import TinyLlama

IDS = torch.arange(60).view(3, 20)
WIDTHS = {"model.layers.0.mlp.down_proj": 96, "lm_head": 64}
TAP = "lm_head"
SMALL = {"hidden": 64, "intermediate": 96, "layers": 1, "heads": 2, "vocab": 512}


def stats_of(tap: str, *, hessian: bool) -> Stats:
    n = WIDTHS[tap]
    parts = torch.randn(4, n, generator=torch.Generator().manual_seed(n))
    H = torch.ones(n, n) if hessian else None
    return Stats(importance=parts[0], absmax=parts[1], mean=parts[2], n_tokens=60, H=H, fourth=parts[3])


def write(source: Path, target: Path, *, hessian: bool = True) -> StatsFile:
    """Statistics of WIDTHS, said to be measured on ``source``."""
    with open_checkpoint(str(source)) as checkpoint, Writer(target, folder=False) as writer:
        writer.declare([file_layout(target.name, stats_specs(WIDTHS, hessian=hessian), stats_metadata(checkpoint, IDS))])
        for tap in WIDTHS:
            put_stats(writer, {tap: stats_of(tap, hessian=hessian)})
        writer.commit()
    return StatsFile(target)


def rewrite(stats: StatsFile, parts: dict[str, Tensor] | None = None, **metadata: str | None) -> None:
    """The file with other ``parts``, and with the entries of its metadata replaced or (None) left out."""
    kept = {key: value for key, value in {**stats.metadata, **metadata}.items() if value is not None}
    save_file(load_file(stats.path) if parts is None else parts, stats.path, metadata=kept)


@pytest.fixture
def folder(tiny_llama: TinyLlama) -> Path:
    return tiny_llama(**SMALL)


@pytest.fixture
def tuned(folder: Path, tmp_path: Path) -> Path:
    """A fine-tune of ``folder``: one matrix differs."""
    copy = Path(shutil.copytree(folder, tmp_path / "tuned"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"] *= 1.01
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


@pytest.fixture
def stats(folder: Path, tmp_path: Path) -> StatsFile:
    return write(folder, tmp_path / "stats.safetensors")


@pytest.mark.parametrize("hessian", [True, False])
def test_what_was_put_comes_back(folder: Path, tmp_path: Path, hessian: bool) -> None:
    stats = write(folder, tmp_path / "stats.safetensors", hessian=hessian)
    assert set(stats) == set(WIDTHS)
    for tap in WIDTHS:
        put, got = stats_of(tap, hessian=hessian), stats[tap]
        assert got.n_tokens == put.n_tokens
        for part in ("importance", "absmax", "mean"):
            assert torch.equal(getattr(got, part), getattr(put, part))
        assert torch.equal(got.H, put.H) if hessian else got.H is None


def test_the_file_says_what_it_was_measured_on(folder: Path, stats: StatsFile) -> None:
    assert stats.dataset_sha256 == sha256(IDS)
    assert stats.metadata.items() >= {"source": str(folder), "n_samples": "3", "seq_len": "20", "n_tokens": "60"}.items()
    with open_checkpoint(str(folder)) as checkpoint:
        assert stats.metadata["source_fingerprint"] == checkpoint.fingerprint()


def test_a_tap_that_was_not_measured_is_a_key_error(stats: StatsFile) -> None:
    for ask in (stats.__getitem__, stats.in_features):
        with pytest.raises(KeyError):
            ask("model.layers.7.mlp.gate_proj")


def test_another_safetensors_file_is_not_taken_for_statistics(folder: Path, stats: StatsFile) -> None:
    with pytest.raises(CheckpointError, match="quantcli calibrate"):
        StatsFile(folder / "model.safetensors")
    rewrite(stats, dataset_sha256=None)
    with pytest.raises(CheckpointError, match="quantcli calibrate"):
        StatsFile(stats.path)


@pytest.mark.parametrize(
    ("part", "damaged", "words"),
    [
        ("H", torch.zeros(3, 3), r"H is F32 \[3, 3\], expected F32 \[64, 64\]"),
        ("mean", None, "mean is missing"),
        ("importance", None, "importance is missing"),
        ("absmax", torch.zeros(3), "absmax"),
        ("n_tokens", torch.zeros(1), r"n_tokens is F32 \[1\], expected I64"),
    ],
)
def test_statistics_whose_parts_contradict_one_another_are_refused(stats: StatsFile, part: str, damaged: Tensor | None, words: str) -> None:
    parts = load_file(stats.path)
    del parts[f"{TAP}.{part}"]
    if damaged is not None:
        parts[f"{TAP}.{part}"] = damaged
    rewrite(stats, parts)
    with pytest.raises(CheckpointError, match=rf"{TAP}.{words}"):
        StatsFile(stats.path)


@pytest.mark.parametrize("hessian", [True, False])
def test_width_and_hessian_are_known_without_reading_data(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hessian: bool
) -> None:
    stats = write(folder, tmp_path / "stats.safetensors", hessian=hessian)
    monkeypatch.setattr("quantcli.statistics.stats_file.read_tensor", lambda location: pytest.fail(f"{location.spec.name} was read"))
    assert {tap: stats.in_features(tap) for tap in stats} == WIDTHS
    assert [stats.has_hessian(tap) for tap in stats] == [hessian] * 2
    stats.check_tap(TAP, 64, needs=frozenset({"importance", "absmax", "mean"}))
    if hessian:
        stats.check_tap(TAP, 64, needs=frozenset({"H"}))


@pytest.mark.parametrize(
    ("tap", "in_features", "words"),
    [
        ("model.layers.9.mlp.down_proj", 96, "have no tap 'model.layers.9.mlp.down_proj'; .* calibrate this one"),
        (TAP, 96, "tap 'lm_head' are 64 wide and the weight has 96 inputs; .* calibrate this one"),
        (TAP, 64, "has no H of tap 'lm_head', which the recipe needs; calibrate without --no-hessian"),
    ],
)
def test_a_tap_that_does_not_fit_is_refused_with_a_way_out(folder: Path, tmp_path: Path, tap: str, in_features: int, words: str) -> None:
    stats = write(folder, tmp_path / "stats.safetensors", hessian=False)
    with pytest.raises(RecipeError, match=words):
        stats.check_tap(tap, in_features, needs=frozenset({"H"}))


def test_statistics_of_the_same_weights_pass_in_silence(folder: Path, stats: StatsFile, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    for source in (folder, copy):
        with open_checkpoint(str(source)) as checkpoint:
            stats.check_source(checkpoint, warn=pytest.fail)


def test_statistics_of_another_fine_tune_are_refused_by_both_names(stats: StatsFile, folder: Path, tuned: Path) -> None:
    with open_checkpoint(str(tuned)) as checkpoint, pytest.raises(RecipeError) as caught:
        stats.check_source(checkpoint, warn=pytest.fail)
    assert all(words in str(caught.value) for words in (str(folder)[:40], "tuned", "run `quantcli calibrate`", stats.path.name))


def test_a_file_without_a_fingerprint_is_taken_with_a_warning(stats: StatsFile, tuned: Path) -> None:
    rewrite(stats, source_fingerprint=None, source="a\x1b[2Jb")
    warnings: list[str] = []
    with open_checkpoint(str(tuned)) as checkpoint:
        StatsFile(stats.path).check_source(checkpoint, warn=warnings.append)
    assert len(warnings) == 1
    assert stats.path.name in warnings[0]
    assert warnings[0].isprintable()


def test_quantize_refuses_the_statistics_of_another_fine_tune(
    stats: StatsFile, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as ended:
        main(["quantize", str(tuned), "--method", "gptq", "--group-size", "32", "--stats", str(stats.path), "-o", str(out), "-q"])
    assert ended.value.code == 4
    assert "whose weights are not those of" in " ".join(capsys.readouterr().err.split())
    assert not out.exists()
