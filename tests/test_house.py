"""The house rules that a machine can check: who may import whom, contracts of the variant folders, names, start-up time."""

from __future__ import annotations

import ast
import resource
import subprocess
import sys
from collections.abc import Collection, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from quantcli.registry import find, names

ROOT = Path(__file__).parent.parent / "quantcli"

FLOORS = [
    {"__main__"},
    {"cli"},
    {"pipeline", "coding", "evaluate", "events", "calibrated"},
    {"plan", "choices", "caches", "calibrate", "measuring", "original", "familiarity", "meter"},
    {"forward"},
    {"formats", "passes"},
    {"checkpoint", "cuts", "recipe", "regrid", "ranges", "outliers", "readahead", "stats_file"}
    | {"writer", "shards", "locations", "json_files", "texts", "documents", "overlap"},
    {"archs", "qtypes"},
    {"ops"},
    {"tensors", "errors", "experts", "registry", "heap", "disk"},
]
FLOOR_OF = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}
ONLY = {"quantcli._kernels": "ops", "transformers": "forward", "typer": "cli", "rich": "cli"}
BANNED_NAMES = {"utils", "common", "base", "helpers", "manager"}
CONTRACT = {
    "archs": ("ARCH",),
    "qtypes": ("OPTIONS", "layout", "fit", "pack", "unpack"),
    "passes": ("NEEDS", "Options", "run"),
    "formats": ("detect", "read", "supports", "context", "outputs", "parts", "writer"),
}


@cache
def modules() -> tuple[Path, ...]:
    return tuple(sorted(ROOT.rglob("*.py")))


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")


@cache
def known() -> frozenset[str]:
    return frozenset(name_of(path) for path in modules())


def imports(path: Path) -> list[tuple[str, int]]:
    """Every module that ``path`` imports, with its line; one imported in a function or under ``if TYPE_CHECKING`` is one like any other.

    ``from package import x`` is an import of the module x, or of the package's ``__init__`` where that has the word.
    """
    found = []
    for node in ast.walk(ast.parse(path.read_text("utf8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [(name if name in known() or node.module == "quantcli" else str(node.module), node.lineno) for name in names]
    return found


def circle_of(graph: Mapping[str, Collection[str]]) -> list[str]:
    """The modules of an import circle, each importing the next one; none when there is no circle."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(reversed(error.args[1]))
    return []


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_only_to_the_right(path: Path) -> None:
    here = room_of(path)
    for module, line in imports(path):
        if not module.startswith("quantcli.") or module in ONLY or here == "__init__":
            continue
        there = module.split(".")[1]
        if there in ("__version__", here):
            continue
        where = f"{path.relative_to(ROOT)}:{line} imports {module}"
        assert there in FLOOR_OF, f"{where}, a room that test_house.py does not know"
        assert FLOOR_OF[there] > FLOOR_OF[here] or (there != here and FLOORS[FLOOR_OF[here]] >= {here, there} and here not in CONTRACT), (
            where
        )


def test_an_import_for_types_alone_or_in_a_function_counts(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "from typing import TYPE_CHECKING\nfrom quantcli import plan\nif TYPE_CHECKING:\n    from quantcli.forward import Forward, hidden\n"
        "def f():\n    import torch\n"
    )
    expected = {("typing", 1), ("quantcli.plan", 2), ("quantcli.forward", 4), ("quantcli.forward.hidden", 4), ("torch", 6)}
    assert set(imports(path)) == expected


def test_no_modules_import_each_other_in_a_circle() -> None:
    """What a package's ``__init__`` hands on is its own import; that it runs before the package's modules makes none of theirs."""
    graph = {name_of(path): {module for module, _ in imports(path)} for path in modules()}
    assert len(graph) > 100
    assert circle_of(graph) == []
    assert circle_of({"a": {"b", "d"}, "b": {"c"}, "c": {"a"}, "d": set()}) in (
        ["a", "b", "c", "a"],
        ["b", "c", "a", "b"],
        ["c", "a", "b", "c"],
    )


@pytest.mark.parametrize("folder", ["archs", "qtypes", "passes", "formats"])
def test_no_variant_imports_its_neighbour(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        variant = path.relative_to(ROOT / folder).parts[0].removesuffix(".py")
        for module, line in imports(path):
            parts = module.split(".")
            if parts[:2] == ["quantcli", folder] and len(parts) > 2 and folder != "archs":
                assert parts[2] == variant or parts[2] not in names(folder), f"{path}:{line} imports {module}"


@pytest.mark.parametrize(("library", "room"), ONLY.items())
def test_only_one_room_imports(library: str, room: str) -> None:
    for path in modules():
        for module, line in imports(path):
            if module == library or module.startswith(library + "."):
                assert room_of(path) == room, f"{path.relative_to(ROOT)}:{line} imports {module}"


@pytest.mark.parametrize(("folder", "variant"), [(f, v) for f in CONTRACT for v in names(f)])
def test_every_variant_keeps_its_contract(folder: str, variant: str) -> None:
    module = find(folder, variant)
    assert module.__doc__
    for attribute in CONTRACT[folder]:
        assert hasattr(module, attribute), f"{folder}/{variant} lacks {attribute}"


def test_every_module_opens_with_one_sentence() -> None:
    for path in modules():
        doc = ast.get_docstring(ast.parse(path.read_text("utf8"))) or ""
        first = doc.split("\n\n")[0]
        assert first.endswith("."), f"{path}: its first sentence is '{first}'"


def test_nothing_is_named_after_nothing() -> None:
    assert not [p for p in modules() if p.stem in BANNED_NAMES]


def test_help_is_quick_and_imports_no_torch() -> None:
    """0.3 s is meant for an idle machine, so the time that counts is the processor's."""
    code = (
        "import sys\nfrom quantcli.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), 'a heavy library was imported'\n"
    )
    best = min(_cpu_seconds([sys.executable, "-c", code]) for _ in range(3))
    assert best < 0.3, f"--help took {best:.2f} s"


def _cpu_seconds(command: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
