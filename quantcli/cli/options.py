"""Options that several verbs share, with one wording each."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from quantcli.checkpoint.checkpoint import Checkpoint
    from quantcli.cli.console import Console

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
    typer.Option(
        metavar="TEXT[=WEIGHT]",
        help="A .txt, .jsonl, .json or .parquet file of texts or conversations, or a datasets name; may be given several times.",
    ),
]
Samples = Annotated[int, typer.Option(min=1, help="Windows of text.")]
SeqLen = Annotated[int, typer.Option(min=2, help="Tokens in a window.")]
Moe = Annotated[
    str | None, typer.Option("--moe", metavar="routed|all", help="What calibrates an expert: the tokens routed to it (usual), or all.")
]
Rules = Annotated[list[str] | None, typer.Option("--rule", metavar="REGEX=SCHEME", help="Scheme of the tensors REGEX finds; first wins.")]
Skips = Annotated[list[str] | None, typer.Option("--skip", metavar="REGEX", help="Leave the tensors that REGEX finds as they are.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Where to write; <model>-<recipe> in this folder when left out.")]
Imatrix = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Importance matrix (llama-imatrix's .gguf or .dat), or statistics of calibrate."),
]
PreTokenizer = Annotated[str | None, typer.Option(help="llama.cpp's name of the pre-tokenizer, for GGUF.")]


def wrong(option: str, message: str) -> typer.BadParameter:
    """A usage error (exit code 2): ``option`` has a value that fits no model."""
    return typer.BadParameter(message, param_hint=option)


def set_up_device(console: Console, device: str, threads: int | None) -> str:
    """The torch device that ``--device`` means, with ``--threads`` applied to torch and to our kernels."""
    import torch

    from quantcli import ops
    from quantcli.errors import KernelError

    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise wrong("--device", f"expected auto, cpu, cuda or cuda:N, not '{device}'")
    if threads is not None:
        ops.set_threads(threads)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda"):
        index = int(device.partition(":")[2] or 0)
        if index >= torch.cuda.device_count():
            raise KernelError(f"--device {device}: this machine has {torch.cuda.device_count()} CUDA devices; use --device cpu")
    console.detail(f"device {device}, {torch.get_num_threads()} threads, kernels for {ops.active()}, torch {torch.__version__}")
    return device


def check_moe(moe: str | None) -> None:
    """Refuse another word than those that a recipe knows."""
    from quantcli.recipe import MOE

    if moe is not None and moe not in MOE:
        raise wrong("--moe", f"expected {' or '.join(MOE)}, not '{moe}'")


def check_context(console: Console, checkpoint: Checkpoint, seq_len: int) -> None:
    """Warn of windows longer than the model was made for."""
    limit = checkpoint.config.get("max_position_embeddings")
    if isinstance(limit, int) and seq_len > limit:
        console.warn(f"windows of {seq_len} tokens are longer than the {limit} this model was made for; lower --seq-len")


def split_pair(text: str, option: str) -> tuple[str, str]:
    """``REGEX=VALUE`` at its last equals sign."""
    left, sign, right = text.rpartition("=")
    if not sign or not left or not right:
        raise wrong(option, f"expected REGEX=VALUE, not '{text}'")
    return left, right
