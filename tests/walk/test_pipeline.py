"""The walk: what comes out is what the plan said, whatever interrupts it, within the memory that the house promises."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import quantcli as qc
from quantcli import ops
from quantcli import recipe as recipes
from quantcli.calibration import calibrate
from quantcli.calibration.data import Windows
from quantcli.conversions import grid_of
from quantcli.errors import NumericsError, RecipeError
from quantcli.formats import open_checkpoint
from quantcli.planning.plan import PlannedTensor
from quantcli.planning.schemes import is_quantized
from quantcli.statistics.stats_file import StatsFile
from quantcli.tensors import TensorSpec
from quantcli.walk import pipeline
from quantcli.walk.evaluate import compare
from quantcli.walk.pipeline import Finished, LayerDone, Planned
from support.importance_files import weighed
from support.runs import run

TinyLlama = Callable[..., Path]


def windows(n: int = 8, length: int = 32, vocab: int = 512) -> torch.Tensor:
    return torch.randint(vocab, (n, length), generator=torch.Generator().manual_seed(0))


def calibrated(n: int = 8) -> Windows:
    return Windows(windows(n))


quantize = partial(run, data=calibrated())


@pytest.mark.parametrize("recipe", recipes.shipped())
@pytest.mark.parametrize("options", [{"tied": True, "layers": 1}, {"shards": 2, "layers": 1}])
def test_what_is_written_is_what_was_planned(tiny_llama: TinyLlama, tmp_path: Path, recipe: str, options: dict) -> None:
    folder = tiny_llama(**options)
    chosen, matrix = weighed(recipe, folder, tmp_path)
    planned, *layers, finished = quantize(folder, tmp_path / "out", chosen, data=matrix or calibrated())
    assert isinstance(planned, Planned)
    assert isinstance(finished, Finished)
    assert [e.name for e in layers] == [layer.name for layer in planned.plan.layers]
    with open_checkpoint(str(tmp_path / "out")) as output:
        of_caches = {spec.name for layer in planned.plan.layers for one in layer.caches for spec in one.outputs}
        assert set(output.specs) == {t.name for t in planned.plan.tensors if t.outputs} | of_caches
        assert sum(s.nbytes for s in output.specs.values()) == planned.plan.n_bytes
        assert {n: (grid_of(s), s.get("act", "")) for n, s in output.schemes.items()} == {
            t.name: (grid_of(t.scheme), t.scheme.get("act", "")) for t in planned.plan.tensors if t.scheme and is_quantized(t.scheme)
        }


def test_what_is_read_back_is_close_and_gptq_is_closer_than_rtn(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    folder = tiny_llama()
    kld = {}
    for recipe in ("gptq-int4", "rtn-int4"):
        quantize(folder, tmp_path / recipe, recipe, data=calibrated(32))
        with open_checkpoint(str(tmp_path / recipe)) as output, open_checkpoint(str(folder)) as source:
            kld[recipe] = compare(output, source, windows(16)).kld_mean
    assert kld["gptq-int4"] < kld["rtn-int4"]


@pytest.mark.parametrize(("recipe", "file"), [("q4_k_m", ""), ("gptq-int4", "model.safetensors")])
def test_the_same_run_gives_the_same_bytes_with_any_number_of_threads(
    tiny_llama: TinyLlama, tmp_path: Path, recipe: str, file: str
) -> None:
    folder = tiny_llama(layers=1, hidden=256, intermediate=768)
    before = torch.get_num_threads()
    for i, n_threads in enumerate((1, 1, 2)):
        ops.set_threads(n_threads)
        quantize(folder, tmp_path / str(i), recipe)
    ops.set_threads(before)
    first, *others = ((tmp_path / str(i) / file).read_bytes() for i in range(3))
    assert all(first == other for other in others)


def test_statistics_from_a_file_serve_in_place_of_windows(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    folder = tiny_llama(layers=1)
    with open_checkpoint(str(folder)) as source:
        list(calibrate.calibrate(source, windows(), tmp_path / "stats.safetensors"))
    stats = StatsFile(tmp_path / "stats.safetensors")
    quantize(folder, tmp_path / "a", "gptq-int4", data=stats)
    quantize(folder, tmp_path / "b", "gptq-int4")
    a, b = (load_file(tmp_path / x / "model.safetensors") for x in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)  # one layer: there is no error to propagate


def test_true_sequential_sees_what_is_already_coded(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    folder = tiny_llama(layers=1)
    recipe = recipes.load("gptq-int3")
    quantize(folder, tmp_path / "a", recipe)
    quantize(folder, tmp_path / "b", replace(recipe, true_sequential=True))
    a, b = (load_file(tmp_path / x / "model.safetensors") for x in "ab")
    same = {name for name in a if torch.equal(a[name], b[name])}
    assert {f"model.layers.0.self_attn.{k}_proj.qweight" for k in "qkv"} <= same
    assert "model.layers.0.mlp.down_proj.qweight" not in same


def test_later_layers_are_measured_behind_quantized_ones(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    folder = tiny_llama(layers=2)
    with open_checkpoint(str(folder)) as source:
        list(calibrate.calibrate(source, windows(), tmp_path / "stats.safetensors"))
    stats = StatsFile(tmp_path / "stats.safetensors")
    quantize(folder, tmp_path / "a", "gptq-int3", data=stats)
    quantize(folder, tmp_path / "b", "gptq-int3")
    a, b = (load_file(tmp_path / x / "model.safetensors") for x in "ab")
    assert torch.equal(a["model.layers.0.self_attn.q_proj.qweight"], b["model.layers.0.self_attn.q_proj.qweight"])
    assert not torch.equal(a["model.layers.1.self_attn.q_proj.qweight"], b["model.layers.1.self_attn.q_proj.qweight"])


def test_a_dry_run_touches_nothing(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    events = quantize(tiny_llama(), tmp_path / "out", "gptq-int4", dry_run=True)
    assert len(events) == 1
    assert not list(tmp_path.iterdir())


def test_the_output_says_how_it_was_made(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    quantize(tiny_llama(), tmp_path / "out", "gptq-int4")
    record = json.loads((tmp_path / "out" / "quantcli.json").read_text())
    assert record["recipe"]["name"] == "gptq-int4"
    assert record["dataset_sha256"] == calibrated().dataset_sha256
    assert len(record["tensors"]) == 14
    assert recipes.parse(record["recipe"], "again").to_dict() == recipes.load("gptq-int4").to_dict()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"])
@pytest.mark.parametrize("recipe", ["rtn-int4", "q4_k_m"])
def test_nan_in_the_source_is_an_error_with_the_tensors_name(
    tiny_llama: TinyLlama, tmp_path: Path, value: float, name: str, recipe: str
) -> None:
    folder = tiny_llama()
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[17] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericsError, match=name):
        quantize(folder, tmp_path / "out", recipe)
    assert not list(tmp_path.iterdir())


def test_a_finished_output_is_not_replaced_unasked(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    folder = tiny_llama()
    quantize(folder, tmp_path / "out", "rtn-int4")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    with pytest.raises(RecipeError, match="out"):
        quantize(folder, tmp_path / "out", "gptq-int4")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    quantize(folder, tmp_path / "out", "gptq-int4", overwrite=True)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != before


@pytest.mark.parametrize("place", [".", ".."])
def test_the_model_itself_is_never_replaced(tiny_llama: TinyLlama, tmp_path: Path, place: str) -> None:
    folder = tiny_llama().rename(tmp_path / "model")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    (tmp_path / "config.json").write_text("{}")  # even where the folder above looks like an output
    with pytest.raises(RecipeError, match="would replace the model"):
        quantize(folder, folder / place, "rtn-int4", overwrite=True)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_statistics_of_another_model_are_refused_before_any_work(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    with open_checkpoint(str(tiny_llama(layers=1))) as source:
        list(calibrate.calibrate(source, windows(), tmp_path / "stats.safetensors"))
    stats = StatsFile(tmp_path / "stats.safetensors")
    with open_checkpoint(str(tiny_llama(layers=2))) as source:
        walk = pipeline.quantize(source, tmp_path / "out", recipes.load("gptq-int4"), data=stats)  # the library refuses the file before
        assert isinstance(next(walk), Planned)
        with pytest.raises(RecipeError, match=r"no tap 'model.layers.1.mlp.down_proj'"):
            next(walk)


@pytest.mark.parametrize(("change", "words"), [("hessian", "has no H of tap"), ("width", "are 768 wide and the weight has 512 inputs")])
def test_statistics_that_do_not_fit_are_refused_before_any_work(tiny_llama: TinyLlama, tmp_path: Path, change: str, words: str) -> None:
    with open_checkpoint(str(tiny_llama(intermediate=768))) as source:
        list(calibrate.calibrate(source, windows(), tmp_path / "stats.safetensors", hessian=change != "hessian"))
    stats = StatsFile(tmp_path / "stats.safetensors")
    with open_checkpoint(str(tiny_llama(intermediate=512 if change == "width" else 768))) as source:
        walk = pipeline.quantize(source, tmp_path / "out", recipes.load("gptq-int4"), data=stats)  # as above: the weights are others
        assert isinstance(next(walk), Planned)
        with pytest.raises(RecipeError, match=rf"^model.layers.0.*_proj.weight: .*{words}"):
            next(walk)
    assert [path.name for path in tmp_path.iterdir()] == ["stats.safetensors"]


@pytest.mark.parametrize("dense", ["bf16", "f16"])
@pytest.mark.parametrize("from_file", [False, True])
def test_a_calibrated_recipe_may_leave_linears_in_a_dense_type(tiny_llama: TinyLlama, tmp_path: Path, dense: str, from_file: bool) -> None:
    folder = tiny_llama(layers=2)
    data = calibrated()
    if from_file:
        with open_checkpoint(str(folder)) as source:
            list(calibrate.calibrate(source, windows(), tmp_path / "stats.safetensors"))
        data = StatsFile(tmp_path / "stats.safetensors")
    recipe = replace(recipes.load("gptq-int4"), rules=(recipes.Rule.parse("down_proj", dense),))
    quantize(folder, tmp_path / "out", recipe, data=data)
    source, out = load_file(folder / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(out[name], source[name].to({"bf16": torch.bfloat16, "f16": torch.float16}[dense]))
    assert "model.layers.1.mlp.up_proj.qweight" in out


@pytest.mark.parametrize(
    ("dtype", "recipe", "lossless"),
    [
        ("float32", "bf16", False),
        ("bfloat16", "bf16", True),
        ("bfloat16", "f16", False),
        ("float16", "f16", True),
        ("bfloat16", "q8_0", False),
    ],
)
def test_lossless_is_what_loses_no_bit(tiny_llama: TinyLlama, tmp_path: Path, dtype: str, recipe: str, lossless: bool) -> None:
    *_, finished = quantize(tiny_llama(dtype=dtype), tmp_path / "out", recipe)
    assert isinstance(finished, Finished)
    assert finished.lossless is lossless


@pytest.mark.parametrize("recipe", ["gptq-int4", "q4_k_m"])
@pytest.mark.parametrize("after", range(0, 5, 2))
def test_stopping_at_any_layer_leaves_no_output(tiny_llama: TinyLlama, tmp_path: Path, recipe: str, after: int) -> None:
    seen: list[object] = []

    def stop(event: object) -> None:
        seen.append(event)
        if sum(not isinstance(one, qc.Note) for one in seen) == after + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        qc.quantize(tiny_llama(), tmp_path / "out", recipe, data=calibrated(), device="cpu", on_event=stop)
    assert after == 0 or isinstance(seen[-1], LayerDone)
    assert [path.name for path in tmp_path.iterdir()] == ([] if after == 0 else ["out.part"])


CHILD = """
import signal, sys, torch
import quantcli as qc

def tell(event):
    if isinstance(event, qc.LayerDone):
        print(event.name, flush=True)
        if event.name in sys.argv[4:]: signal.pause()

ids = torch.randint(512, (8, 64), generator=torch.Generator().manual_seed(0))
source, target, recipe = sys.argv[1:4]
print(qc.quantize(source, target, recipe, data=qc.Windows(ids), device="cpu", threads=1, on_event=tell).peak_ram_bytes)
"""


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGKILL])
def test_a_killed_run_leaves_no_file_under_a_final_name(tiny_llama: TinyLlama, tmp_path: Path, kind: int) -> None:
    waits_after = "model.layers.1"  # or it may be done before the signal comes
    command = [sys.executable, "-c", CHILD, str(tiny_llama(layers=6)), str(tmp_path / "out"), "gptq-int4", waits_after]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert child.stdout is not None
    assert any(line.strip() == waits_after for line in child.stdout)
    os.kill(child.pid, kind)
    child.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["out.part"]
    done = subprocess.run(command[:-1], stdout=subprocess.PIPE, check=True, text=True)
    assert waits_after in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_memory_is_bounded_by_two_layers_and_their_statistics(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    hidden, intermediate = 768, 2048
    folder = tiny_llama(layers=12, hidden=hidden, intermediate=intermediate, heads=12, kv_heads=4, dtype="bfloat16", shards=4)
    command = [sys.executable, "-c", CHILD, str(folder), str(tmp_path / "out"), "gptq-int4"]
    peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    layer = hidden * hidden * 2 + 2 * hidden * hidden // 3 + 3 * hidden * intermediate
    hessians = 3 * hidden**2 + intermediate**2
    activations = 8 * 64 * hidden
    assert peak < 4 * (2 * (layer + hessians) + activations) + 600e6


@pytest.mark.slow
def test_time_grows_no_faster_than_the_number_of_layers(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    """Processor seconds of one thread. Another process slows some rounds down, work that grows with the square all of them: one will do."""
    folders = {n: tiny_llama(layers=n) for n in (4, 16)}
    n_threads = torch.get_num_threads()
    ops.set_threads(1)
    try:
        quantize(folders[4], tmp_path / "warm", "gptq-int4")
        rounds = ({n: processor_seconds(folder, tmp_path / f"{n}-{i}") for n, folder in folders.items()} for i in range(6))
        assert any(seconds[16] < 4 * 1.15 * seconds[4] for seconds in rounds)
    finally:
        ops.set_threads(n_threads)


def processor_seconds(folder: Path, target: Path) -> float:
    start = time.process_time()
    quantize(folder, target, "gptq-int4")
    return time.process_time() - start


def test_progress_events_carry_what_a_user_wants_to_see(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    start = time.perf_counter()
    events = [e for e in quantize(tiny_llama(), tmp_path / "out", "gptq-int4") if isinstance(e, LayerDone)]
    layer = events[1]
    assert (layer.index, layer.n_layers) == (1, len(events))
    assert layer.relative_error is not None
    assert 0 < layer.relative_error < 0.05
    assert 4 < layer.bpw < 5
    assert 0 < sum(e.seconds for e in events) < time.perf_counter() - start
    assert events[0].relative_error is None


def test_the_largest_tensors_are_spread_among_the_layers() -> None:
    def unit(layer: str, name: str) -> pipeline.Unit:
        spec = TensorSpec.dense(name, "F32", (1,))
        return layer, [PlannedTensor(spec, None, None, (spec,))]

    ends = [[unit(name, name)] for name in ("embed", "head", "norm")]
    layers = [[unit(f"l.{i}", f"l.{i}.{k}") for k in range(2)] for i in range(3)]
    order = [tensors[0].name for _, tensors in pipeline.spread([ends[0], *layers, *ends[1:]])]
    assert order == ["embed", "l.0.0", "l.0.1", "head", "l.1.0", "l.1.1", "norm", "l.2.0", "l.2.1"]
    assert pipeline.spread(ends) == [unit for end in ends for unit in end]
