"""transformers as the second hand on models of which a part is dense: it loads our folders, images and all, and computes our logits.

Needs the Pythons that tests/PEERS.md tells of; each format is tried where its own is there.
"""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import quantcli as qc
from quantcli.recipe import PassSpec, Recipe, Rule
from quantcli.tensors import Scheme
from support.partly_dense import KINDS, inputs, save
from support.places import TESTS
from support.runs import run

pytestmark = pytest.mark.peer

PYTHONS = {
    "gptq": "QUANTCLI_GPTQMODEL_PYTHON",
    "awq": "QUANTCLI_GPTQMODEL_PYTHON",
    "bitsandbytes": "QUANTCLI_BITSANDBYTES_PYTHON",
    "compressed-tensors": "QUANTCLI_TRANSFORMERS_PYTHON",
    "fp8": "QUANTCLI_TRANSFORMERS_PYTHON",
}
SCHEMES = {
    "gptq": "int4-g32-sym",
    "awq": "int4-g32-asym",
    "bitsandbytes": "nf4-b64",
    "compressed-tensors": "int4-g32-sym",
    "fp8": "fp8-block",
}
TOLERANCE = {"awq": 1e-2}
"""Of logits, in standard deviations: AWQ's kernel computes in 16 bits."""

LEFT_OUT = {("llama4", "bitsandbytes"), ("llama4", "compressed-tensors")}
"""transformers replaces the module of the experts by one with other names, and has no conversion to them: the plan says so."""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[dict[str, Any], dict[str, Any]]]:
    """(model, format) → what transformers says of our folder, and of the same decoded by us."""
    root, out = tmp_path_factory.mktemp("dense"), {}
    for name in KINDS:
        source = save(name, root / name)
        save_file(inputs(name), root / "inputs.safetensors")
        by_python: dict[str, list[tuple[str, str, str]]] = {}
        for format_, variable in PYTHONS.items():
            if variable not in os.environ or (name, format_) in LEFT_OUT:
                continue
            coded, decoded = root / f"{name}-{format_}", root / f"{name}-{format_}-decoded"
            # transformers has no place for the codes of experts in these two.
            rules = (Rule.parse(r"\.experts\.", "keep"),) if name.startswith("glm4") and format_ in ("gptq", "awq") else ()
            scheme = Scheme.parse(SCHEMES[format_])
            run(source, coded, Recipe(name="rtn", passes=(PassSpec("rtn"),), scheme=scheme, format=format_, rules=rules))
            qc.export(coded, decoded, format="hf", device="cpu")
            by_python.setdefault(os.environ[variable], []).append((format_, str(coded), str(decoded)))
        for python, tasks in by_python.items():
            words = [word for _, *pair in tasks for word in pair]
            client = [python, str(TESTS / "support" / "logits_client.py"), str(root / "inputs.safetensors"), str(root / "answers.json")]
            subprocess.run([*client, *words], check=True, capture_output=True)
            found = json.loads((root / "answers.json").read_text())
            out |= {(name, task[0]): (found[2 * i], found[2 * i + 1]) for i, task in enumerate(tasks)}
    return out


@pytest.mark.parametrize(("name", "format_"), [(n, f) for n in KINDS for f in PYTHONS if (n, f) not in LEFT_OUT])
def test_transformers_computes_our_logits(
    name: str, format_: str, answers: dict[tuple[str, str], tuple[dict[str, Any], dict[str, Any]]]
) -> None:
    if (name, format_) not in answers:
        pytest.skip(f"{PYTHONS[format_]} names no Python")
    theirs, ours = answers[name, format_]
    assert "error" not in theirs, theirs
    assert theirs["missing"] == ours["missing"] == []
    logits, expected = torch.tensor(theirs["logits"]), torch.tensor(ours["logits"])
    assert float((logits - expected).abs().max()) < TOLERANCE.get(format_, 2e-3) * float(expected.std())
