"""quantcli eval: how good a model is, and how far from its original."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantcli.cli import options
from quantcli.cli.console import Console, size
from quantcli.cli.results import Progress
from quantcli.errors import GateError

if TYPE_CHECKING:
    from quantcli.walk.evaluate import Scores

DATASET_HELP = "A .txt, .jsonl, .json or .parquet file, or a datasets name; several are read one after the other."


def command(
    source: options.Source,
    baseline: Annotated[str | None, typer.Option(help="The original model: adds KL divergence and top-1 agreement.")] = None,
    dataset: Annotated[list[str] | None, typer.Option(metavar="TEXT", help=DATASET_HELP)] = None,
    samples: options.Samples = 64,
    seq_len: options.SeqLen = 512,
    activations: Annotated[bool, typer.Option(help="Simulate the rounding of inputs that the engine does.")] = True,
    max_perplexity: Annotated[float | None, typer.Option(help="Exit with code 9 above this perplexity.")] = None,
    max_kld: Annotated[float | None, typer.Option(help="Exit with code 9 above this mean KL divergence.")] = None,
    device: options.Device = "auto",
    threads: options.Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Measure perplexity, and with --baseline KL divergence and top-1 agreement."""
    from quantcli import api

    if max_kld is not None and baseline is None:
        raise options.wrong("--max-kld", "it needs --baseline, the model to diverge from")
    console = Console(json, quiet, verbose)
    with Progress(console, "evaluating") as progress:
        scores = api.evaluate(
            source,
            baseline=baseline,
            data=dataset or (),
            samples=samples,
            seq_len=seq_len,
            activations=activations,
            device=options.device_of(console, device, threads),
            on_event=progress,
        )
    data = scores.to_dict()
    console.result(data, render(data))
    check_gates(scores, max_perplexity, max_kld)


def render(data: dict[str, Any]) -> list[str]:
    lines = [
        read(data),
        f"size            {size(data['n_bytes'])}, {data['bpw']:.3f}bpw",
        *(["activations     simulated"] if data["activations"] == "simulated" else []),
    ]
    if data.get("kld_mean") is None:
        return lines
    return [
        lines[0],
        f"baseline        {data['baseline_perplexity']:.4f}",
        f"KL divergence   mean {data['kld_mean']:.5f}, 99 % {data['kld_p99']:.5f}, max {data['kld_max']:.3f}",
        f"top-1 agreement {data['top1_agreement']:.2%}",
        *lines[1:],
    ]


def read(data: dict[str, Any]) -> str:
    """The first line: the perplexity, or of a model that has none how far its last layer's output is from the baseline's."""
    if data["perplexity"] is not None:
        return f"perplexity      {data['perplexity']:.4f} +- {data['perplexity_stderr']:.4f} over {data['n_tokens']} tokens"
    error = data["layers"][-1]["relative_error"]
    return f"hidden states   relative error {error:.2e} after the last layer over {data['n_tokens']} tokens (no perplexity)"


def check_gates(scores: Scores, max_perplexity: float | None, max_kld: float | None) -> None:
    """Raise :class:`GateError` for the first gate that was missed."""
    if scores.perplexity is None and (max_perplexity is not None or max_kld is not None):
        raise GateError("this model predicts no next token: it has no perplexity and no KL divergence to hold against a limit")
    if max_perplexity is not None and scores.perplexity is not None and not scores.perplexity <= max_perplexity:
        raise GateError(f"perplexity {scores.perplexity:.4f} is above --max-perplexity {max_perplexity}")
    if max_kld is not None and scores.kld_mean is not None and not scores.kld_mean <= max_kld:
        raise GateError(f"mean KL divergence {scores.kld_mean:.5f} is above --max-kld {max_kld}")
