"""A trained model knows its language and not rubbish, and the perplexity told is that of an evaluation."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quantcli import recipe
from quantcli.calibration.calibrate import calibrate
from quantcli.calibration.data import Windows
from quantcli.calibration.text_check import SAMPLE_TOKENS, TextCheck, sampled
from quantcli.formats import open_checkpoint
from quantcli.forward import tokenizer
from quantcli.text import texts
from quantcli.walk import pipeline
from quantcli.walk.evaluate import perplexity
from support.places import PICO


def windows(text: str) -> Tensor:
    with open_checkpoint(str(PICO)) as source:
        return texts.windows([text], tokenizer(source), n_samples=4, seq_len=128)


def found_by_calibrate(ids: Tensor, target: Path) -> TextCheck:
    with open_checkpoint(str(PICO)) as source:
        *_, last = calibrate(source, ids, target, hessian=False)
    assert isinstance(last, TextCheck)
    return last


def test_the_perplexity_is_that_of_an_evaluation_and_a_known_text_is_no_reason_to_warn(tmp_path: Path) -> None:
    ids = windows(texts.default_text())
    known = found_by_calibrate(ids, tmp_path / "s")
    with open_checkpoint(str(PICO)) as source:
        scores = perplexity(source, ids)
    assert known.perplexity == pytest.approx(scores.perplexity, rel=1e-5)
    assert known.n_tokens == scores.n_tokens
    assert not known.is_low


def test_text_that_no_model_knows_is_told_apart(tmp_path: Path) -> None:
    draw = random.Random(0)
    rubbish = "".join(chr(draw.randrange(0x21, 0x24F)) for _ in range(5000))
    assert found_by_calibrate(windows(rubbish), tmp_path / "s").is_low


def test_quantize_measures_the_model_as_it_came(tmp_path: Path) -> None:
    ids = windows(texts.default_text())
    crude = recipe.load("gptq-int3").with_scheme(bits=2)
    with open_checkpoint(str(PICO)) as source:
        *_, last = pipeline.quantize(source, tmp_path / "q", crude, data=Windows(ids))
    assert isinstance(last, pipeline.Finished)
    assert last.text_check is not None
    assert last.text_check.perplexity == pytest.approx(found_by_calibrate(ids, tmp_path / "s").perplexity, rel=1e-6)


def test_counting_gives_the_perplexity_of_the_tokens_own_frequencies(tmp_path: Path) -> None:
    ids = torch.tensor([[5, 6, 7, 8] * 8, [5, 6, 7, 8] * 8])
    assert found_by_calibrate(ids, tmp_path / "s").counted == pytest.approx(4)


@pytest.mark.parametrize(
    ("found", "is_low"),
    [
        (TextCheck(30, 500, 1000), False),
        (TextCheck(80, 20, 1000), False),
        (TextCheck(501, 500, 1000), True),
        (TextCheck(math.nan, 500, 1000), True),
        (TextCheck(math.inf, 500, 1000), True),
        (TextCheck(501, 20, 50), False),
        (TextCheck(math.nan, 20, 50), True),
        (TextCheck(math.nan, 1, 0), False),
    ],
)
def test_a_warning_needs_a_reason(found: TextCheck, is_low: bool) -> None:
    assert found.is_low == is_low


def test_the_sample_is_spread_over_all_windows() -> None:
    assert sampled(torch.zeros(128, 256)).tolist() == [0, 42, 84, 127]
    assert sampled(torch.zeros(3, 4 * SAMPLE_TOKENS)).tolist() == [0]
    assert sampled(torch.zeros(2, 16)).tolist() == [0, 1]
