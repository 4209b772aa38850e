"""The README's tables, made from what they describe: recipes from configs/, files from docstrings, exit codes from errors.py.

    python docs/tables.py            # says which tables of the README are out of date; exit code 1 if any is
    python docs/tables.py --write    # puts them right

A table stands in the README between ``<!-- NAME: … -->`` and ``<!-- /NAME -->``. tests/test_readme.py holds them equal.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from quantcli import errors, recipe

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"

OTHER_EXITS = {
    0: "done",
    1: "a bug in quantcli: a traceback, and a line asking for a report",
    2: "wrong usage of the command line",
    130: "interrupted (Ctrl-C)",
}


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|").replace("``", "`") for cell in line) + " |" for line in lines)


def recipes() -> str:
    """One row a recipe, in the order of configs/."""
    rows = []
    for name in recipe.shipped():
        found = recipe.load(name)
        passes = ", ".join(p.name for p in found.passes)
        calibrated = "yes" if found.needs else "no"
        rows.append([f"`{name}`", passes, str(found.scheme or found.mix), found.format, calibrated, found.description])
    return table(["recipe", "passes", "numbers", "format", "text needed", "what for"], rows)


def first_sentence(path: Path) -> str:
    """The first sentence of a module's docstring."""
    doc = ast.get_docstring(ast.parse(path.read_text("utf8"))) or ""
    match = re.match(r"(.+?\.)(\s|$)", " ".join(doc.split()))
    if match is None:
        raise ValueError(f"{path}: no docstring that opens with a sentence")
    return match[1]


def modules() -> list[Path]:
    """Every module of the package, folders after the files beside them."""
    package = ROOT / "quantcli"
    return sorted(package.rglob("*.py"), key=lambda p: (p.parent != package, p.parent, p.name != "__init__.py", p.name))


def files() -> str:
    """One row a module; a folder is its ``__init__.py``."""
    rows = []
    for path in modules():
        shown = path.relative_to(ROOT).as_posix()
        target = shown.removesuffix("__init__.py")
        rows.append([f"[{target}]({target})", first_sentence(path)])
    return table(["file", "what"], rows)


def exit_codes() -> str:
    classes = {cls.exit_code: cls for cls in errors.QuantcliError.__subclasses__()}
    meanings = OTHER_EXITS | {code: f"{cls.__name__}: {(cls.__doc__ or '').splitlines()[0]}" for code, cls in classes.items()}
    return table(["code", "meaning"], ([str(code), meanings[code]] for code in sorted(meanings)))


TABLES: dict[str, Callable[[], str]] = {"recipes": recipes, "files": files, "exit codes": exit_codes}


def filled(text: str, name: str, content: str) -> str:
    """``text`` with ``content`` between the marks of ``name``."""
    marks = re.compile(rf"(<!-- {name}: [^>]*-->\n).*?(<!-- /{name} -->)", re.DOTALL)
    result, n_found = marks.subn(lambda match: f"{match[1]}{content}\n{match[2]}", text)
    if n_found != 1:
        raise ValueError(f"{README}: expected one <!-- {name}: … --> … <!-- /{name} -->, found {n_found}")
    return result


def stale(text: str) -> list[str]:
    """Names of the tables that ``text`` does not have as they should be."""
    return [name for name, make in TABLES.items() if filled(text, name, make()) != text]


def main(arguments: list[str]) -> int:
    text = README.read_text("utf8")
    names = stale(text)
    for name in names:
        text = filled(text, name, TABLES[name]())
    if "--write" in arguments:
        README.write_text(text, "utf8")
        return 0
    sys.stdout.write("".join(f"README.md: the table '{name}' is out of date: python docs/tables.py --write\n" for name in names))
    return 1 if names else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
