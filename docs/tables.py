"""What the pages say of the code, made from the code: recipes from configs/, commands from their options, files from docstrings, ….

    python docs/tables.py            # says which tables are out of date; exit code 1 if any is
    python docs/tables.py --write    # puts them right

A table stands in its page between ``<!-- NAME: … -->`` and ``<!-- /NAME -->``. tests/test_readme.py checks that all are up to date, and
tests/test_conversions.py tries every cell of the conversions.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Callable
from dataclasses import fields
from functools import cache
from pathlib import Path

import contracts
from commands import reference, table

from quantcli import conversions as converting
from quantcli import errors, formats, recipe
from quantcli.planning import engines as known_engines
from quantcli.registry import find, names
from quantcli.tensors import Scheme

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"

CODED: dict[str, tuple[str, ...]] = {
    "gptq": ("int4-g32-sym", "int4-g32-asym", "int2-g32-asym", "int3-g32-sym", "int8-g32-sym", "int8-g32-asym", "int4-g32-sym-desc"),
    "awq": ("int4-g32-sym", "int4-g32-asym"),
    "compressed-tensors": (
        *("int4-g32-sym-sbf16", "int4-g32-asym-sbf16", "int8-channel-sym-sbf16", "int8-channel-sym-sbf16+int8-token"),
        *("fp8-tensor-sbf16", "fp8-channel-sbf16+fp8-token", "fp8-block-sbf16+fp8-g128", "mxfp4", "mxfp8", "nvfp4"),
    ),
    "fp8": ("fp8-tensor", "fp8-block"),
    "bitsandbytes": ("nf4-b64", "nf4-b64-dq", "fp4-b64", "llm_int8"),
}
"""What the formats that quantcli writes hold, one scheme for each kind, as a bfloat16 model has them."""

WIDTH = 256
"""Inputs of a row, for questions of divisibility."""

OTHER_EXITS = {
    0: "done",
    1: "a bug in quantcli: a traceback, and a line asking for a report",
    2: "wrong usage of the command line",
    129: "stopped by SIGHUP; the same command goes on behind the last finished layer",
    130: "interrupted (Ctrl-C), likewise",
    143: "stopped by SIGTERM, likewise",
}


def recipes() -> str:
    """One row a recipe, in the order of configs/."""
    rows = []
    for name in recipe.shipped():
        found = recipe.load(name)
        passes = ", ".join(p.name for p in found.passes)
        calibrated = "yes" if found.is_calibrated else "no"
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
        rows.append([f"[{target}](../{target})", first_sentence(path)])
    return table(["file", "what"], rows)


def exit_codes() -> str:
    classes = {cls.exit_code: cls for cls in errors.QuantcliError.__subclasses__()}
    meanings = OTHER_EXITS | {code: f"{cls.__name__}: {(cls.__doc__ or '').splitlines()[0]}" for code, cls in classes.items()}
    return table(["code", "meaning"], ([str(code), meanings[code]] for code in sorted(meanings)))


def writable() -> list[str]:
    """The formats that export can write."""
    return [name for name in formats.names() if formats.of(name).is_written]


def conversion(source: Scheme, target: str) -> tuple[Scheme | None, str]:
    """What ``export --format TARGET`` makes of a tensor: its scheme there (None: dense), and "exact", "codes" or "requantized"."""
    fmt = formats.of(target)
    for scheme in converting.candidates(source):
        if fmt.supports(scheme) and (degree := converting.exactness(source, scheme, WIDTH)):
            return scheme, degree
    return None if fmt.usual_scheme is None else Scheme.parse(fmt.usual_scheme), "requantized"


def conversions() -> str:
    """One row a scheme in a format, one column a format to export to."""
    rows = []
    for format_, schemes in CODED.items():
        for text in schemes:
            cells = []
            for target in writable():
                scheme, degree = conversion(Scheme.parse(text), target)
                cells.append("decoded" if scheme is None else f"**{scheme}**" if degree == "exact" else f"{scheme}, {degree}")
            rows.append([format_, f"`{text}`", *cells])
    return table(["from", "scheme", *writable()], rows)


def releases(*, tested: bool) -> list[str]:
    """The releases of the table, in its order, that a test has load something, or the others."""
    found = {row.release.strip(): None for row in known_engines.SUPPORT if row.is_tested is tested}
    return list(found)


def answer(release: str, name: str) -> str:
    """The cell of ``release`` for the recipe ``name``; empty where that is not known."""
    found = recipe.load(name)
    row = known_engines.of(release, found.format)
    if row is None:
        return ""
    if found.scheme is not None and row.unmet(found.scheme):
        return row.otherwise or "**no**"
    return f"with {row.needs}" if row.needs else "yes"


def engines() -> str:
    """One row for the recipes of a format that load alike, one column a reader."""
    columns = releases(tested=True)
    alike: dict[tuple[str, ...], list[str]] = {}
    for name in recipe.shipped():
        alike.setdefault((recipe.load(name).format, *(answer(reader, name) for reader in columns)), []).append(f"`{name}`")
    rows = [[format_, ", ".join(alike[format_, *answers]), *answers] for format_, *answers in sorted(alike)]
    return table(["format", "recipes", *columns], rows)


def limits() -> str:
    """One row for each engine and format of which something is known from its source."""
    rows = []
    for row in known_engines.SUPPORT:
        if row.is_tested and not row.options and row.takes_experts:
            continue
        taken = "; ".join(f"{option}: {', '.join(map(str, values))}" for option, values in row.options.items())
        if not row.takes_experts:
            taken = f"{taken or 'all'}; no experts"
        rows.append([row.release, row.format, taken or "all", row.otherwise or (f"with {row.needs}" if row.needs else "")])
    return table(["engine", "format", "loads", "how otherwise"], rows)


def passes() -> str:
    """One row a pass, with its options as a recipe writes them."""
    rows = []
    for name in names("passes"):
        module = find("passes", name)
        options = [f"`{option.name}: {json.dumps(option.default)}`" for option in fields(module.Options)]
        meaning = " ".join((module.Options.__doc__ or "").split()) if options else ""
        rows.append([f"`{name}`", first_sentence(Path(module.__file__)), ", ".join(options), meaning])
    return table(["pass", "what", "options", "what they mean"], rows)


TABLES: dict[str, tuple[Path, Callable[[], str]]] = {
    "recipes": (DOCS / "recipes.md", recipes),
    "passes": (DOCS / "recipes.md", passes),
    "engines": (DOCS / "engines.md", engines),
    "limits": (DOCS / "engines.md", limits),
    "commands": (DOCS / "cli.md", reference),
    "exit codes": (DOCS / "cli.md", exit_codes),
    "conversions": (DOCS / "conversions.md", conversions),
    "files": (DOCS / "files.md", files),
    "contracts": (DOCS / "contracts.md", contracts.reference),
}


def filled(text: str, name: str, content: str) -> str:
    """``text`` with ``content`` between the marks of ``name``."""
    marks = re.compile(rf"(<!-- {name}: [^>]*-->\n).*?(<!-- /{name} -->)", re.DOTALL)
    result, n_found = marks.subn(lambda match: f"{match[1]}{content}\n{match[2]}", text)
    if n_found != 1:
        raise ValueError(f"expected one <!-- {name}: … --> … <!-- /{name} -->, found {n_found}")
    return result


def read(page: Path) -> str:
    return page.read_text("utf8")


@cache
def content(name: str) -> str:
    """The table ``name`` as it should be."""
    return TABLES[name][1]()


def stale(text_of: Callable[[Path], str] = read) -> list[str]:
    """Names of the tables that their pages do not have as they should be."""
    texts = {name: text_of(page) for name, (page, _) in TABLES.items()}
    return [name for name, text in texts.items() if filled(text, name, content(name)) != text]


def main(arguments: list[str]) -> int:
    names_ = stale()
    if "--write" in arguments:
        for name in names_:
            page, _ = TABLES[name]
            page.write_text(filled(read(page), name, content(name)), "utf8")
        return 0
    lines = [f"{TABLES[name][0].name}: the table '{name}' is out of date: python docs/tables.py --write\n" for name in names_]
    sys.stdout.write("".join(lines))
    return 1 if names_ else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
