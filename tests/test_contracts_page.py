"""docs/contracts.md shows each contract as its source has it: signatures, defaults, what must be written, docstrings as Markdown."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))

import contracts
import tables

import quantcli
from quantcli import ops
from quantcli.archs import Architecture
from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.formats import Format, OutputLayout
from quantcli.output.writer import Writer
from quantcli.passes import Pass
from quantcli.qtypes import QType

PAGE = contracts.reference()
PUBLISHED = (QType, Pass, Format, OutputLayout, Checkpoint, Writer, Architecture)


def section(name: str) -> str:
    return PAGE.partition(f"\n### {name}\n")[2].partition("\n### ")[0]


@pytest.mark.parametrize("contract", PUBLISHED, ids=lambda contract: contract.__name__)
def test_every_method_of_a_contract_is_shown_with_what_must_be_written(contract: type) -> None:
    shown = section(contract.__name__)
    items = dict(re.findall(r"^- `(\w+)(.*)", shown, re.MULTILINE))
    own = {name for name in vars(contract) if not name.startswith("_")} - set(getattr(contract, "__dataclass_fields__", ()))
    assert own <= items.keys()
    abstract = getattr(contract, "__abstractmethods__", frozenset())
    assert {name for name, text in items.items() if "(**must be written**)" in text} == abstract


def test_every_function_of_the_library_is_shown() -> None:
    shown = set(re.findall(r"^- `(\w+)\(", PAGE.partition("\n### ")[0], re.MULTILINE))
    assert shown == {name for name in quantcli.__all__ if inspect.isfunction(getattr(quantcli, name))}


def test_every_op_is_shown() -> None:
    shown = PAGE.partition("\n## Ops\n")[2]
    assert sorted(re.findall(r"^- `(\w+)\(", shown, re.MULTILINE)) == ops.__all__


def test_a_changed_default_is_found() -> None:
    assert "contracts" in tables.stale(lambda page: tables.read(page).replace("request: Request = DEFAULTS", "request: Request"))


def test_a_name_that_the_source_lost_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"tensors\.py has no NOWHERE"):
        list(contracts.parts_of(contracts.Section("Nouns", ("tensors.py",), ("HEAD", "NOWHERE"))))


def resolve(name: str) -> object:
    """What a dotted name below ``quantcli`` means."""
    parts = name.split(".")
    for n_modules in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(["quantcli", *parts[:n_modules]]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[n_modules:]:
            found = getattr(found, attribute)
        return found
    raise ModuleNotFoundError(name)


def test_every_name_of_the_package_that_a_docstring_gives_exists() -> None:
    rooms = "|".join(path.stem for path in contracts.PACKAGE.iterdir() if not path.name.startswith("_"))
    names = set(re.findall(rf"`((?:{rooms})(?:\.\w+)+)`", PAGE))
    assert len(names) > 5
    for name in sorted(names):
        assert resolve(name) is not None


def function(source: str) -> ast.FunctionDef:
    (node,) = ast.parse(inspect.cleandoc(source)).body
    assert isinstance(node, ast.FunctionDef)
    return node


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def f(self, W: Tensor, *, n: int = 3) -> Grid: ...", "- `f(W: Tensor, *, n: int = 3) -> Grid`"),
        ("def f(a, b='x', *more: str, **options: Any) -> None: ...", '- `f(a, b="x", *more: str, **options: Any) -> None`'),
        ("@property\ndef f(self) -> int: ...", "- `f: int` (property)"),
        ("@classmethod\n@abstractmethod\ndef f(cls) -> int: ...", "- `f() -> int` (**must be written**, class method)"),
    ],
)
def test_a_signature_is_that_of_the_source(source: str, expected: str) -> None:
    assert contracts.item(function(source), "") == expected


@pytest.mark.parametrize(
    ("doc", "expected"),
    [
        ("Of ``W``: [out,\nin].", "Of `W`: [out, in]."),
        (":class:`~quantcli.errors.RecipeError` and :func:`quantcli.ops.round_inputs`", "`RecipeError` and `ops.round_inputs`"),
        ("|x| < 3, 2 * a_b, _c", r"\|x\| \< 3, 2 \* a_b, \_c"),
        ("Maths::\n\n    a_1 * b\n\nMore.", "Maths:\n\n```\na_1 * b\n```\n\nMore."),
    ],
)
def test_a_docstring_becomes_markdown(doc: str, expected: str) -> None:
    assert contracts.markdown(doc) == expected
