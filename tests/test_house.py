"""The house rules that a machine can check: who may import whom, contracts of the variant folders, names, start-up time."""

from __future__ import annotations

import ast
import re
import resource
import subprocess
import sys
from collections.abc import Collection, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from quantcli import formats, passes, qtypes
from quantcli.formats import Format
from quantcli.passes import Pass
from quantcli.qtypes import QType
from quantcli.registry import find, names
from support.floors import FLOORS

ROOT = Path(__file__).parent.parent / "quantcli"

FLOOR_OF = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}
ONLY = {"quantcli._kernels": "ops", "transformers": "forward", "typer": "cli", "rich": "cli"}
BANNED_NAMES = {"utils", "common", "base", "helpers", "manager"}
CONTRACT = {"archs": "ARCH", "qtypes": "QTYPE", "passes": "PASS", "formats": "FORMAT"}
"""Folder of variants → the one name that each module exports."""


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
        assert FLOOR_OF[there] > FLOOR_OF[here] or FLOORS[-1] >= {here, there}, where


def test_no_private_name_crosses_rooms() -> None:
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text("utf8"))):
            if not isinstance(node, ast.ImportFrom) or not str(node.module).startswith("quantcli"):
                continue
            words = [*str(node.module).split("."), *(alias.name for alias in node.names)]
            private = [word for word in words if word.startswith("_") and word not in ("_kernels", "__version__")]
            assert not private or str(node.module).split(".")[1:2] == [room_of(path)], f"{path}:{node.lineno} imports {private[0]}"


def test_an_import_for_types_alone_or_in_a_function_counts(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "from typing import TYPE_CHECKING\nfrom quantcli import planning\n"
        "if TYPE_CHECKING:\n    from quantcli.forward import Forward, hidden\n"
        "def f():\n    import torch\n"
    )
    expected = {("typing", 1), ("quantcli.planning", 2), ("quantcli.forward", 4), ("quantcli.forward.hidden", 4), ("torch", 6)}
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
    assert hasattr(module, CONTRACT[folder]), f"{folder}/{variant} lacks {CONTRACT[folder]}"


VARIANTS: list[tuple[type, object]] = [
    *((QType, qtypes.of(name)) for name in qtypes.names()),
    *((Pass, passes.of(name)) for name in passes.names()),
    *((Format, formats.of(name)) for name in formats.names()),
]


def variant_name(value: object) -> str | None:
    return value.name if isinstance(value, (QType, Pass, Format)) else None


@pytest.mark.parametrize(("contract", "variant"), VARIANTS, ids=variant_name)
def test_a_variant_has_no_public_attribute_but_those_of_its_contract(contract: type, variant: QType | Pass | Format) -> None:
    """A hook whose name is misspelt would never be called."""
    found = {key for cls in type(variant).__mro__ for key in (*vars(cls), *vars(cls).get("__annotations__", ()))}
    found |= vars(variant).keys() if hasattr(variant, "__dict__") else set()
    known = {*dir(contract), *contract.__annotations__}
    assert not {key for key in found if not key.startswith("_")} - known


@pytest.mark.parametrize(("contract", "variant"), VARIANTS, ids=variant_name)
def test_a_variant_is_named_after_its_file(contract: type, variant: QType | Pass | Format) -> None:
    folder = {QType: "qtypes", Pass: "passes", Format: "formats"}[contract]
    exported = [value for value in vars(find(folder, variant.name)).values() if isinstance(value, contract)]
    assert exported == [variant]


def test_a_number_format_that_overrides_a_hook_says_so() -> None:
    """Passes ask by these properties, so that no variant has to say twice what it does."""
    own = {name for name in qtypes.names() if qtypes.of(name).has_own_encoding}
    assert set(qtypes.names()) - own == {"int", "hqq"}
    assert {name for name in qtypes.names() if qtypes.of(name).can_rescale} == {"int", "q4_1", "q5_1"}
    assert {name for name in qtypes.names() if qtypes.of(name).shares_parts} == {"fp8", "nvfp4"}


PROBES = {
    "__init__.py": "a module of ours, for a name of the library",
    "tensors.py": "torch's own, by version",
    "ops/block_grid.py": "a table of the gguf package, by name",
    "heap.py": "a C library's",
    "output/disk.py": "a C library's",
    "output/system.py": "a C library's",
    "statistics/stats_file.py": "fields of a dataclass of ours, by name",
    "recipe.py": "fields of a dataclass of ours, by name",
    "walk/evaluate.py": "fields of dataclasses of ours, by name",
    "cli/__init__.py": "an error of the parser's, whose class typer does not name",
    "formats/gguf/model/metadata.py": "methods of the gguf package's, by name",
    "text/documents/records.py": "a tokenizer of transformers'",
    "forward/names.py": "a model of transformers'",
    "forward/modules.py": "a class of transformers', by name",
    "forward/skeleton.py": "a config of transformers'",
    "forward/positions.py": "a config of transformers'",
    "forward/even_pieces.py": "a function of torch's, by name",
}
"""Files that may ask an object whether it has an attribute, and whose object that is."""


def test_nobody_asks_a_variant_what_it_has() -> None:
    """A contract has a default for every hook, so that its callers need no hasattr and a type checker sees every call."""
    asking = set()
    for path in modules():
        called = {
            node.func.id
            for node in ast.walk(ast.parse(path.read_text("utf8")))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        if called & {"hasattr", "getattr"}:
            asking.add(path.relative_to(ROOT).as_posix())
    assert asking == PROBES.keys()


WRITES = re.compile(r"[rwax]?[bt]?[wax+][bt]?\+?")
"""Modes of open that write."""

CHANGING = {"write", "pwrite", "fsync", "rename", "renames", "replace", "renameat2", "unlink", "remove", "rmdir", "removedirs", "ftruncate"}
CHANGING |= {"truncate", "posix_fallocate", "mkdir", "makedirs", "link", "symlink", "chmod", "flock", "pread", "read"}
"""Functions of os and fcntl that only output/system.py calls."""

PATH_CHANGING = {"write_bytes", "write_text", "mkdir", "unlink", "rmdir", "touch", "symlink_to", "hardlink_to", "rmtree", "save_file"}
"""Methods and functions of other modules likewise."""


def test_one_module_changes_the_disk() -> None:
    """Tests let every call of output/system.py fail: one that goes past it would never be tried."""
    passing = []
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text("utf8"))):
            if not isinstance(node, ast.Call):
                continue
            called = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id if isinstance(node.func, ast.Name) else ""
            owner = node.func.value.id if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name) else ""
            is_system = owner in ("os", "fcntl") and called in CHANGING
            is_path = owner != "system" and called in PATH_CHANGING
            is_open = called == "open" and any(isinstance(arg, ast.Constant) and WRITES.fullmatch(str(arg.value)) for arg in node.args[:2])
            if is_system or is_path or is_open:
                passing.append(f"{path.relative_to(ROOT).as_posix()}:{node.lineno}: {ast.unparse(node)}")
    left = [call for call in passing if not call.startswith("output/system.py:") and "os.devnull" not in call]
    assert len(passing) > len(left)
    assert left == []


def test_every_module_opens_with_one_sentence() -> None:
    for path in modules():
        doc = ast.get_docstring(ast.parse(path.read_text("utf8"))) or ""
        first = doc.split("\n\n")[0]
        assert first.endswith("."), f"{path}: its first sentence is '{first}'"


def test_nothing_is_named_after_nothing() -> None:
    assert not [p for p in modules() if p.stem in BANNED_NAMES]


def test_help_is_quick_and_imports_no_torch() -> None:
    """0.3 s is meant for an idle machine, so the time that counts is the processor's: on a slow one, thrice what typer alone takes."""
    code = (
        "import sys\nfrom quantcli.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), 'a heavy library was imported'\n"
    )
    best, typer = (min(_cpu_seconds([sys.executable, "-c", c]) for _ in range(3)) for c in (code, "import typer"))
    assert best < max(0.3, 3 * typer), f"--help took {best:.2f} s, and typer's import {typer:.2f} s"


def _cpu_seconds(command: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_one_place_shows_a_checkpoint_under_other_names() -> None:
    """A view that another module made would not be what plan, memory table and evaluation see."""
    makers = {
        path.relative_to(ROOT).as_posix()
        for path in modules()
        for node in ast.walk(ast.parse(path.read_text("utf8")))
        if isinstance(node, ast.ImportFrom) and node.module == "quantcli.checkpoint.views" and "View" in {a.name for a in node.names}
    }
    assert makers == {"planning/arrange.py"}


RETIRED = {
    "Prev": "Absorber",
    "Coding": "LayerEncoder",
    "Familiarity": "TextCheck",
    "familiarity": "text_check",
    "is_coded": "is_quantized",
    "is_recoded": "is_requantized",
    "regrid": "conversions",
    "choices": "schemes",
    "unfused": "experts_apart",
    "Calibrated": "Windows",
    "Activations": "HiddenStates",
}
"""A name that is not used any more → the one that is."""


def test_retired_names_stay_retired() -> None:
    found = []
    for path in modules():
        words = {word for part in path.relative_to(ROOT).parts for word in (part.removesuffix(".py"),)}
        for node in ast.walk(ast.parse(path.read_text("utf8"))):
            for field in ("id", "attr", "name", "arg", "asname"):
                if isinstance(word := getattr(node, field, None), str):
                    words.add(word)
        found += [f"{path.relative_to(ROOT)}: {word} is now {RETIRED[word]}" for word in sorted(words & RETIRED.keys())]
    assert not found
