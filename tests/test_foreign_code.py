"""Code that comes with a model is never run, whatever file names it and whatever stands on standard input."""

from __future__ import annotations

import ast
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from quantcli.cli import main

ROOT = Path(__file__).parents[1] / "quantcli"
DOORS = ("from_pretrained", "from_config", "pipeline", "get_class_from_dynamic_module", "load_dataset")
"""Functions of transformers, and of the libraries beside it, that run a repository's own Python where they are allowed to."""

TinyLlama = Callable[..., Path]


def calls_of_doors() -> list[tuple[str, ast.Call]]:
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf8"))):
            if isinstance(node, ast.Call) and (name := getattr(node.func, "attr", getattr(node.func, "id", ""))) in DOORS:
                found.append((f"{path.relative_to(ROOT.parent)}:{node.lineno} {name}", node))
    return found


def test_every_door_of_transformers_refuses_foreign_code() -> None:
    calls = [(where, call) for where, call in calls_of_doors() if not where.endswith("load_dataset")]
    assert len(calls) >= 3
    for where, call in calls:
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        trust = given.get("trust_remote_code")
        assert isinstance(trust, ast.Constant), f"{where}: says nothing of trust_remote_code"
        assert trust.value is False, where


def plant(folder: Path, file: str, words: dict[str, object], marker: Path) -> None:
    """A module beside the model that leaves ``marker`` when it is run, and ``words`` in ``file`` that name it."""
    (folder / "planted.py").write_text(f"open({str(marker)!r}, 'w').write('ran')\nclass Planted: pass\n")
    path = folder / file
    old = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**old, **words}))


PLANTS = {
    "tokenizer": ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["planted.Planted", "planted.Planted"]}}),
    "a tokenizer of an unknown class": (
        "tokenizer_config.json",
        {"auto_map": {"AutoTokenizer": [None, "planted.Planted"]}, "tokenizer_class": "Planted"},
    ),
    "config": ("config.json", {"auto_map": {"AutoConfig": "planted.Planted", "AutoModelForCausalLM": "planted.Planted"}}),
    "a config of an unknown type": (
        "config.json",
        {"auto_map": {"AutoConfig": "planted.Planted", "AutoModelForCausalLM": "planted.Planted"}, "model_type": "planted"},
    ),
    "processor": ("processor_config.json", {"auto_map": {"AutoProcessor": "planted.Planted"}}),
    "image processor": ("preprocessor_config.json", {"auto_map": {"AutoImageProcessor": "planted.Planted"}}),
    "generation": ("generation_config.json", {"custom_generate": "planted.Planted", "trust_remote_code": True}),
}


@pytest.mark.parametrize("kind", PLANTS)
def test_planted_code_does_not_run(
    kind: str, tiny_llama: TinyLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    model, marker = tiny_llama(layers=1), tmp_path / "ran"
    gguf = model / "model.gguf"  # whose tokenizer transformers looks for beside it
    run("export", model, "Q8_0", "-o", gguf)
    plant(model, *PLANTS[kind], marker)
    short = ["--samples", "2", "--seq-len", "16"]
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 100))
    for number, verb in enumerate(
        (
            ["inspect", model],
            ["calibrate", model, "-o", tmp_path / "stats.safetensors", *short],
            ["quantize", model, "--method", "gptq", "-o", tmp_path / "out", *short],
            ["quantize", model, "--method", "rtn", "-o", tmp_path / "rtn"],
            ["export", model, "Q8_0", "-o", tmp_path / "out.gguf"],
            ["eval", model, *short],
            ["eval", gguf, "--baseline", model, *short],
        )
    ):
        code = run(*verb)
        assert code in (0, 3, 5), f"{verb[0]}: exit {code}: {capfd.readouterr().err}"
        assert not marker.exists(), f"call {number} of {kind} ran foreign code"
    assert "trust_remote_code" not in capfd.readouterr().out


def run(*args: object) -> object:
    with pytest.raises(SystemExit) as ended:
        main([str(arg) for arg in args])
    return ended.value.code
