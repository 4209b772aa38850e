"""The command line: one file a verb, each parse → call → render."""

from __future__ import annotations

import errno
import signal
import sys
import threading
from collections.abc import Sequence
from importlib import import_module

import typer

from quantcli import __version__
from quantcli.cli.console import Console
from quantcli.errors import CheckpointError, KernelError, OptionError, QuantcliError, ResourceError

INTERRUPTED = 130
STOPS = (signal.SIGTERM, signal.SIGHUP)
"""Signals that end a run as Ctrl-C does; the exit code is 128 and the signal's number, as a shell counts."""
VERBS = ("inspect", "calibrate", "quantize", "export", "eval")

app = typer.Typer(
    name="quantcli",
    help="Turn a Hugging Face checkpoint into the best possible quantized model, and prove it.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: rich would double the start-up time
    context_settings={"help_option_names": ["-h", "--help"]},
)

for verb in VERBS:
    app.command(verb)(import_module(f"quantcli.cli.{verb}").command)


def _version(show: bool) -> None:
    if show:
        Console().out(f"quantcli {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version and exit."),
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(2)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit with the code of what happened (see errors.py and cli.md)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    received = _stop_on_signals()
    console = Console(verbose="-v" in argv or "--verbose" in argv)
    try:
        code = app(argv, standalone_mode=False, prog_name="quantcli")
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Exception as error:
        code = _failed(console, error)
    if code == INTERRUPTED:  # typer returns it for a Ctrl-C that it caught itself
        console.interrupted()
        code = 128 + received[0] if received else INTERRUPTED
    sys.exit(code if isinstance(code, int) else 0)


def _stop_on_signals() -> list[int]:
    """From now on a signal of :data:`STOPS` interrupts as Ctrl-C does; the list gets its number. What is ignored (nohup) stays ignored."""
    received: list[int] = []

    def stop(number: int, frame: object) -> None:
        received.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        for number in STOPS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, stop)
    return received


def _failed(console: Console, error: Exception) -> int:
    """Tell the user of ``error``; the exit code."""
    if hasattr(error, "format_message"):  # a usage error of the parser, whose class typer does not name
        context = getattr(error, "ctx", None)
        return console.usage(error.format_message(), context.command_path if context else "quantcli")
    if isinstance(error, OptionError):
        option = error.option if error.option.isupper() else "--" + error.option.replace("_", "-")
        return console.usage(f"Invalid value for {option}: {error}", " ".join(["quantcli", *sys.argv[1:2]]))
    if (foreseen := _foreseen(error)) is not None:
        return console.failure(foreseen)
    return console.bug(error)


def _foreseen(error: Exception) -> QuantcliError | None:
    """``error`` as something a user can act on, or None for a bug. What the system or a device refuses can come from any line."""
    if isinstance(error, QuantcliError):
        return error
    told: QuantcliError | None = None
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        told = ResourceError(f"{error.filename or 'the disk'}: {error.strerror}; free space there or choose another place")
    elif isinstance(error, OSError) and error.filename is not None:
        told = CheckpointError(f"{error.filename}: {error.strerror}; check the path and its permissions")
    elif isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):
        told = ResourceError("not enough memory; lower --samples or --seq-len, or take a machine or device with more")
    elif isinstance(error, RuntimeError) and "CUDA error" in str(error):
        told = KernelError(f"{str(error).splitlines()[0]}; try --device cpu")
    if told is not None:
        told.__cause__ = error
    return told
