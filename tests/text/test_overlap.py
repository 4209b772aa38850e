"""A sketch of token windows tells how much of another text they share."""

from __future__ import annotations

import torch

from quantcli.text.overlap import KEPT, RUN, overlap, sketch

GENERATOR = torch.Generator().manual_seed(0)
TEXT = torch.randint(0, 5000, (60_000,), generator=GENERATOR)
OTHER = torch.randint(0, 5000, (20_000,), generator=GENERATOR)


def test_a_text_that_was_seen_is_told_however_its_windows_are_cut() -> None:
    known = sketch(TEXT[:51_200].view(-1, 512))
    assert len(known) == 8 * KEPT
    again = overlap(known, TEXT[100 : 100 + 40_000].view(-1, 400))
    assert again.share > 0.85  # the runs across the ends of windows are not in both
    assert again.is_notable


def test_another_text_shares_nothing() -> None:
    assert overlap(sketch(TEXT.view(-1, 600)), OTHER.view(-1, 500)).n_found == 0


def test_the_share_is_that_of_the_tokens_in_common() -> None:
    half = torch.cat([TEXT[:10_000], OTHER[:10_000]])
    found = overlap(sketch(TEXT.view(-1, 60_000)), half[None])
    assert 0.4 < found.share < 0.6
    assert found.n_sampled > 100


def test_a_short_text_is_held_whole() -> None:
    known = sketch(TEXT[None, :40])
    assert len(known) == 8 * (40 - RUN + 1)
    assert overlap(known, TEXT[None, :40]).share == 1
    assert overlap(known, TEXT[None, 10 : 10 + RUN]).n_found == 1
    assert not overlap(known, OTHER[None]).n_found


def test_windows_shorter_than_a_run_share_nothing() -> None:
    assert sketch(TEXT[: RUN - 1][None]) == ""
    assert overlap("", TEXT[None]).n_found == 0
    assert overlap(sketch(TEXT[None]), TEXT[: RUN - 1][None]).share == 0
