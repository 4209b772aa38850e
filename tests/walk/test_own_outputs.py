"""What quantcli writes, quantcli reads: every family in every format, opened, held to the check of sources, and described."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import quantcli as qc
from quantcli import formats
from quantcli.errors import RecipeError, UnsupportedError
from quantcli.planning import source_check
from quantcli.walk.evaluate import Scores, evaluate
from support import families

TYPES = {
    "hf": ("bf16", "f16", "f32"),
    "gptq": ("int4-g16-sym", "int3-g16-asym", "int8-g16-sym"),
    "awq": ("int4-g32-asym",),
    "bitsandbytes": ("nf4-b64", "nf4-b64-dq", "fp4-b64", "llm_int8"),
    "compressed-tensors": ("int4-g16-sym", "fp8-channel+fp8-token", "mxfp4", "nvfp4", "int8-channel-sym+int8-token"),
    "fp8": ("fp8-block+fp8-g128", "fp8-tensor+fp8-token"),
    "gguf": ("F16", "BF16", "F32", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q4_K_M", "Q3_K_S", "IQ4_NL", "MXFP4_MOE"),
}
"""Of each format that is written, some schemes that need no text."""

NARROW = ("gptq", "awq", "compressed-tensors")
STACKED = ("gptq", "awq", "fp8")
DERIVED = ("bitsandbytes", "fp8")
REFUSED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("qwen3_moe", "qwen3_moe, fused", "deepseek v2", "deepseek v3", "deepseek v3, fused"), NARROW),  # 48 columns
    **dict.fromkeys(("gpt-oss", "gpt-oss, mxfp4"), STACKED),  # whose experts no engine loads in these
    **dict.fromkeys(("falcon 7b", "falcon 40b"), DERIVED),  # whose linears are of a class of their own
    "gpt2": tuple(format for format in TYPES if format != "gguf"),  # which has no linears
}
"""Family → formats of which some type is refused, for the model's sake."""

PAIRS = [(format, type) for format, types in TYPES.items() for type in types]
Source = Callable[[str], Path]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """The folder of a family, made when it is first asked for."""
    made: dict[str, Path] = {}

    def of(family: str) -> Path:
        if family not in made:
            made[family] = families.make(family, tmp_path_factory.mktemp("family") / "tiny")
        return made[family]

    return of


def write(family: str, folder: Path, output: Path, pair: tuple[str, str]) -> Path | None:
    """The folder of ``family`` in a format and type, or None where these are refused for the model's sake."""
    format, type = pair
    options = families.options(family) if format == "gguf" else {}
    try:
        return qc.export(folder, output, type, format=format, options=options, device="cpu").path
    except (RecipeError, UnsupportedError):
        return None


def assert_reads(path: Path) -> None:
    with qc.open(path) as made:
        assert [finding.text for finding in source_check.look(made, is_read_back=True) if finding.is_error] == []
    assert qc.inspect(path, tensors=True)["tensors"]


def test_every_format_that_is_written_is_walked() -> None:
    assert set(TYPES) == {name for name in formats.names() if formats.of(name).is_written}


@pytest.mark.parametrize("number", range(len(families.CASES)), ids=list(families.CASES))
def test_a_family_is_read_in_what_was_written(source: Source, tmp_path: Path, number: int) -> None:
    """Two types for each family, so that each type meets several families."""
    family = list(families.CASES)[number]
    for k in (2 * number, 2 * number + 1):
        if (path := write(family, source(family), tmp_path / f"out-{k}", PAIRS[k % len(PAIRS)])) is not None:
            assert_reads(path)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("family", families.CASES)
def test_every_family_is_read_in_every_format(source: Source, tmp_path: Path, family: str) -> None:
    paths = {pair: write(family, source(family), tmp_path / f"out-{k}", pair) for k, pair in enumerate(PAIRS)}
    for path in paths.values():
        if path is not None:
            assert_reads(path)
    assert {format for (format, _), path in paths.items() if path is None} <= set(REFUSED.get(family, ()))


EVALUATED = {
    "hf": ("gemma3", "f16"),
    "gptq": ("qwen3_moe, fused", "int4-g16-sym"),
    "awq": ("llama 3.2", "int4-g32-asym"),
    "bitsandbytes": ("mixtral, fused", "nf4-b64-dq"),
    "compressed-tensors": ("deepseek v3, fused", "int4-g16-sym"),
    "fp8": ("qwen2", "fp8-tensor+fp8-token"),
    "gguf": ("phi3, longrope", "Q8_0"),
}


@pytest.mark.parametrize("format", EVALUATED)
def test_what_was_written_evaluates_as_its_source(source: Source, tmp_path: Path, format: str) -> None:
    family, type = EVALUATED[format]
    path = write(family, source(family), tmp_path / "out", (format, type))
    assert path is not None
    ids = torch.randint(0, 200, (2, 24), generator=torch.Generator().manual_seed(0))
    with qc.open(path) as made, qc.open(source(family)) as original:
        (scores,) = (event for event in evaluate(made, ids, baseline=original, device="cpu") if isinstance(event, Scores))
    assert scores.kld_mean < 0.2
