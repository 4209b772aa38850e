"""Options that several verbs share, with one wording each."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from quantcli.cli.console import Console
    from quantcli.importance import ImportanceSource
    from quantcli.recipe import Recipe
    from quantcli.statistics.stats_file import StatsFile

SOURCE_HELP = "Hugging Face folder, Hub id (org/name[@revision]), quantized folder or .gguf file."

Source = Annotated[str, typer.Argument(metavar="SOURCE", help=SOURCE_HELP)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notes; warnings remain.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="More detail; tracebacks of errors.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; all cores when left out.")]
Seed = Annotated[int, typer.Option(help="Random seed.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a finished output.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Drop the work of an interrupted run instead of going on with it.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")]
Dataset = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TEXT[=WEIGHT]",
        help="A .txt, .jsonl, .json or .parquet file of texts or conversations, or a datasets name; may be given several times.",
    ),
]
Samples = Annotated[int, typer.Option(min=1, help="Number of text windows.")]
SeqLen = Annotated[int, typer.Option(min=2, help="Tokens per window.")]
Moe = Annotated[
    str | None,
    typer.Option("--moe", metavar="routed|all", help="Calibrate experts on the tokens routed to them (default), or on all."),
]
Rules = Annotated[
    list[str] | None, typer.Option("--rule", metavar="REGEX=SCHEME", help="Scheme of tensors that REGEX matches; first match wins.")
]
Skips = Annotated[list[str] | None, typer.Option("--skip", metavar="REGEX", help="Do not quantize tensors that REGEX matches.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Output path. Default: <model>-<recipe> in the current folder.")]
Imatrix = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Importance matrix (.gguf or .dat of llama-imatrix), or a statistics file of calibrate."),
]
PreTokenizer = Annotated[str | None, typer.Option(help="Name of the pre-tokenizer in llama.cpp, for GGUF.")]


def wrong(option: str, message: str) -> typer.BadParameter:
    """A usage error (exit code 2): ``option`` has a value that fits no model."""
    return typer.BadParameter(message, param_hint=option)


def device_of(console: Console, device: str, threads: int | None) -> str:
    """The torch device that ``--device`` means, with ``--threads`` applied; ``-v`` shows both."""
    import torch

    from quantcli import api, ops

    device = api.use_device(device, threads)
    console.detail(f"device {device}, {torch.get_num_threads()} threads, kernels for {ops.active()}, torch {torch.__version__}")
    return device


def read_data(stats: Path | None, imatrix: Path | None) -> StatsFile | ImportanceSource | None:
    """The file that a run learns from, where one is given."""
    from quantcli.formats.gguf.imatrix import importance
    from quantcli.statistics.stats_file import StatsFile

    if imatrix is not None:
        return importance.read(imatrix)
    return None if stats is None else StatsFile(stats)


def check_data(
    console: Console,
    recipe: Recipe,
    *,
    stats: Path | None,
    imatrix: Path | None,
    dataset: list[str] | None,
    samples: int | None,
    seq_len: int | None,
) -> None:
    """Options that nothing would read, or that contradict each other, are an error or a warning, never silent."""
    if imatrix is not None and recipe.format != "gguf":
        raise wrong("--imatrix", f"belongs to --format gguf, not to {recipe.format}")
    if imatrix is not None and stats is not None:
        raise wrong("--imatrix", "has no meaning beside --stats; give one of the two")
    given = {"--dataset": dataset, "--samples": samples, "--seq-len": seq_len}
    idle = [option for option, value in given.items() if value is not None]
    if stats is not None and idle and (recipe.needs or recipe.format != "gguf"):
        raise wrong("--stats", f"{idle[0]} has no meaning beside it: the statistics were gathered before; give one of the two")
    weighs = stats is not None and recipe.format == "gguf" and not recipe.needs  # as an importance matrix does
    if not recipe.is_calibrated and (idle or (stats is not None and not weighs)):
        console.warn(f"recipe '{recipe.name}' uses no calibration: {', '.join(idle or ['--stats'])} ignored")


def split_pair(text: str, option: str) -> tuple[str, str]:
    """``REGEX=VALUE`` at its last equals sign."""
    left, sign, right = text.rpartition("=")
    if not sign or not left or not right:
        raise wrong(option, f"expected REGEX=VALUE, not '{text}'")
    return left, right
