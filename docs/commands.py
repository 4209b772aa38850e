"""The reference of docs/cli.md, read from the commands themselves: usage, description, arguments and options of each verb."""

from __future__ import annotations

import html
import inspect
from collections.abc import Iterable, Sequence

from typer.core import TyperCommand
from typer.main import get_command

from quantcli.cli import VERBS, app


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; reStructuredText's double backticks become single ones."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|").replace("``", "`") for cell in line) + " |" for line in lines)


def reference() -> str:
    """A section for each verb, in the order of ``quantcli --help``."""
    commands = get_command(app).commands  # type: ignore[attr-defined]
    return "\n\n".join(section(name, commands[name]) for name in VERBS)


def section(name: str, command: TyperCommand) -> str:
    """Usage, description and a table of what the verb takes, with the words of its ``--help``."""
    context = command.make_context(name, [], resilient_parsing=True)
    usage = " ".join(["quantcli", name, *command.collect_usage_pieces(context)])
    records = [record for parameter in command.get_params(context) if (record := parameter.get_help_record(context))]
    rows = [[code(option), " ".join(what.split())] for option, what in records]
    return "\n\n".join([f"### {name}", f"```\n{usage}\n```", inspect.cleandoc(command.help), table(["option", "what"], rows)])


def code(text: str) -> str:
    """``text`` as code in a table's cell; Markdown dialects differ on how to write a vertical bar there."""
    return f"`{text}`" if "|" not in text else f"<code>{html.escape(text).replace('|', '&#124;')}</code>"
