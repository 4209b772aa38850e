"""inspect --stats: outliers, energy and coverage of each input that was measured, and what is too little text."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from quantcli.cli import main
from quantcli.cli.console import Console
from quantcli.cli.tables import render_stats
from quantcli.planning.inspection import describe_tap
from quantcli.statistics.outliers import Figures
from quantcli.statistics.stats_file import StatsFile
from quantcli.tensors import Stats
from support.tiny_models import TinyLlama

KEYS = {f.name for f in fields(Figures)} | {"tap", "warnings"}


def stats_of(X: torch.Tensor) -> Stats:
    """What calibration gathers of X [n_tokens, in]."""
    return Stats(
        importance=X.square().mean(0), absmax=X.abs().amax(0), mean=X.mean(0), n_tokens=len(X), fourth=X.double().pow(4).mean(0).float()
    )


def inputs() -> torch.Tensor:
    """300 inputs, of which one is dead, three reach 6.0 and two of these have nearly all of the energy."""
    X = torch.randn(500, 300, generator=torch.Generator().manual_seed(9)).clamp_(-5, 5)
    X[:, 10] = 0
    X[:, 20] *= 100
    X[:, 30] *= 100
    X[7, 40] = -6.0
    return X


def test_a_tap_is_described_by_what_its_inputs_were() -> None:
    X = inputs()
    row = describe_tap("layers.0.q_proj", stats_of(X))
    rms = math.sqrt(float(X.square().mean()))
    assert row.keys() == KEYS
    assert (row["tap"], row["in_features"], row["n_tokens"]) == ("layers.0.q_proj", 300, 500)
    assert (row["outlier_channels"], row["dead"]) == (3, 1)
    assert row["absmax"] == float(X.abs().max())
    assert row["rms"] == pytest.approx(rms, rel=1e-5)
    assert row["absmax_over_rms"] == pytest.approx(float(X.abs().max()) / rms, rel=1e-5)
    assert row["kurtosis"] == pytest.approx(float(X.double().pow(4).mean()) / rms**4, rel=1e-4)
    assert row["outlier_share"] == 3 / 300
    assert row["coverage"] == pytest.approx(299 / 300)
    assert row["tokens_per_input"] == pytest.approx(500 / 300)
    energy = X.double().square().sum(0)
    top = energy[[20, 30]].sum() + energy[[c for c in range(300) if c not in (20, 30)]].max()  # 1 % of 300 channels
    assert row["energy_top1pct"] == pytest.approx(float(top / energy.sum()), rel=1e-5)
    assert row["warnings"] == ["1 inputs were always zero: their weights are rounded as if they did not matter"]


def test_fewer_tokens_than_inputs_are_warned_of_since_h_is_singular_then() -> None:
    enough = torch.randn(300, 300, generator=torch.Generator().manual_seed(9))
    assert describe_tap("t", stats_of(enough))["warnings"] == []
    (warning,) = describe_tap("t", stats_of(enough[:299]))["warnings"]
    assert warning == "299 tokens for 300 inputs: H is singular; calibrate on more text"
    few = enough[:299].double()
    assert int(torch.linalg.matrix_rank(few.T @ few)) == 299


def test_a_tap_that_no_token_reached_is_warned_of_and_has_no_nan() -> None:
    zeros = torch.zeros(4)
    row = describe_tap("t", Stats(importance=zeros, absmax=zeros, mean=zeros, n_tokens=0, fourth=zeros))
    assert (row["rms"], row["absmax_over_rms"], row["energy_top1pct"], row["dead"]) == (0, 0, 0, 4)
    assert row["warnings"] == ["no token reached it: calibrate on more text, or on text of its domain"]


def test_the_table_has_the_worst_tap_first() -> None:
    calm = describe_tap("calm", stats_of(inputs()[:, :10]))
    wild = describe_tap("wild", stats_of(inputs()))
    _, header, first, second, legend = render_stats(Console(), [calm, wild])
    assert header.split()[:3] == ["tap", "inputs", "tokens"]
    assert (first.split()[0], second.split()[0]) == ("wild", "calm")
    assert (header.split()[-1], first.split()[-1]) == ("coverage", "99.7%")
    assert legend.startswith(">= 6.0: channels that LLM.int8 keeps")


def test_inspect_shows_the_statistics_of_its_model_and_of_no_other(
    tiny_llama: TinyLlama, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model, other = tiny_llama(layers=1), tiny_llama(layers=2)
    path = tmp_path / "stats.safetensors"
    assert run("calibrate", model, "-o", path, "--samples", "2", "--seq-len", "20", "-q") == 0
    capfd.readouterr()
    assert run("inspect", model, "--stats", path, "--json") == 0
    out, err = capfd.readouterr()
    rows = json.loads(out)["stats"]
    assert [row["tap"] for row in rows] == list(StatsFile(path))
    assert all(row.keys() == KEYS and row["n_tokens"] == 40 for row in rows)
    assert f"warning: {rows[0]['tap']}: 40 tokens for {rows[0]['in_features']} inputs: H is singular" in err
    assert run("inspect", model, "--stats", path) == 0
    assert "absmax/rms" in capfd.readouterr().out
    assert run("inspect", other, "--stats", path) == 4
    assert "whose weights are not those of" in capfd.readouterr().err


def run(*args: object) -> int:
    """The exit code of ``quantcli ARGS``."""
    with pytest.raises(SystemExit) as ended:
        main([str(arg) for arg in args])
    return int(ended.value.code or 0)
