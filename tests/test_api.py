"""The library: its names, what it costs to import, and that its functions do what the command line does."""

from __future__ import annotations

import ast
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import quantcli as qc
from quantcli.cli import main

TinyLlama = Callable[..., Path]
ROOT = Path(__file__).parents[1]
TEXT = "The quick brown fox jumps over the lazy dog. " * 400
SHORT = ["--samples", "2", "--seq-len", "32"]


@pytest.fixture
def model(tiny_llama: TinyLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").write_text(TEXT)
    return tiny_llama(layers=1).rename(tmp_path / "MODEL")


def short(name: str = "gptq-int4") -> qc.Recipe:
    from quantcli.planning.selection import with_text

    return with_text(qc.Recipe.load(name), samples=2, seq_len=32)


def digest(path: Path) -> str:
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.name != "quantcli.json")
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def cli(*args: object) -> None:
    with pytest.raises(SystemExit) as ended:
        main([str(arg) for arg in args])
    assert ended.value.code == 0


def test_every_name_of_the_library_is_there_and_documented() -> None:
    assert sorted(set(qc.__all__)) == qc.__all__ == [name for name in dir(qc) if name in qc.__all__]
    for name in qc.__all__:
        assert isinstance(getattr(qc, name), str) or getattr(qc, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        qc.quantise  # type: ignore[attr-defined]  # noqa: B018


def test_the_names_for_type_checkers_are_those_at_run_time() -> None:
    tree = ast.parse((ROOT / "quantcli/__init__.py").read_text("utf8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    typed = {alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert typed == set(qc.__all__) - {"__version__"}
    assert (ROOT / "quantcli/py.typed").is_file()


def test_importing_the_library_is_quick_and_loads_no_torch() -> None:
    code = (
        "import sys, time\nstarted = time.process_time()\nimport quantcli\n"
        "print(time.process_time() - started)\n"
        "assert not {'torch', 'transformers', 'numpy', 'typer'} & set(sys.modules)\n"
    )
    seconds = [float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout) for _ in range(3)]
    assert min(seconds) < 0.1


def test_quantize_writes_what_the_command_line_writes(model: Path) -> None:
    events: list[Any] = []
    result = qc.quantize("MODEL", "out", short(), data="mine.txt", on_event=events.append)
    cli("quantize", "MODEL", "--method", "gptq", "-o", "other", "--dataset", "mine.txt", *SHORT)
    assert digest(Path("out")) == digest(Path("other"))
    assert result.path == Path("out")
    assert [type(event) for event in events if not isinstance(event, qc.Note)] == [qc.Planned, *[qc.LayerDone] * 4, qc.Finished]
    assert [layer.name for layer in result.layers] == [layer.name for layer in result.plan.layers]
    assert result.lossless is False
    assert result.to_dict()["n_bytes"] == result.plan.n_bytes
    assert result.seconds > 0


def test_a_file_of_statistics_and_an_importance_matrix_are_data(model: Path) -> None:
    measured = qc.calibrate("MODEL", "stats.safetensors", data="mine.txt", samples=2, seq_len=32, imatrix="imatrix.gguf")
    assert measured.to_dict()["n_tokens"] == 64
    stats = qc.StatsFile("stats.safetensors")
    by_statistics = qc.quantize("MODEL", "a.gguf", qc.Recipe.load("q4_k_m"), data=stats)
    by_matrix = qc.quantize("MODEL", "b.gguf", "q4_k_m", data=qc.ImportanceMatrix.read("imatrix.gguf"))
    plain = qc.quantize("MODEL", "c.gguf", "q4_k_m")
    with qc.open("a.gguf") as a, qc.open("b.gguf") as b, qc.open("c.gguf") as c:
        name = "model.layers.0.mlp.up_proj.weight"
        assert (a.read(name) == b.read(name)).all()
        assert not (a.read(name) == c.read(name)).all()
    assert by_statistics.plan.is_weighed
    assert by_matrix.plan.is_weighed
    assert not plain.plan.is_weighed
    assert qc.quantize("MODEL", "gptq", short(), data=stats).finished.calibrated_by == "statistics"  # type: ignore[union-attr]


def test_a_plan_has_the_bytes_of_the_output(model: Path) -> None:
    planned = qc.plan("MODEL", "q4_k_m")
    assert not Path("MODEL-Q4_K_M.gguf").exists()
    result = qc.export("MODEL", "m.gguf", "Q4_K_M")
    assert planned.n_bytes == result.plan.n_bytes
    with qc.open("m.gguf") as output:
        assert sum(spec.nbytes for spec in output.specs.values()) == planned.n_bytes


def test_the_default_output_is_named_after_model_and_recipe(model: Path) -> None:
    assert qc.quantize("MODEL", recipe="rtn-int4").path == Path("MODEL-rtn-int4")
    assert qc.export("MODEL", type="Q8_0").path == Path("MODEL-Q8_0.gguf")


def test_evaluate_and_inspect_tell_what_the_command_line_tells(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    qc.quantize("MODEL", "out", "rtn-int4")
    scores = qc.evaluate("out", baseline="MODEL", data="mine.txt", samples=2, seq_len=32)
    cli("eval", "out", "--baseline", "MODEL", "--dataset", "mine.txt", *SHORT, "--json")
    assert scores.kld_mean is not None
    assert json.loads(capsys.readouterr().out) == scores.to_dict()
    cli("inspect", "out", "--json", "--tensors", "--memory")
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(qc.inspect("out", tensors=True, memory=True)))


def test_an_open_checkpoint_is_a_source_and_stays_open(model: Path) -> None:
    with qc.open("MODEL") as checkpoint:
        assert qc.quantize(checkpoint, "out", "rtn-int4").path == Path("out")
        assert checkpoint.read("model.norm.weight").shape == (256,)


@pytest.mark.parametrize(
    ("call", "error", "told"),
    [
        (lambda: qc.quantize("MODEL", "out", "no-such-recipe"), qc.RecipeError, "no recipe 'no-such-recipe'"),
        (lambda: qc.quantize("MODEL", "out", device="gpu"), qc.OptionError, "expected auto, cpu"),
        (lambda: qc.export("MODEL", "m.gguf", "Q9_X"), qc.OptionError, "'Q9_X' is no GGUF file type"),
        (lambda: qc.export("MODEL", "m.gguf"), qc.OptionError, "a GGUF file type is missing"),
        (lambda: qc.open("nowhere"), qc.CheckpointError, "nowhere"),
        (lambda: qc.calibrate("MODEL", "s.safetensors", moe="some"), qc.OptionError, "routed or all"),
    ],
)
def test_what_is_wrong_is_an_error_of_the_library(model: Path, call: Callable[[], object], error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=re.escape(told)):
        call()
    assert sorted(path.name for path in Path().iterdir()) == ["MODEL", "mine.txt"]


PYTHON = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = [
    (page.relative_to(ROOT).as_posix(), k, code)
    for page in PAGES
    for k, code in enumerate(PYTHON.findall(page.read_text("utf8")))
    if "import quantcli" in code  # the others are signatures
]


@pytest.mark.parametrize(("page", "k", "code"), EXAMPLES, ids=lambda value: str(value)[:30])
def test_an_example_of_the_pages_runs(page: str, k: int, code: str, model: Path) -> None:
    """As it stands, but on fewer windows; beside it lie the files that the pages speak of."""
    qc.calibrate("MODEL", "stats.safetensors", data="mine.txt", samples=2, seq_len=32)
    from quantcli import recipe

    few = {"samples": 2, "seq_len": 32}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(recipe.Calibration, "__init__", _shorter(recipe.Calibration.__init__, few))
        exec(compile(code, f"{page}, example {k}", "exec"), {})


def _shorter(init: Callable[..., None], few: dict[str, int]) -> Callable[..., None]:
    def shorter(self: object, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **{**kwargs, **few})

    return shorter
