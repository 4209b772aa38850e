"""README and docs/ say what is so: tables are those of the code, commands and recipes parse, links lead somewhere, nothing is left out."""

from __future__ import annotations

import ast
import json
import re
import shlex
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import typer
import yaml

from support.floors import FLOORS

sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))

import hooks
import tables

from quantcli import recipe
from quantcli.cli import app, main
from quantcli.cli.console import size
from quantcli.tensors import Scheme

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf8")
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "tests/*.md", ".github/**/*.md")
    for path in ROOT.glob(pattern)  # named, so that nothing in .venv or build/ is one
)
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text("utf8") for path in PAGES}
ARCHITECTURE = TEXTS["ARCHITECTURE.md"]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
BLOCKS = [(page, language, text) for page, whole in TEXTS.items() for language, text in FENCE.findall(whole)]
COMMANDS = sorted(
    {
        line.removeprefix("$ ")
        for page, language, text in BLOCKS
        for line in text.splitlines()
        if re.match(r"(\$ )?quantcli ", line) and "[OPTIONS]" not in line
    }
)
PICTURE = [page for page, text in TEXTS.items() if "$ quantcli inspect pico" in text]
FOREIGN_VARIABLES = {"QUANTCLI_CUDA"}
"""Names that are CMake's, not the environment's."""


@pytest.mark.parametrize("name", tables.TABLES)
def test_a_table_is_the_one_its_source_gives(name: str) -> None:
    assert name not in tables.stale(), "run python docs/tables.py --write"


def test_a_changed_table_is_found() -> None:
    first_row = tables.recipes().splitlines()[2]
    assert "recipes" in tables.stale(lambda page: tables.read(page).replace(first_row, first_row.upper()))


def test_a_changed_option_is_found() -> None:
    assert "commands" in tables.stale(lambda page: tables.read(page).replace("`--dry-run`", "`--dry`"))


def test_every_recipe_is_described() -> None:
    assert [name for name in recipe.shipped() if not recipe.load(name).description] == []


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_line_of_the_pages_parses(line: str) -> None:
    verb, *arguments = shlex.split(line)[1:]
    context = typer.main.get_command(app).commands[verb].make_context(verb, arguments)  # type: ignore[attr-defined]
    for text in context.params.get("rule") or ():
        Scheme.parse(text.rpartition("=")[2])
    for key, known in (("type_", recipe.shipped()), ("recipe", recipe.shipped())):
        word = context.params.get(key)
        assert word is None or word.lower() in known, f"no {key} {word}"


def test_both_pictures_are_of_one_run() -> None:
    assert PICTURE == ["README.md", "docs/run.md"]
    short, whole = (next(text for page, _, text in BLOCKS if page == wanted and "inspect pico" in text) for wanted in PICTURE)
    assert whole.startswith(short)


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("quantcli inspect pico")])
def test_the_picture_shows_what_inspect_prints(line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT / "tests/data")
    with pytest.raises(SystemExit):
        main(shlex.split(line)[1:])
    assert f"$ {line}\n{capsys.readouterr().out}" in TEXTS["docs/run.md"]


@pytest.mark.parametrize("line", [line for line in COMMANDS if re.match("quantcli (quantize|export) pico", line)])
def test_the_picture_shows_the_sizes_that_are_planned(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pico").symlink_to(ROOT / "tests/data/pico")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main([*shlex.split(line)[1:], "--dry-run", "--json", "-q"])
    plan = json.loads(capsys.readouterr().out)
    shown = TEXTS["docs/run.md"].partition(f"$ {line}\n")[2].partition("\n$")[0]
    assert f"{plan['output']}\n{size(plan['n_bytes'])}, {plan['bpw']:.3f}bpw" in shown


@pytest.mark.parametrize("page", ["README.md", "docs/cli.md"])
def test_a_page_shows_every_verb(page: str) -> None:
    shown = {
        line.removeprefix("$ ").split()[1] for at, _, text in BLOCKS if at == page for line in text.splitlines() if "quantcli " in line
    }
    assert shown >= {command.name for command in app.registered_commands}


def test_the_recipes_of_the_pages_load() -> None:
    loaded = [recipe.parse(yaml.safe_load(text), page) for page, language, text in BLOCKS if language == "yaml"]
    assert any(found.rules for found in loaded)
    assert any(found.protect_outliers for found in loaded)


def test_the_recipes_that_the_readme_recommends_exist() -> None:
    section = README.partition("## Which recipe for which engine\n")[2].partition("\n## ")[0]
    rows = [line.split("|") for line in section.splitlines() if line.startswith("| ")][2:]
    assert len(rows) == 8
    for _, engine, name, *_ in rows:
        format_ = recipe.load(name.strip(" `")).format
        assert (format_ == "gguf") == ("llama.cpp" in engine), f"{engine}: {name}"


def test_every_key_of_a_recipe_is_described() -> None:
    page = TEXTS["docs/recipes.md"]
    keys = {f.name for cls in (recipe.Recipe, recipe.Calibration) for f in fields(cls)}
    assert {key for key in keys if f"| `{key}` |" not in page} == set()


def test_what_may_become_of_existing_codes_is_described() -> None:
    section = TEXTS["docs/recipes.md"].partition("### Weights that are quantized already\n")[2].partition("\n### ")[0]
    assert set(re.findall(r"^\| `(\w+)` \| ", section, re.MULTILINE)) - {"codes"} == set(recipe.CODES)


def test_the_formats_page_says_which_are_written() -> None:
    rows = [line.split(" | ") for line in TEXTS["docs/formats.md"].splitlines() if line.startswith("| ") and " | yes | " in line]
    written = {name for first, _, cell, *_ in rows if cell.startswith("yes") for name in re.findall(r"`([\w-]+)`", first)}
    assert written == set(tables.writable())


def test_the_python_of_the_readme_is_python() -> None:
    (text,) = (text for page, language, text in BLOCKS if page == "README.md" and language == "python")
    assert ast.parse(text).body


def test_the_readme_is_short() -> None:
    assert README.count("\n") <= 160


def test_the_make_targets_that_are_named_exist() -> None:
    makefile = (ROOT / "Makefile").read_text("utf8")
    callers = [*TEXTS.values(), *(path.read_text("utf8") for path in (ROOT / ".github").rglob("*.yml"))]
    named = {target for text in callers for target in re.findall(r"(?:^|`|run: )make ([a-z-]+)", text, re.MULTILINE)}
    assert {"demo", "test", "docs", "lint"} <= named
    assert {target for target in named if not re.search(rf"^{target}:", makefile, re.MULTILINE)} == set()


def anchors(text: str) -> set[str]:
    """The anchors that code hosts give the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def leads_somewhere(path: Path, text: str, target: str) -> bool:
    """Whether a link of the page ``text`` at ``path`` leads to a web page or to something in the repository."""
    file, _, anchor = target.partition("#")
    if target.startswith("https://"):
        return True
    aim = (path.parent / file).resolve()
    if file and not (aim.is_relative_to(ROOT) and aim.exists()):
        return False
    return not anchor or anchor in anchors(aim.read_text("utf8") if file else text)


def broken_links(path: Path, text: str) -> list[str]:
    targets = re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text))
    return [target for target in targets if not leads_somewhere(path, text, target)]


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page: str) -> None:
    assert broken_links(ROOT / page, TEXTS[page]) == []


def test_a_link_that_leads_nowhere_is_found() -> None:
    good = "[a](README.md) [b](docs/cli.md#exit-codes) [c](#here) [d](https://example.org)\n# Here\n"
    bad = ["none.md", "docs/cli.md#no-such-heading", "../outside.md", "#nowhere"]
    assert broken_links(ROOT / "CHANGELOG.md", good + " ".join(f"[x]({target})" for target in bad)) == bad


@pytest.mark.parametrize(
    ("page", "link", "expected"),
    [
        ("index.md", "[c](docs/cli.md#exit-codes)", "[c](cli.md#exit-codes)"),
        ("cli.md", "[a](../ARCHITECTURE.md)", "[a](architecture.md)"),
        ("peers.md", "[r](../README.md)", "[r](index.md)"),
        ("cli.md", "[o](conversions.md)", "[o](conversions.md)"),
        ("files.md", "[q](../quantcli/)", "[q](https://host/us/blob/HEAD/quantcli)"),
        ("files.md", "[n](../nowhere.md)", "[n](../nowhere.md)"),
        ("files.md", "[w](https://example.org)", "[w](https://example.org)"),
    ],
)
def test_the_site_links_to_its_own_pages_and_to_the_repository(page: str, link: str, expected: str) -> None:
    match = hooks.LINK.fullmatch(link)
    assert match is not None
    assert hooks.relinked(match, page, "https://host/us/") == expected


def test_a_site_without_a_repository_has_no_links_to_one() -> None:
    match = hooks.LINK.fullmatch("[q](../quantcli/)")
    assert match is not None
    assert hooks.relinked(match, "files.md", "") == "q"


def test_every_page_is_in_the_menu_of_the_site() -> None:
    menu = set(re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text("utf8"), re.MULTILINE))
    assert menu == {path.name for path in (ROOT / "docs").glob("*.md")} | set(hooks.OUTSIDE.values())


def test_every_page_outside_docs_that_is_in_the_site_exists() -> None:
    assert {source for source in hooks.OUTSIDE if not (ROOT / source).is_file()} == set()


def test_every_environment_variable_is_described() -> None:
    sources = [path for folder in ("quantcli", "tests", "docs") for path in (ROOT / folder).rglob("*.py")]
    used = {
        node.value
        for path in sources
        for node in ast.walk(ast.parse(path.read_text("utf8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"QUANTCLI_[A-Z_]+", node.value)
    }
    assert used - FOREIGN_VARIABLES - set(re.findall(r"`(QUANTCLI_[A-Z_]+)`", TEXTS["docs/cli.md"])) == set()


def named_paths(text: str) -> set[str]:
    """The sources, and the folders of them, that a page names in backticks, with the folders they lie in."""
    return set(re.findall(r"`((?:quantcli|kernels|tests|docs|configs)/[\w./-]*)`", text))


@pytest.mark.parametrize("page", ["ARCHITECTURE.md", "CONTRIBUTING.md", "docs/contracts.md", "docs/kernels.md"])
def test_the_sources_that_a_page_names_exist(page: str) -> None:
    named = named_paths(TEXTS[page])
    assert named
    assert {path for path in named if not (ROOT / path).exists()} == set()


@pytest.mark.parametrize("question", ["the walk", "GPTQ", "a new file format", "a pass see"])
def test_architecture_answers_a_newcomers_question_in_a_line(question: str) -> None:
    rows = [line.split(" | ") for line in ARCHITECTURE.splitlines() if line.startswith("| ") and "? | " in line]
    answers = [answer for asked, answer in rows if question in asked]
    assert len(answers) == 1
    assert named_paths(answers[0])


def test_the_page_of_the_architecture_is_short() -> None:
    assert ARCHITECTURE.count("\n") <= 180


def test_architectures_folders_exist() -> None:
    """Each file and folder of the map in section 2, and no module of quantcli/ that the map leaves out."""
    found = re.search(r"^## 2\. Folders\n+```\n(.*?)^```$", ARCHITECTURE, re.DOTALL | re.MULTILINE)
    assert found is not None
    folder, shown = ROOT, set()
    for line in found[1].splitlines():
        words = re.match(r" *(\S+(?: \S+)*)(?:  |$)", line)
        assert words is not None, line
        folder = folder if line.startswith("  ") else ROOT
        for word in words[1].split():
            assert list(folder.glob(word.rstrip("/"))), f"{folder.name}/{word}"
            shown.add((folder, word.strip("/")))
        if not line.startswith("  ") and words[1].endswith("/"):
            folder = ROOT / words[1]
    package = {path.name for path in (ROOT / "quantcli").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert package - {"__main__.py"} == {word for where, word in shown if where == ROOT / "quantcli"}


def test_architectures_import_line_is_the_one_that_is_tested() -> None:
    (line,) = re.findall(r"^cli → .*$", ARCHITECTURE, re.MULTILINE)
    assert [set(floor.split(", ")) for floor in line.split(" → ")] == [floor for floor in FLOORS if floor != {"__main__"}]


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda path: path.name)
def test_a_file_of_the_code_host_is_yaml(path: Path) -> None:
    assert yaml.safe_load(path.read_text("utf8"))


def test_pre_commit_calls_what_make_lint_calls() -> None:
    hooks_ = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf8"))["repos"][0]["hooks"]
    called = {Path(hook["entry"].split()[0]).name for hook in hooks_}
    linters = set(re.findall(r"\$\(BIN\)/(\S+)", (ROOT / "Makefile").read_text("utf8").partition("\nlint:")[2].partition("\n\n")[0]))
    assert linters
    assert linters <= called
