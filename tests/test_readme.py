"""The README says what is so: its tables are those of the code, its commands and its recipe parse, its files exist."""

from __future__ import annotations

import ast
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import typer
import yaml
from test_house import FLOORS

sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))

import tables

from quantcli import recipe
from quantcli.cli import app, main
from quantcli.cli.console import size
from quantcli.tensors import Scheme

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
COMMANDS = sorted({line.removeprefix("$ ") for _, text in BLOCKS for line in text.splitlines() if re.match(r"(\$ )?quantcli ", line)})
FOREIGN_VARIABLES = {"QUANTCLI_CUDA"}
"""Names that are CMake's, not the environment's."""


@pytest.mark.parametrize("name", tables.TABLES)
def test_a_table_is_the_one_its_source_gives(name: str) -> None:
    assert name not in tables.stale(), "run python docs/tables.py --write"


def test_a_changed_table_is_found() -> None:
    first_row = tables.recipes().splitlines()[2]
    assert "recipes" in tables.stale(lambda page: tables.read(page).replace(first_row, first_row.upper()))


def test_every_recipe_is_described() -> None:
    assert [name for name in recipe.shipped() if not recipe.load(name).description] == []


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_line_of_the_readme_parses(line: str) -> None:
    verb, *arguments = shlex.split(line)[1:]
    context = typer.main.get_command(app).commands[verb].make_context(verb, arguments)  # type: ignore[attr-defined]
    for text in context.params.get("rule") or ():
        Scheme.parse(text.rpartition("=")[2])
    for key, known in (("type_", recipe.shipped()), ("recipe", recipe.shipped())):
        word = context.params.get(key)
        assert word is None or word.lower() in known, f"no {key} {word}"


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("quantcli inspect pico")])
def test_the_picture_shows_what_inspect_prints(line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT / "tests/data")
    with pytest.raises(SystemExit):
        main(shlex.split(line)[1:])
    assert f"$ {line}\n{capsys.readouterr().out}" in README


@pytest.mark.parametrize("line", [line for line in COMMANDS if re.match("quantcli (quantize|export) pico", line)])
def test_the_picture_shows_the_sizes_that_are_planned(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pico").symlink_to(ROOT / "tests/data/pico")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main([*shlex.split(line)[1:], "--dry-run", "--json", "-q"])
    plan = json.loads(capsys.readouterr().out)
    shown = README.partition(f"$ {line}\n")[2].partition("\n$")[0]
    assert f"{plan['output']}\n{size(plan['n_bytes'])}, {plan['bpw']:.3f}bpw" in shown


def test_the_readme_shows_every_verb() -> None:
    assert {line.split()[1] for line in COMMANDS} == {command.name for command in app.registered_commands}


def test_the_recipes_of_the_readme_load() -> None:
    first, second = (recipe.parse(yaml.safe_load(text), "readme") for language, text in BLOCKS if language == "yaml")
    assert first.rules
    assert second.protect_outliers


def test_the_make_targets_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text("utf8")
    for target in set(re.findall(r"(?:^|`)make ([a-z-]+)", README, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize("page", ["README.md", "ARCHITECTURE.md", "CHANGELOG.md", "tests/PEERS.md", "docs/log.md"])
def test_links_lead_to_files(page: str) -> None:
    path = ROOT / page
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text("utf8")):
        assert target.startswith("https://") or (path.parent / target).exists(), target


def test_every_environment_variable_is_in_the_readme() -> None:
    sources = [path for folder in ("quantcli", "tests", "docs") for path in (ROOT / folder).rglob("*.py")]
    used = {
        node.value
        for path in sources
        for node in ast.walk(ast.parse(path.read_text("utf8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"QUANTCLI_[A-Z_]+", node.value)
    }
    assert used - FOREIGN_VARIABLES - set(re.findall(r"`(QUANTCLI_[A-Z_]+)`", README)) == set()


def test_architectures_rooms_exist() -> None:
    """Each file and folder of the map in §2, and no module of quantcli/ that the map leaves out."""
    text = (ROOT / "ARCHITECTURE.md").read_text("utf8")
    rooms = re.search(r"^## 2\. Rooms\n+```\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert rooms is not None
    folder, shown = ROOT, set()
    for line in rooms[1].splitlines():
        words = re.match(r" *(\S+(?: \S+)*)(?:  |$)", line)
        assert words is not None, line
        folder = folder if line.startswith("  ") else ROOT
        for word in words[1].split():
            assert list(folder.glob(word.rstrip("/"))), f"{folder.name}/{word}"
            shown.add((folder, word.strip("/")))
        if not line.startswith("  ") and words[1].endswith("/"):
            folder = ROOT / words[1]
    inside = {path.name for path in (ROOT / "quantcli").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert {name for name in inside if not name.startswith("__")} == {word for room, word in shown if room == ROOT / "quantcli"}


def test_architectures_import_line_is_the_one_that_is_tested() -> None:
    (line,) = re.findall(r"^cli → .*$", (ROOT / "ARCHITECTURE.md").read_text("utf8"), re.MULTILINE)
    assert [set(floor.split(", ")) for floor in line.split(" → ")] == [floor for floor in FLOORS if floor != {"__main__"}]
