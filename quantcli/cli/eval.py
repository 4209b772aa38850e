"""quantcli eval: how good a model is, and how far from its original."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantcli.cli import options
from quantcli.cli.console import Console, size
from quantcli.errors import GateError

if TYPE_CHECKING:
    from torch import Tensor

    from quantcli.checkpoint.checkpoint import Checkpoint


DATASET_HELP = "A .txt, .jsonl, .json or .parquet file, or a datasets name; several are read one after the other."


def command(
    source: options.Source,
    baseline: Annotated[str | None, typer.Option(help="The model it was made from: adds KL divergence and top-1 agreement.")] = None,
    dataset: Annotated[list[str] | None, typer.Option(metavar="TEXT", help=DATASET_HELP)] = None,
    samples: options.Samples = 64,
    seq_len: options.SeqLen = 512,
    activations: Annotated[bool, typer.Option(help="Round the inputs of quantized linears as their engine does.")] = True,
    max_perplexity: Annotated[float | None, typer.Option(help="Exit with code 9 above this perplexity.")] = None,
    max_kld: Annotated[float | None, typer.Option(help="Exit with code 9 above this mean KL divergence.")] = None,
    device: options.Device = "auto",
    threads: options.Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Measure perplexity, and with --baseline KL divergence and top-1 agreement."""
    from contextlib import ExitStack

    from quantcli.formats import open_checkpoint
    from quantcli.walk import evaluate

    if max_kld is not None and baseline is None:
        raise options.wrong("--max-kld", "it needs --baseline, the model to diverge from")
    console = Console(json, quiet, verbose)
    torch_device = options.set_up_device(console, device, threads)
    scores: evaluate.Scores | None = None
    with ExitStack() as stack:
        checkpoint = stack.enter_context(open_checkpoint(source))
        original = stack.enter_context(open_checkpoint(baseline)) if baseline else None
        tell_activations(console, checkpoint, activations)
        windows = read_windows(console, original or checkpoint, dataset or [], samples, seq_len)
        check_unseen(console, checkpoint, windows)
        with console.progress("evaluating") as progress:
            walk = evaluate.evaluate(checkpoint, windows, baseline=original, device=torch_device, activations=activations)
            for event in walk:
                if isinstance(event, evaluate.Scores):
                    scores = event
                else:
                    error = "" if event.relative_error is None else f"  error {event.relative_error:.2e}"
                    progress.step(event.index, event.n_layers, f"{event.name}{error}  {event.seconds:.1f} s")
        n_bytes = sum(spec.nbytes for spec in checkpoint.specs.values())
        n_params = sum(spec.n_elements for spec in (original or checkpoint).specs.values())
    assert scores is not None
    if left := scores.not_simulated:
        console.warn(f"the inputs of {len(left)} matrices are taken as they are, where the engine rounds them; the first is {left[0]}")
    data = {**scores.to_dict(), "n_bytes": n_bytes, "bpw": 8 * n_bytes / n_params}
    console.result(data, render(data))
    check_gates(scores, max_perplexity, max_kld)


def tell_activations(console: Console, checkpoint: Checkpoint, simulated: bool) -> None:
    """A note on what becomes of the linears' inputs, where the engine rounds them."""
    from quantcli.walk.evaluate import rounded_inputs

    acts = Counter(rounded_inputs(checkpoint).values())
    if not acts:
        return
    kinds = ", ".join(f"{act} of {n} linears" for act, n in acts.items())
    if simulated:
        console.note(f"inputs are rounded as the engine does: {kinds}; --no-activations measures the weights alone")
    else:
        console.note(f"inputs are taken as they are, where the engine rounds them: {kinds}")


def read_windows(console: Console, checkpoint: Checkpoint, datasets: list[str], samples: int, seq_len: int) -> Tensor:
    """The first windows of the texts, in order; by default of a text that calibration does not use."""
    from quantcli.forward import tokenizer
    from quantcli.text import texts

    options.check_context(console, checkpoint, seq_len)
    return texts.eval_windows_of(datasets, tokenizer(checkpoint), samples, seq_len, note=console.note)


def check_unseen(console: Console, checkpoint: Checkpoint, windows: Tensor) -> None:
    """Warn when the text was calibrated on, as far as ``checkpoint`` tells: its figures would then flatter it."""
    from quantcli.text import overlap

    sketch = checkpoint.provenance.get("dataset_sketch")
    if not isinstance(sketch, str) or not re.fullmatch("([0-9a-f]{8})+", sketch):
        return
    if (found := overlap.overlap(sketch, windows)).is_notable:
        console.warn(f"{found.share:.0%} of this text was calibrated on, which flatters the model; give --dataset with other text")


def render(data: dict[str, Any]) -> list[str]:
    lines = [
        f"perplexity      {data['perplexity']:.4f} +- {data['perplexity_stderr']:.4f} over {data['n_tokens']} tokens",
        f"size            {size(data['n_bytes'])}, {data['bpw']:.3f}bpw",
        *(["activations     simulated"] if data["activations"] == "simulated" else []),
    ]
    if "kld_mean" not in data:
        return lines
    return [
        lines[0],
        f"baseline        {data['baseline_perplexity']:.4f}",
        f"KL divergence   mean {data['kld_mean']:.5f}, 99 % {data['kld_p99']:.5f}, max {data['kld_max']:.3f}",
        f"top-1 agreement {data['top1_agreement']:.2%}",
        *lines[1:],
    ]


def check_gates(scores: Any, max_perplexity: float | None, max_kld: float | None) -> None:
    """Raise :class:`GateError` for the first gate that was missed."""
    if max_perplexity is not None and not scores.perplexity <= max_perplexity:
        raise GateError(f"perplexity {scores.perplexity:.4f} is above --max-perplexity {max_perplexity}")
    if max_kld is not None and not scores.kld_mean <= max_kld:
        raise GateError(f"mean KL divergence {scores.kld_mean:.5f} is above --max-kld {max_kld}")
