"""A random Llama of 1.1 billion weights from its shards to Q4_K_M, against convert_hf_to_gguf + llama-quantize on as many threads.

    QUANTCLI_LLAMA_CPP=… python tests/bench/bench_export.py FOLDER [--layers 16] [--threads 2] [--rounds 1]

The model is made in FOLDER once (2.2 GB). Prints the seconds of each step, by the clock and of the processors, their ratio, the most memory
that ours held, and whether all tensors are equal byte for byte. ``--profile`` runs ours alone and prints where its time goes: how long each
kind of work ran in all threads together, how busy they were, and how long the end took, when nothing is left to overlap.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from quantcli.formats import open_checkpoint
from quantcli.formats.gguf.file.headers import read_header
from support.tiny_models import byte_level_bpe, llama_config, llama_groups, write_shards, write_tokenizer

LLAMA_CPP = Path(os.environ.get("QUANTCLI_LLAMA_CPP", "/nowhere"))

CONVERT = """
import runpy, sys
root, model, out = sys.argv[1:]
sys.path[:0] = [root, root + "/gguf-py"]
from conversion import base
base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
sys.argv = ["convert", model, "--outfile", out, "--outtype", "bf16"]
runpy.run_path(root + "/convert_hf_to_gguf.py", run_name="__main__")
"""


def make(folder: Path, layers: int) -> Path:
    """The model's folder, written unless it stands."""
    model = folder / f"llama-{layers}"
    if (model / "tokenizer.json").is_file():
        return model
    model.mkdir(parents=True, exist_ok=True)
    config = llama_config(2048, 8192, layers, 32, 8, 32000, "bfloat16", tied=False, bias=False)
    (model / "config.json").write_text(json.dumps(config))
    write_shards(model, llama_groups(config), torch.bfloat16, 5, 0)
    write_tokenizer(model, byte_level_bpe(512))
    return model


def timed(command: list[str | Path], threads: int) -> tuple[float, float, bytes]:
    """(wall seconds, cpu seconds, what it printed) of a program."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    process = subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    printed, errors = process.communicate()
    seconds = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode:
        raise SystemExit(errors.decode()[-2000:])
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, cpu, printed


def ours(model: Path, out: Path, threads: int) -> list[str | Path]:
    return [
        sys.executable,
        "-m",
        "quantcli",
        "export",
        model,
        "Q4_K_M",
        "-o",
        out,
        "--threads",
        str(threads),
        "--overwrite",
        "--json",
        "-q",
    ]


def are_equal(a: Path, b: Path) -> bool:
    """Whether two files hold the same tensors."""
    one, two = read_header(a), read_header(b)
    if list(one.specs.values()) != list(two.specs.values()):
        return False
    with a.open("rb") as first, b.open("rb") as second:
        for name, spec in one.specs.items():
            first.seek(one.offsets[name])
            second.seek(two.offsets[name])
            if first.read(spec.nbytes) != second.read(spec.nbytes):
                return False
    return True


def compare(model: Path, folder: Path, threads: int) -> None:
    converted, quantized = folder / "theirs-bf16.gguf", folder / "theirs.gguf"
    commands: dict[str, list[str | Path]] = {
        "quantcli export": ours(model, folder / "ours.gguf", threads),
        "convert_hf_to_gguf": [sys.executable, "-c", CONVERT, LLAMA_CPP, model, converted],
        "llama-quantize": [LLAMA_CPP / "build/bin/llama-quantize", converted, quantized, "Q4_K_M", str(threads)],
    }
    results = {name: timed(command, threads) for name, command in commands.items()}
    for name, (wall, cpu, _) in results.items():
        print(f"{name:<20} {wall:7.1f} s  cpu {cpu:6.1f} s")  # noqa: T201
    (mine, my_cpu, printed), *others = results.values()
    wall_ratio, cpu_ratio = sum(wall for wall, _, _ in others) / mine, sum(cpu for _, cpu, _ in others) / my_cpu
    peak = json.loads(printed)["peak_ram_bytes"] / 2**20
    equal = are_equal(folder / "ours.gguf", quantized)
    print(f"ratio {wall_ratio:.2f}, cpu {cpu_ratio:.2f}  peak memory of ours {peak:.0f} MiB  tensors equal {equal}")  # noqa: T201


class Clock:
    """How long each kind of work ran and how long it computed, in all calling threads together. What is called inside another kind counts
    there alone; a kernel's own threads are not seen, so compute with one thread tells most."""

    def __init__(self) -> None:
        self.wall: dict[str, float] = defaultdict(float)
        self.cpu: dict[str, float] = defaultdict(float)
        self.inside = threading.local()
        self.lock = threading.Lock()

    def watch(self, owner: Any, name: str, kind: str) -> None:
        run: Callable[..., Any] = getattr(owner, name)

        @wraps(run)
        def watched(*args: Any, **kwargs: Any) -> Any:
            if getattr(self.inside, "kind", None):
                return run(*args, **kwargs)
            self.inside.kind, started, cpu = kind, time.perf_counter(), time.thread_time()
            try:
                return run(*args, **kwargs)
            finally:
                self.inside.kind = None
                with self.lock:
                    self.wall[kind] += time.perf_counter() - started
                    self.cpu[kind] += time.thread_time() - cpu

        setattr(owner, name, watched)


def profile(model: Path, out: Path, threads: int) -> None:
    from quantcli import ops
    from quantcli.checkpoint.checkpoint import Checkpoint
    from quantcli.output import writer
    from quantcli.passes import rtn
    from quantcli.planning.selection import of_type
    from quantcli.walk import pipeline

    ops.set_threads(threads)
    clock = Clock()
    clock.watch(Checkpoint, "read", "read")
    clock.watch(rtn, "quantize", "quantize")
    clock.watch(rtn, "weight_error", "measure the error")
    clock.watch(writer.Writer, "put", "write")
    clock.watch(writer.Writer, "commit", "commit")
    started, cpu = time.perf_counter(), time.process_time()
    with open_checkpoint(str(model)) as source:
        for _ in pipeline.quantize(source, out, of_type("gguf", "Q4_K_M"), overwrite=True):
            pass
    wall, cpu = time.perf_counter() - started, time.process_time() - cpu
    for kind, seconds in clock.wall.items():
        print(f"{kind:<20} {seconds:7.2f} s, cpu {clock.cpu[kind]:6.2f} s")  # noqa: T201
    print(f"{'wall':<20} {wall:7.2f} s, cpu {cpu:.2f} s: {cpu / wall / threads:.0%} of {threads} threads")  # noqa: T201


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--profile", action="store_true")
    words = parser.parse_args()
    model = make(words.folder, words.layers)
    for _ in range(words.rounds):
        if words.profile:
            profile(model, words.folder / "ours.gguf", words.threads)
        else:
            compare(model, words.folder, words.threads)


if __name__ == "__main__":
    main()
