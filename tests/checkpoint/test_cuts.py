"""A checkpoint seen through cuts: experts that are stored as one tensor, one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from quantcli.archs import Cut
from quantcli.checkpoint import views
from quantcli.errors import CheckpointError
from quantcli.formats import open_checkpoint
from quantcli.planning.arrange import experts_apart
from support import families


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One model as published, and with its experts fused."""
    root = tmp_path_factory.mktemp("experts")
    return families.make(request.param, root / "apart"), families.make(f"{request.param}, fused", root / "fused")


def test_fused_experts_are_seen_as_they_are_published(pair: tuple[Path, Path]) -> None:
    with open_checkpoint(str(pair[0])) as apart, open_checkpoint(str(pair[1])) as fused:
        view = experts_apart(fused)
        assert view.specs.keys() == apart.specs.keys()
        for name, spec in apart.specs.items():
            assert view.specs[name] == spec
            assert torch.equal(view.read(name), apart.read(name)), name
        assert view.fingerprint() == fused.fingerprint()
        assert view.source == fused.source


def test_a_checkpoint_without_such_tensors_is_itself(pair: tuple[Path, Path], tiny_llama: Any) -> None:
    for folder in (pair[0], tiny_llama()):
        with open_checkpoint(str(folder)) as source:
            assert experts_apart(source) is source


def test_a_stack_that_cannot_be_cut_is_an_error(pair: tuple[Path, Path]) -> None:
    with open_checkpoint(str(pair[1])) as source, pytest.raises(CheckpointError, match=r"q_proj\.weight: \[.*\] cannot be split into"):
        views.pieces_of(source, {"self_attn.q_proj.weight": Cut("stacked", tuple(map(str, range(100))))})
