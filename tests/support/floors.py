"""The rooms of the package and who may import whom: what test_house.py holds the code to, and test_readme.py the page."""

from __future__ import annotations

FLOORS = [
    {"__main__"},
    {"cli"},
    {"api"},
    {"walk"},
    {"calibration"},
    {"planning"},
    {"forward", "formats", "recipe"},
    {"statistics", "passes", "conversions"},
    {"checkpoint", "text"},
    {"archs", "qtypes", "output"},
    {"ops"},
    {"tensors", "errors", "experts", "registry", "heap", "importance", "strict_json"},
]
"""The rooms of the package, from left to right: each may import those further right, and none of its own floor but on the last."""
