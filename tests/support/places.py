"""Where the files of the tests lie."""

from __future__ import annotations

from pathlib import Path

SUPPORT = Path(__file__).parent
TESTS = SUPPORT.parent
ROOT = TESTS.parent
DATA = TESTS / "data"
PICO = DATA / "pico"
"""A small model with trained weights."""
