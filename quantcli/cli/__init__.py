"""The command line: one file a verb, each parse → call → render."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

import typer

from quantcli import __version__
from quantcli.cli.console import Console
from quantcli.errors import QuantcliError

app = typer.Typer(
    name="quantcli",
    help="Turn a Hugging Face checkpoint into the best possible quantized model, and prove it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: rich would double the start-up time
    context_settings={"help_option_names": ["-h", "--help"]},
)

for verb in ("inspect", "calibrate", "quantize", "export", "eval"):
    app.command(verb)(import_module(f"quantcli.cli.{verb}").command)


def _version(show: bool) -> None:
    if show:
        Console().out(f"quantcli {__version__}")
        raise typer.Exit


@app.callback()
def _root(version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version and exit.")) -> None:
    pass


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit with the code of what happened (see errors.py and cli.md)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    console = Console(verbose="-v" in argv or "--verbose" in argv)
    try:
        code = app(argv, standalone_mode=False, prog_name="quantcli")
    except QuantcliError as error:
        sys.exit(console.failure(error, error.exit_code))
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(console.interrupted())
    except Exception as error:
        if hasattr(error, "exit_code") and hasattr(error, "show"):  # the parser's own: wrong usage
            error.show()
            sys.exit(error.exit_code)
        sys.exit(console.bug(error))
    sys.exit(code if isinstance(code, int) else 0)
