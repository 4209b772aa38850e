"""``dynamic``: rules by module that GPTQModel, vLLM and SGLang read in addition to the settings of a whole folder.

A key is a regular expression that is matched from the start of a module's name, after ``+:`` (or nothing) with settings that replace the
folder's, or after ``-:`` for a module that stays dense. The first one that matches wins. vLLM asks for the modules that it *runs*: a rule
on q_proj, k_proj and v_proj does not reach its ``qkv_proj``, so what is written names the joined modules too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from quantcli.formats.shared.folder import module_of
from quantcli.formats.shared.fused import fused_groups
from quantcli.formats.shared.patterns import compiled

Settings = tuple[tuple[str, Any], ...]

LITERAL = re.compile(r"\^((?:[\w-]|\\[^\w])+)\$")


def written(settings: Mapping[str, Settings | None], common: Settings) -> dict[str, dict[str, Any]]:
    """The rules for ``settings``: weight of every linear → its settings, None where it stays dense. ``common`` needs no rule."""
    modules = {module_of(name): chosen for name, chosen in settings.items()}
    for joined, members in fused_groups(settings).items():
        if len({settings[name] for name in members}) == 1:
            modules[joined] = settings[members[0]]
    alike: dict[str, set[Settings | None]] = {}
    for module, chosen in modules.items():
        alike.setdefault(in_every_layer(module), set()).add(chosen)
    rules: dict[str, dict[str, Any]] = {}
    for module, chosen in modules.items():
        if chosen != common:
            pattern = in_every_layer(module) if len(alike[in_every_layer(module)]) == 1 else re.escape(module)
            rules[f"{'-' if chosen is None else '+'}:^{pattern}$"] = dict(chosen or {})
    return rules


def in_every_layer(module: str) -> str:
    """The pattern of ``module`` and its like in other layers, and of other experts."""
    return re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", re.escape(module))


def reader(dynamic: object) -> Callable[[str], Mapping[str, Any] | None]:
    """What the rules set for a module: settings to replace, {} where none matches, None for one that stays dense.

    Rules that are malformed, or unsafe to run, are ignored: the tensors show bits, groups and zero points.
    """
    rules: list[tuple[re.Pattern[str], Mapping[str, Any] | None]] = []
    exact: dict[str, tuple[int, Mapping[str, Any] | None]] = {}
    for key, value in (dynamic if isinstance(dynamic, dict) else {}).items():
        pattern, skips = key.removeprefix("+:").removeprefix("-:"), key.startswith("-:")
        if not (skips or isinstance(value, dict)):
            continue
        chosen = None if skips else value
        if match := LITERAL.fullmatch(pattern):  # thousands of them name one expert each
            exact.setdefault(re.sub(r"\\(.)", r"\1", match[1]), (len(rules), chosen))
        elif (safe := compiled(pattern)) is not None:
            rules.append((safe, chosen))

    def of(module: str) -> Mapping[str, Any] | None:
        before, chosen = exact.get(module, (len(rules), {}))
        return next((found for pattern, found in rules[:before] if pattern.match(module)), chosen)

    return of
