"""The number of threads changes the time of a run and nothing that it writes, the record included."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import quantcli as qc
from quantcli import ops
from quantcli.calibration import calibrate
from quantcli.statistics.stats_file import StatsFile
from quantcli.tensors import ordered_sum

TinyLlama = Callable[..., Path]
THREADS = (1, 2, 3)
IDS = torch.randint(512, (4, 101), generator=torch.Generator().manual_seed(0))
"""Windows whose activations three threads cannot share evenly."""


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    ops.set_threads(before)


def contents(path: Path) -> dict[str, bytes]:
    """Every file in the folder ``path`` by its name."""
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def check_equal(made: list[dict[str, bytes]]) -> None:
    for n_threads, other in zip(THREADS[1:], made[1:], strict=True):
        different = [name for name in made[0] if made[0][name] != other.get(name)]
        assert not different, f"on {n_threads} threads"
        assert made[0].keys() == other.keys()


@pytest.mark.parametrize(
    "recipe", ["gptq-int4", "gptaq-int4", "awq-int4", "smoothquant-w8a8-static", "rtn-int4", "nf4", "hqq-int4", "fp8-dynamic"]
)
def test_every_file_is_the_same(tiny_llama: TinyLlama, tmp_path: Path, recipe: str) -> None:
    folder, made = tiny_llama(layers=1), list[dict[str, bytes]]()
    held_out = IDS[:1].flip(1)
    chosen = qc.Recipe.load(recipe)
    data = qc.Windows(IDS, held_out=held_out) if chosen.is_calibrated else None
    for n_threads in THREADS:
        qc.quantize(folder, tmp_path / f"{n_threads}", chosen, data=data, device="cpu", threads=n_threads)
        made.append(contents(tmp_path / f"{n_threads}"))
    assert "quantcli.json" in made[0]
    check_equal(made)


def measure(folder: Path, target: Path) -> None:
    for _ in calibrate.calibrate(qc.open(folder), IDS, target, hessian=True, histograms=True, head=True, moe="routed", device="cpu"):
        pass


@pytest.mark.parametrize("recipe", ["q4_k_m", "gptq-int4"])
def test_statistics_and_what_is_made_by_them_are_the_same(tiny_llama: TinyLlama, tmp_path: Path, recipe: str) -> None:
    folder, made, run = tiny_llama(layers=1, dtype="float32"), list[dict[str, bytes]](), tmp_path / "run"  # whose name is on the record
    for n_threads in THREADS:
        ops.set_threads(n_threads)
        run.mkdir()
        measure(folder, run / "stats")
        qc.quantize(folder, run / "output", recipe, data=StatsFile(run / "stats"), device="cpu", threads=n_threads)
        made.append(contents(run))
        run.rename(tmp_path / f"{n_threads}")
    check_equal(made)


@pytest.mark.parametrize("shape", [(0,), (1,), (1023,), (1024,), (300, 1001), (3, 5, 70001)])
def test_a_sum_is_near_and_the_same_on_any_number_of_threads(shape: tuple[int, ...]) -> None:
    x, sums = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 1, set()
    for n_threads in (1, 2, 3, 5):
        ops.set_threads(n_threads)
        sums.add(float(ordered_sum(x)))
    assert len(sums) == 1
    assert sums.pop() == pytest.approx(float(x.double().sum()), rel=1e-6)
