"""A run that was stopped is continued by the same call, and ends with the bytes of one that was not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import quantcli as qc
from quantcli.errors import RecipeError
from support.runs import run
from support.tiny_models import TinyLlama

IDS = torch.randint(2, 512, (6, 48), generator=torch.Generator().manual_seed(5))


class Stopped(Exception):
    """Raised by the receiver of events, as Ctrl-C would be at that moment."""


def stop_after(n: int) -> Callable[[Any], None]:
    """A receiver of events that ends the run when ``n`` layers are done."""

    def receive(event: Any) -> None:
        if isinstance(event, qc.LayerDone) and event.index + 1 == n:
            raise Stopped

    return receive


def contents(path: Path) -> dict[str, bytes]:
    """Name → bytes of every file of an output."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def folder(tiny_llama: TinyLlama) -> Path:
    return tiny_llama(layers=3, hidden=128, intermediate=256)


@pytest.fixture(scope="module")
def statistics(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from quantcli.calibration.calibrate import calibrate

    path = tmp_path_factory.mktemp("stats") / "stats.safetensors"
    with qc.open(folder) as checkpoint:
        list(calibrate(checkpoint, IDS, path, head=True, histograms=True))
    return path


def recipe_of(name: str) -> qc.Recipe:
    if name == "gptaq":
        return qc.Recipe.load("gptq-int4").with_pass("gptq", gptaq_alpha=0.25)
    if name == "kv":
        from quantcli.planning.selection import with_cache

        return with_cache(qc.Recipe.load("smoothquant-w8a8"), "fp8")
    return qc.Recipe.load(name)


@pytest.mark.parametrize("name", ["gptq-int4", "gptaq", "awq-int4", "kv", "fp8-static", "nf4", "q8_0", "gptq-int4 by statistics"])
def test_a_stopped_run_ends_with_the_bytes_of_one_that_was_not(folder: Path, statistics: Path, tmp_path: Path, name: str) -> None:
    recipe, _, by_statistics = name.partition(" by ")
    data = qc.StatsFile(statistics) if by_statistics else qc.Windows(IDS) if recipe not in ("nf4", "q8_0") else None
    whole = run(folder, tmp_path / "whole", recipe_of(recipe), data)
    n_layers = whole[1].n_layers
    for n in (1, 3, n_layers):
        with pytest.raises(Stopped):
            qc.quantize(folder, tmp_path / "out", recipe_of(recipe), data=data, device="cpu", on_event=stop_after(n))
        assert not (tmp_path / "out").exists()
    _, resumed, *layers, _ = run(folder, tmp_path / "out", recipe_of(recipe), data)
    assert isinstance(resumed, qc.Resumed)
    assert (resumed.n_done, resumed.n_layers) == (n_layers, n_layers)
    assert [event.name for event in layers] == [event.name for event in whole[1:-1]]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_a_run_on_other_text_is_no_continuation(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        qc.quantize(folder, tmp_path / "out", "gptq-int4", data=qc.Windows(IDS), device="cpu", on_event=stop_after(2))
    with pytest.raises(RecipeError, match=r"differs in data.* give --fresh"):
        run(folder, tmp_path / "out", "gptq-int4", qc.Windows(IDS[:5]))
    run(folder, tmp_path / "out", "gptq-int4", qc.Windows(IDS[:5]), fresh=True)
    run(folder, tmp_path / "other", "gptq-int4", qc.Windows(IDS[:5]))
    assert contents(tmp_path / "out") == contents(tmp_path / "other")
