"""Options that several verbs share, with one wording each."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from quantcli.errors import RecipeError

SOURCE_HELP = "Hugging Face folder, Hub id (org/name[@revision]), quantized folder or .gguf file."

Source = Annotated[str, typer.Argument(metavar="SOURCE", help=SOURCE_HELP)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no notes.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="More detail; tracebacks of errors.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; all cores when left out.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a finished output.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and touch nothing.")]
Dataset = Annotated[
    list[str] | None,
    typer.Option(metavar="TEXT[=WEIGHT]", help="A .txt, .jsonl or .parquet file, or a datasets name; may be given several times."),
]
Samples = Annotated[int | None, typer.Option(min=1, help="Windows of text.")]
SeqLen = Annotated[int | None, typer.Option(min=2, help="Tokens in a window.")]
Rules = Annotated[list[str] | None, typer.Option("--rule", metavar="REGEX=SCHEME", help="Scheme of the tensors REGEX finds; first wins.")]
Skips = Annotated[list[str] | None, typer.Option("--skip", metavar="REGEX", help="Leave the tensors that REGEX finds as they are.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Where to write; <model>-<recipe> in this folder when left out.")]


def set_up_device(device: str, threads: int | None) -> str:
    """The torch device that ``--device`` means, with ``--threads`` applied to torch and to our kernels."""
    import torch

    from quantcli import ops
    from quantcli.errors import KernelError

    if threads is not None:
        torch.set_num_threads(threads)
        ops.set_threads(threads)
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise RecipeError(f"--device is auto, cpu, cuda or cuda:N, not '{device}'")
    if device.startswith("cuda"):
        index = int(device.partition(":")[2] or 0)
        if index >= torch.cuda.device_count():
            raise KernelError(f"--device {device}: this machine has {torch.cuda.device_count()} CUDA devices; use --device cpu")
    return device


def split_pair(text: str, option: str) -> tuple[str, str]:
    """``REGEX=VALUE`` at its last equals sign."""
    left, sign, right = text.rpartition("=")
    if not sign or not left or not right:
        raise RecipeError(f"{option} is written REGEX=VALUE, not '{text}'")
    return left, right
