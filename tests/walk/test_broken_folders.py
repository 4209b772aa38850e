"""Folders of the families with one thing broken: each is refused with a sentence, or its output evaluates as the folder does."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest

from support import families
from support.broken_folders import broken_folders, fault_of

QUICK = range(100)
ALL = range(2000)

Faults = Callable[[Iterable[int]], list[str]]


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Faults:
    """What is wrong with the answers to the broken folders of these numbers."""
    root = tmp_path_factory.mktemp("broken")
    sources = {name: families.make(name, root / f"family-{k}") for k, name in enumerate(families.CASES)}

    def found(numbers: Iterable[int]) -> list[str]:
        answers = ((broken, fault_of(broken, root)) for broken in broken_folders(sources, root, seed=0, numbers=numbers))
        return [f"{broken}: {fault}" for broken, fault in answers if fault is not None]

    return found


@pytest.mark.slow
def test_a_broken_folder_is_refused_or_read_right(faults: Faults) -> None:
    assert faults(QUICK) == []


@pytest.mark.slow
@pytest.mark.long
def test_two_thousand_broken_folders_are_refused_or_read_right(faults: Faults) -> None:
    assert faults(ALL) == []
