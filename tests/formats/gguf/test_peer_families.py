"""Every family of ``archs/``: our file is the one that convert_hf_to_gguf and llama-quantize make, and llama.cpp computes with it what
transformers computes with the source.

Needs a built llama.cpp source tree at QUANTCLI_LLAMA_CPP.
"""

from __future__ import annotations

from pathlib import Path
from pydoc_data import topics

import pytest
import torch

from quantcli.formats import open_checkpoint
from quantcli.formats.gguf.file.headers import read_header
from support import families
from support.families import CASES
from support.gguf_export import export
from support.llamacpp_peer import assert_same, convert_all, log_probabilities, run

pytestmark = pytest.mark.peer

N_CTX = 64


@pytest.fixture(scope="module")
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Case → its model folder, beside which lies what convert_hf_to_gguf makes of it; only of the cases that this run asks for."""
    root = tmp_path_factory.mktemp("families")
    asked = {item.callspec.params["case"] for item in request.session.items if item.module is request.module}
    asked |= {CASES[name].converted_as or name for name in asked}
    made = {name: families.make(name, root / str(k) / "tiny") for k, name in enumerate(CASES) if name in asked}
    convert_all({made[name]: converted(made[name]) for name in made if not CASES[name].converted_as and not CASES[name].unconverted})
    return made


def converted(folder: Path) -> Path:
    return folder.with_suffix(".gguf")


@pytest.mark.parametrize("case", [name for name, case in CASES.items() if not case.unconverted])
def test_our_file_is_llama_cpps_own(models: dict[str, Path], case: str, tmp_path: Path) -> None:
    folder = models[case]
    run("llama-quantize", converted(models[CASES[case].converted_as or case]), tmp_path / "theirs.gguf", CASES[case].file_type, "1")
    with open_checkpoint(str(folder)) as source:
        ours = export(source, tmp_path / f"{folder.name}.gguf", CASES[case].file_type, **families.options(case))
    assert_same(ours, tmp_path / "theirs.gguf", but=tuple(CASES[case].differing), elsewhere=CASES[case].elsewhere)


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_what_transformers_does(models: dict[str, Path], case: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    text = tmp_path / "text.txt"
    text.write_text(topics.topics["assignment"][:2000])
    folder = models[case]
    with open_checkpoint(str(folder)) as source:
        ours = export(source, tmp_path / "m.gguf", "F32", **families.options(case))
    ids, theirs = log_probabilities(ours, text, N_CTX)
    if read_header(ours).get("tokenizer.ggml.add_bos_token", False):
        ids[:, 0] = read_header(ours).get("tokenizer.ggml.bos_token_id")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        logits = model(ids).logits[:, N_CTX // 2 : -1]
    expected = logits.log_softmax(-1)
    spread = float(expected.amax() - expected.amin())
    assert spread > 1, "a model that tells its tokens apart"
    assert float((expected.clamp(min=theirs.amin(-1, keepdim=True)) - theirs).abs().max()) < 2e-4 * spread + 1e-3
