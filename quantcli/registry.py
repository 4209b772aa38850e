"""Finds variants by file name: find("formats", "hf") is the module quantcli/formats/hf.py. Formats are spelt with hyphens."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from types import ModuleType

from quantcli.errors import UnsupportedError

SHARED = "shared"
"""The folder next to the variants for code that several of them use."""


@cache
def names(package: str) -> tuple[str, ...]:
    """Every variant of ``package`` ("archs", "qtypes", "passes" or "formats"), sorted: every module in its folder except ``shared``."""
    folder = importlib.import_module(f"quantcli.{package}")
    modules = [m.name for m in pkgutil.iter_modules(folder.__path__) if m.name != SHARED]
    return tuple(sorted(name.replace("_", "-") if package == "formats" else name for name in modules))


def find(package: str, name: str) -> ModuleType:
    """The module of variant ``name``; :class:`UnsupportedError` lists the ones there are."""
    if name not in names(package):
        raise UnsupportedError(f"{package} has no '{name}'; there are: {', '.join(names(package))}")
    return importlib.import_module(f"quantcli.{package}.{name.replace('-', '_')}")
