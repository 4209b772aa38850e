"""One decoder layer of Llama-3-8B's shape through every stage of the calibrated passes, and through GPTQModel's where it is at hand.

    python tests/bench/bench_layer.py --device cuda --samples 128 --seq-len 2048 [--peer PYTHON_WITH_GPTQMODEL]

Prints seconds, operations, bytes and the share of the floor that they set: the longer of operations over the speed of a large product, and
bytes over the speed of a large copy, both measured here first. On a CPU a few thousand tokens tell the speed of each stage, and
``--hidden 1024 --intermediate 3584`` the same in a minute. The model is random and made here: nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from safetensors.torch import save_file

from quantcli import ops, qtypes
from quantcli.calibration.measuring import measure
from quantcli.formats import open_checkpoint
from quantcli.forward import HiddenStates, LoadedLayer, run_dtype
from quantcli.passes import awq, gptq
from quantcli.passes.shared import basis
from quantcli.planning.arrange import open_forward
from quantcli.tensors import Absorber, Layer, Scheme, Stats
from support.tiny_models import byte_level_bpe, llama_config, llama_groups, write_shards, write_tokenizer

T = TypeVar("T")
SCHEME = Scheme.parse("int4-g128-asym")
GROUP = 128


@dataclass(slots=True)
class Machine:
    """What sets the floor: ``flops`` a second of a product in each dtype, ``bytes`` a second read and written by a copy."""

    device: torch.device
    flops: dict[torch.dtype, float] = field(default_factory=dict)
    bytes: float = 0.0

    def measure(self, dtype: torch.dtype) -> None:
        n = 8192 if self.device.type == "cuda" else 1024
        for kind in {dtype, torch.float32}:
            A = torch.randn(n, n, device=self.device).to(kind)
            self.flops[kind] = 2 * n**3 / self.best(lambda A=A: A @ A)
        data = torch.zeros((1 << 30 if self.device.type == "cuda" else 1 << 27) // 4, device=self.device)
        other = torch.empty_like(data)
        self.bytes = 2 * data.nbytes / self.best(lambda: other.copy_(data))

    def best(self, run: Callable[[], object], repeats: int = 5) -> float:
        return min(self.time(run)[0] for _ in range(repeats))

    def time(self, run: Callable[[], T]) -> tuple[float, T]:
        self.wait()
        start = time.perf_counter()
        result = run()
        self.wait()
        return time.perf_counter() - start, result

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass(slots=True)
class Bench:
    """Stages as they are run. ``n_tokens`` calibrate the layer."""

    machine: Machine
    n_tokens: int
    seconds: dict[str, float] = field(default_factory=dict)

    def stage(self, name: str, run: Callable[[], T], flops: float, n_bytes: float, dtype: torch.dtype = torch.float32) -> T:
        seconds, result = self.machine.time(run)
        floor = max(flops / self.machine.flops[dtype], n_bytes / self.machine.bytes)
        self.seconds[name] = seconds
        share = f"{floor / seconds:6.1%} of the floor's speed"
        print(f"{name:<22} {seconds:9.3f} s {flops / 1e9:12.1f} GFLOP {n_bytes / 1e6:10.0f} MB   {share}")  # noqa: T201
        return result


def measured(bench: Bench, layer: LoadedLayer, states: HiddenStates, dtype: torch.dtype) -> dict[str, Stats]:
    """The layer run as it is, then again under meters: the difference is what statistics cost."""
    widths, n = layer.tap_widths, bench.n_tokens
    n_weights = sum(layer.tensors[name].numel() for name in layer.tensors)
    seq_len, hidden = states.hidden.shape[1:]
    flops = 2 * n * n_weights + 2 * n * seq_len * hidden  # causal attention: half of 4·n·T·hidden
    bench.stage("forward", lambda: [layer(h, ids) for h, ids in states.batches()], flops, 4 * n_weights, dtype)
    gram = sum(n * width**2 for width in widths.values())  # a symmetric product: half of 2·n·in²
    stats = bench.stage("forward + statistics", lambda: measure(layer, states), flops + gram, 4 * n * sum(widths.values()), dtype)
    bench.seconds["statistics"] = bench.seconds["forward + statistics"] - bench.seconds["forward"]
    return stats


def solved(bench: Bench, word: str, Ws: list[Tensor], H: Tensor) -> None:
    """GPTQ on one tap: its factor, then grid and codes of each of its matrices."""
    n, rows = len(H), sum(len(W) for W in Ws)
    factor = bench.stage(f"factor {word}", lambda: gptq.factorize(H, damp_ratio=0.01), 2 / 3 * n**3, 12 * n * n)
    importance, qtype = H.diagonal().contiguous(), qtypes.of(SCHEME.qtype)
    grids = bench.stage(f"grid {word}", lambda: [qtype.fit(W, SCHEME, importance) for W in Ws], 0, 4 * rows * n)
    pairs = list(zip(Ws, grids, strict=True))
    codes = bench.stage(f"solve {word}", lambda: [gptq.solve(W, grid, factor) for W, grid in pairs], rows * n * n, 8 * rows * n)
    bench.stage(f"pack {word}", lambda: [qtype.pack(c, g, SCHEME) for c, g in zip(codes, grids, strict=True)], 0, 2 * rows * n)


def rescaled(bench: Bench, word: str, Ws: list[Tensor], H: Tensor) -> None:
    """AWQ on one tap: ratios tried on sampled rows, then the clipping of all."""
    n, rows = len(H), sum(len(W) for W in Ws)
    names = [f"{i}.weight" for i in range(len(Ws))]
    few = basis.sampled(Layer("", dict(zip(names, Ws, strict=True)), dict.fromkeys(names, SCHEME)), names)
    work = 20 * sum(len(W) for W in few[SCHEME]) * n * n  # the upper half of each product
    read = basis.Read(few, Stats(H.diagonal(), torch.ones(n), torch.zeros(n), 1, H))
    bench.stage(f"awq ratios {word}", lambda: awq.search([read], Absorber(("",), torch.arange(n))), work, 20 * 4 * n * n)
    importance, qtype = H.diagonal().contiguous(), qtypes.of(SCHEME.qtype)
    pairs = [(W, qtype.fit(W, SCHEME, importance)) for W in Ws]
    work = rows * n * (4 * GROUP + 20 * len(awq.CLIP_FACTORS))  # two products with a block of H, then each factor's codes and errors
    bench.stage(f"awq clipping {word}", lambda: [awq.clipped(W, grid, SCHEME, H) for W, grid in pairs], work, 4 * rows * n)


def peer_seconds(python: str, folder: Path, ids: Tensor, device: str, method: str) -> float:
    """GPTQModel's, on the same layer and tokens. It fills the folder it runs in with logs."""
    save_file({"windows": ids.int()}, folder / "windows.safetensors")
    script = Path(__file__).with_name("gptqmodel_layer.py")
    command = [python, script, folder, folder / "windows.safetensors", device, method]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, cwd=folder)
    if done.returncode:
        raise SystemExit(f"GPTQModel's {method} failed:\n{done.stderr[-2000:]}")
    return float(done.stdout.split()[-1])


def run(folder: Path, words: argparse.Namespace, ids: Tensor) -> dict[str, float]:
    device = torch.device(words.device)
    with open_checkpoint(str(folder)) as source:
        dtype = run_dtype(source.specs.values(), device)
        machine = Machine(device)
        machine.measure(dtype)
        speeds = f"{machine.flops[dtype] / 1e9:.0f} GFLOP/s, {machine.bytes / 1e9:.1f} GB/s"
        print(f"{device}, {torch.get_num_threads()} threads; {dtype}: {speeds}")  # noqa: T201
        bench, forward = Bench(machine, ids.numel()), open_forward(source, dtype=dtype, device=device)
        states = HiddenStates.embed(forward, ids)
        stored = sum(source.specs[name].nbytes for name in forward.layer_tensors(0))
        bench.stage("read", lambda: forward.layer(0).__enter__(), 0, stored)
        with forward.layer(0) as layer:
            stats = measured(bench, layer, states, dtype)
            groups: dict[str, list[Tensor]] = {}
            for name, tap in forward.taps.items():
                groups.setdefault(tap, []).append(layer.tensors[name].float())
            for tap, Ws in groups.items():
                H = stats[tap].H
                assert H is not None
                solved(bench, tap.rpartition(".")[2], Ws, H)
                rescaled(bench, tap.rpartition(".")[2], Ws, H)
    return bench.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--peer", default=os.environ.get("QUANTCLI_GPTQMODEL_PYTHON"), help="a Python with gptqmodel; '' leaves it out")
    for name, value in {
        "hidden": 4096,
        "intermediate": 14336,
        "heads": 32,
        "kv-heads": 8,
        "samples": 4,
        "seq-len": 512,
        "vocab": 512,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    words = parser.parse_args()
    if words.threads:
        ops.set_threads(words.threads)
    config = llama_config(words.hidden, words.intermediate, 1, words.heads, words.kv_heads, words.vocab, "bfloat16", False, False)
    ids = torch.randint(words.vocab, (words.samples, words.seq_len), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(config))
        write_tokenizer(folder, byte_level_bpe(words.vocab))
        write_shards(folder, llama_groups(config), torch.bfloat16, 1, 0)
        seconds = run(folder, words, ids)
        walk = seconds["read"] + seconds["forward + statistics"] + seconds["forward"]
        steps = {"gptq": ("factor", "grid", "solve", "pack"), "awq": ("awq", "grid", "pack")}
        for method, kinds in steps.items():
            ours = walk + sum(s for stage, s in seconds.items() if stage.split()[0] in kinds)
            theirs = f", GPTQModel {peer_seconds(words.peer, folder, ids, words.device, method):.1f} s" if words.peer else ""
            print(f"a layer by {method} {ours:.1f} s, of which its two runs and statistics {walk:.1f} s{theirs}")  # noqa: T201


if __name__ == "__main__":
    main()
