"""GPTQ, AWQ and SmoothQuant against llm-compressor: the same windows of text, the same numbers, as many threads, one after the other.

    QUANTCLI_LLMCOMPRESSOR_PYTHON=… python tests/bench/bench_calibrated.py MODEL CALIBRATION_TEXT TEST_TEXT [METHOD …]

Prints for each method the seconds of the whole command and of its processors, the peer's own seconds without its imports, and the KL
divergence of both outputs from MODEL on the test text (`quantcli eval`). ``--peer-dtype`` is what the peer runs the model in: float32 is
the faster on processors without bfloat16.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from bench_export import timed
from safetensors.torch import save_file

from quantcli.formats import open_checkpoint
from quantcli.forward import tokenizer

CLIENT = Path(__file__).with_name("llmcompressor_calibrated.py")

RECIPES = {"gptq": "gptq-w4a16-asym", "awq": "awq-w4a16", "smoothquant": "smoothquant-w8a8"}


def quantcli(threads: int, verb: str, *words: str | Path) -> tuple[float, float, dict]:
    """(wall seconds, cpu seconds, its JSON) of a command."""
    wall, cpu, printed = timed([sys.executable, "-m", "quantcli", verb, *words, "--threads", str(threads), "--json", "-q"], threads)
    return wall, cpu, json.loads(printed)


def kl(output: Path, words: argparse.Namespace) -> float:
    options = ["--baseline", words.model, "--dataset", words.test, "--samples", "32", "--seq-len", str(words.seq_len)]
    return quantcli(words.threads, "eval", output, *options)[2]["kld_mean"]


def compare(method: str, folder: Path, windows: Path, words: argparse.Namespace) -> None:
    ours, theirs = folder / f"{method}-ours", folder / f"{method}-theirs"
    text = ["--dataset", words.calibration, "--samples", str(words.samples), "--seq-len", str(words.seq_len)]
    wall, cpu, _ = quantcli(words.threads, "quantize", words.model, "--recipe", RECIPES[method], *text, "-o", ours)
    peer = os.environ["QUANTCLI_LLMCOMPRESSOR_PYTHON"]
    their_wall, their_cpu, printed = timed([peer, CLIENT, words.model, theirs, windows, method, words.peer_dtype], words.threads)
    alone = json.loads(printed.splitlines()[-1])["seconds"]
    print(  # noqa: T201
        f"{method:<12} quantcli {wall:6.1f} s, cpu {cpu:6.1f} s, KL {kl(ours, words):.5f}   "
        f"llm-compressor {their_wall:6.1f} s, cpu {their_cpu:6.1f} s, without imports {alone:6.1f} s, KL {kl(theirs, words):.5f}   "
        f"ratio {their_wall / wall:5.2f}, cpu {their_cpu / cpu:5.2f}, without their imports {alone / wall:5.2f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("methods", nargs="*", default=list(RECIPES))
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peer-dtype", choices=["float32", "bfloat16"], default="float32")
    words = parser.parse_args()
    with tempfile.TemporaryDirectory() as made, open_checkpoint(str(words.model)) as source:
        windows = Path(made) / "windows.safetensors"
        ids = windows.windows_of([str(words.calibration)], tokenizer(source), words.samples, words.seq_len)
        save_file({"windows": ids.contiguous()}, windows)
        for method in words.methods:
            compare(method, Path(made), windows, words)


if __name__ == "__main__":
    main()
