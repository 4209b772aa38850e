"""The reference of docs/contracts.md, made from the sources: names, signatures, defaults and docstrings of the typed contracts."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "quantcli"


@dataclass(frozen=True, slots=True)
class Section:
    """A contract: ``files`` of the package whose public classes are shown, and ``names`` of their functions and constants that are too."""

    title: str
    files: tuple[str, ...]
    names: tuple[str, ...] = ()


SECTIONS = (
    Section(
        "The library",
        ("walk/inputs.py", "api.py"),
        ("Source", "Text", "quantize", "export", "calibrate", "evaluate", "inspect", "plan", "open", "use_device"),
    ),
    Section("Nouns", ("tensors.py",), ("DTYPES", "KEEP", "ACTIVATIONS", "HEAD", "KV_CACHES")),
    Section("Number formats", ("qtypes/__init__.py",), ("Parts", "of", "names")),
    Section("Passes", ("passes/__init__.py",), ("O", "of", "names")),
    Section("File formats", ("formats/__init__.py",), ("DEFAULTS", "of", "names", "open_checkpoint")),
    Section("Importance", ("importance.py",)),
    Section("Architectures", ("archs/__init__.py",), ("REQUIRED", "of", "of_gguf")),
    Section("Checkpoints", ("checkpoint/checkpoint.py",)),
    Section("Writers", ("output/writer.py",)),
    Section("Recipes", ("recipe.py",), ("load", "default_for", "shipped", "parse")),
    Section("Planning", ("planning/arrange.py", "planning/plan.py"), ("arrange", "make")),
    Section("Statistics", ("statistics/stats_file.py",)),
    Section(
        "The walk",
        ("calibration/data.py", "walk/events.py", "walk/notices.py", "walk/pipeline.py"),
        ("Data", "Event", "OnEvent", "quantize"),
    ),
    Section("Running a model", ("forward/model.py", "forward/layer.py", "forward/hidden.py"), ("OnInput", "OnRead", "run_dtype")),
)
"""In the order of the page. Ops follow: those that ``quantcli.ops`` exports."""

OPS_ARGUMENTS = {"Params", "Tile", "Book"}
"""Types of what several ops of a file take or give."""

WIDTH = 120
"""Characters of a line of code; what is longer takes several lines."""

KINDS = {"abstractmethod": "**must be written**", "property": "property", "classmethod": "class method"}
"""Decorators that a reader should know of."""

ROLE = re.compile(r":\w+:`(?:quantcli\.|~(?:\w+\.)*)?([\w.]+)`")
"""A reference of reStructuredText, and what is shown of it: the name alone after "~"."""

LITERAL = re.compile(r"(``.+?``|`[^`]+`)")
SPECIAL = re.compile(r"([*<>|]|(?<!\w)_|_(?!\w))")
"""What Markdown would take for emphasis, for HTML or for a table's border."""


def reference() -> str:
    """A part of the page for each of :data:`SECTIONS`, then one for the ops."""
    return "\n\n".join([*(part for section in SECTIONS for part in parts_of(section)), *ops()])


def parts_of(section: Section) -> Iterator[str]:
    yield f"## {section.title}"
    found: set[str] = set()
    for file in section.files:
        module = parsed(file)
        yield f"{link(file)}: {markdown(summary(module))}"
        body = documented(module.body)
        shown = [(node, doc) for node, doc in body if name_of(node) in section.names]
        found |= {name_of(node) for node, _ in shown}
        if shown:
            yield "\n".join(item(node, doc) for node, doc in shown)
        yield from (class_(node, doc) for node, doc in body if isinstance(node, ast.ClassDef) and is_public(node))
    if missing := set(section.names) - found:
        raise ValueError(f"{', '.join(section.files)} has no {sorted(missing)[0]}")


def ops() -> Iterator[str]:
    """The functions that ``quantcli.ops`` hands on, file by file, in the order of its imports."""
    package = parsed("ops/__init__.py")
    yield "## Ops"
    yield f"{link('ops/__init__.py')}: {markdown(ast.get_docstring(package) or '')}"
    for line in package.body:
        if isinstance(line, ast.ImportFrom):
            file = f"ops/{str(line.module).rpartition('.')[2]}.py"
            module, wanted = parsed(file), {alias.name for alias in line.names} | OPS_ARGUMENTS
            yield f"### {Path(file).stem}"
            yield f"{link(file)}: {markdown(summary(module))}"
            yield "\n".join(item(node, doc) for node, doc in documented(module.body) if name_of(node) in wanted)


def parsed(file: str) -> ast.Module:
    return ast.parse((PACKAGE / file).read_text("utf8"))


def link(file: str) -> str:
    shown = f"quantcli/{file}".removesuffix("__init__.py")
    return f"[{shown}](../quantcli/{file})"


def summary(module: ast.Module) -> str:
    """The first sentence of a module's docstring, and what follows it in its first paragraph."""
    return (ast.get_docstring(module) or "").partition("\n\n")[0]


def source(node: ast.AST) -> str:
    return ast.unparse(node).replace("'", '"')


def name_of(node: ast.stmt) -> str:
    """The name that a statement gives a function, a class, a constant or a field; "" for any other statement."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return node.name
    target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0] if isinstance(node, ast.Assign) else None
    return target.id if isinstance(target, ast.Name) else ""


def is_public(node: ast.stmt) -> bool:
    return not name_of(node).startswith("_") or name_of(node) == "__call__"


def documented(body: Sequence[ast.stmt]) -> list[tuple[ast.stmt, str]]:
    """The named statements of a module or class with their docstrings; a constant's or a field's is the string below it."""
    below = [*body[1:], ast.Pass()]
    return [(node, docstring(node, after)) for node, after in zip(body, below, strict=True) if name_of(node)]


def docstring(node: ast.stmt, after: ast.stmt) -> str:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return ast.get_docstring(node) or ""
    is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str)
    return ast.literal_eval(after.value) if isinstance(after, ast.Expr) and is_text else ""


def class_(node: ast.ClassDef, doc: str) -> str:
    """A heading, the fields without a docstring of their own as code, the docstring, and an item for each other public member."""
    members = [(member, text) for member, text in documented(node.body) if is_public(member)]
    fields = [source(member) for member, text in members if isinstance(member, ast.AnnAssign) and not text]
    made = next((member for member in node.body if isinstance(member, ast.FunctionDef) and member.name == "__init__"), None)
    decorators = [f"@{source(decorator)}" for decorator in node.decorator_list]
    bases = f"({', '.join(source(base) for base in node.bases)})" if node.bases else ""
    lines = [*decorators, f"class {node.name}{bases}:"]
    lines += [f"    {line}" for line in [*fields, *(constructor(made) if made else [])]]
    code = [f"```python\n{chr(10).join(lines)}\n```"] if fields or made else []
    items = [item(member, text) for member, text in members if not (isinstance(member, ast.AnnAssign) and not text)]
    return "\n\n".join([f"### {node.name}", *code, *([markdown(doc)] if doc else []), *(["\n".join(items)] if items else [])])


def arguments(node: ast.FunctionDef) -> list[str]:
    """What ``node`` takes, without ``self``, as in the source."""
    args = node.args
    plain = [*args.posonlyargs, *args.args]
    defaults = [*[None] * (len(plain) - len(args.defaults)), *args.defaults]
    taken = [argument(arg, default) for arg, default in zip(plain, defaults, strict=True) if arg.arg not in ("self", "cls")]
    rest = [f"*{argument(args.vararg)}"] if args.vararg else ["*"] if args.kwonlyargs else []
    named = [argument(arg, default) for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True)]
    return [*taken, *rest, *named, *([f"**{argument(args.kwarg)}"] if args.kwarg else [])]


def argument(arg: ast.arg, default: ast.expr | None = None) -> str:
    kind = f": {source(arg.annotation)}" if arg.annotation else ""
    return f"{arg.arg}{kind}" + (f"{' = ' if kind else '='}{source(default)}" if default else "")


def result(node: ast.FunctionDef) -> str:
    return source(node.returns) if node.returns else "None"


def constructor(node: ast.FunctionDef) -> list[str]:
    """The lines of a constructor, one argument a line where one line is too long."""
    taken = arguments(node)
    if len(line := f"def __init__({', '.join(['self', *taken])})") <= WIDTH:
        return [line]
    return ["def __init__(", "    self,", *(f"    {one}," for one in taken), ")"]


def item(node: ast.stmt, doc: str) -> str:
    """A function, method, property, field, constant, or the class of an argument: its signature as code, what kind it is, its docstring."""
    marks = {source(decorator) for decorator in node.decorator_list} if isinstance(node, ast.FunctionDef) else set()
    if isinstance(node, ast.ClassDef):
        code = f"class {node.name}"
    elif not isinstance(node, ast.FunctionDef):
        code = source(node)
        code = code if len(code) <= WIDTH else code.partition(" = ")[0]  # a long table is the source's own matter
    elif marks & {"property", "cached_property"}:
        code = f"{node.name}: {result(node)}"
    else:
        code = f"{node.name}({', '.join(arguments(node))}) -> {result(node)}"
    kinds = [kind for mark, kind in KINDS.items() if mark in marks]
    head = f"- `{code}`" + (f" ({', '.join(kinds)})" if kinds else "")
    text = re.sub(r"^(?=.)", "    ", markdown(doc), flags=re.MULTILINE).lstrip()
    return f"{head}: {text}" if doc else head


def markdown(doc: str) -> str:
    """A docstring's reStructuredText as Markdown: roles and double backticks are code, what follows ``::`` is a block of code."""
    parts = []
    for is_code, text in blocks(doc):
        parts.append(f"```\n{text}\n```" if is_code else prose(text))
    return "\n\n".join(parts)


def blocks(doc: str) -> Iterator[tuple[bool, str]]:
    """The paragraphs of ``doc``, each with whether it is code."""
    code = False
    for paragraph in doc.split("\n\n"):
        is_code = code and paragraph.startswith(" ")
        yield is_code, "\n".join(line.removeprefix("    ") for line in paragraph.splitlines()) if is_code else paragraph
        code = paragraph.endswith("::") or is_code


def prose(text: str) -> str:
    """A paragraph in one line, or a list's items in one each."""
    text = re.sub(r"::$", ":", text)
    text = re.sub(r"\n(?!\d+\. |- )\s*", " ", text)
    pieces = LITERAL.split(ROLE.sub(r"``\1``", text))
    pieces[::2] = [SPECIAL.sub(r"\\\1", piece) for piece in pieces[::2]]
    pieces[1::2] = [f"`{piece.strip('`')}`" for piece in pieces[1::2]]
    return "".join(pieces)
