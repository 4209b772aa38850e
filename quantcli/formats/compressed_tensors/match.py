"""Which modules a config group, or the ignore list, means; and where the metadata and the tensors of a folder contradict one another."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from quantcli.checkpoint.json_files import shown
from quantcli.formats.compressed_tensors.config import Group, QuantConfig
from quantcli.formats.shared.dense import tail_of
from quantcli.formats.shared.folder import split_block
from quantcli.formats.shared.patterns import is_tame


class Patterns:
    """A list of names and ``re:`` patterns, matched as the library does: a name exactly, a pattern from the name's start."""

    def __init__(self, items: Iterable[str]) -> None:
        self.items = tuple(items)
        regexes = [item for item in self.items if item.startswith("re:")]
        self.names = frozenset(self.items).difference(regexes)
        self.wild = [item for item in regexes if not is_tame(item.removeprefix("re:"))]
        self.patterns = {item: re.compile(item.removeprefix("re:")) for item in regexes if item not in self.wild}

    def find(self, module: str) -> str | None:
        """The item that means ``module``: its name before any pattern."""
        if module in self.names:
            return module
        return next((item for item, pattern in self.patterns.items() if pattern.match(module)), None)

    def idle(self, modules: Collection[str]) -> list[str]:
        """The items that mean none of ``modules``, under whatever spelling: a folder names a module as each of its readers does."""
        known = {tail_of(module) for module in modules}
        unnamed = {item for item in self.names if tail_of(item) not in known and not is_class(item)}
        matched = {item for item, pattern in self.patterns.items() if any(map(pattern.match, modules))}
        endings = {item.rpartition(r"\.")[2] for item in matched if r"\." in item}
        unmatched = {item for item in self.patterns if item not in matched and item.rpartition(r"\.")[2] not in endings}
        return [item for item in self.items if item in unnamed or item in unmatched]


def is_class(item: str) -> bool:
    """Whether ``item`` is the name of a class, such as Linear, of which a folder's tensors show nothing."""
    return re.fullmatch(r"[A-Z]\w*", item) is not None


class Claims:
    """Which group means which module: names first, then patterns, then classes; what ``ignore`` means is nobody's."""

    def __init__(self, quant_config: QuantConfig) -> None:
        self.groups = quant_config.groups
        self.targets = [Patterns(group.targets) for group in quant_config.groups]
        self.ignore = Patterns(quant_config.ignore)
        self.of_class = next((group for group in quant_config.groups if any(map(is_class, group.targets))), None)

    def group_of(self, module: str) -> Group | None:
        """The group of a ``module`` that is a linear, whatever ``ignore`` has."""
        if len(self.groups) == 1:
            return self.groups[0]
        found = [(group, targets.find(module)) for group, targets in zip(self.groups, self.targets, strict=True)]
        by_name = next((group for group, item in found if item == module), None)
        return by_name or next((group for group, item in found if item is not None), self.of_class)

    def means(self, module: str) -> bool:
        """Whether an engine will look for codes in a linear ``module``."""
        if self.ignore.find(module) is not None:
            return False
        return self.of_class is not None or any(targets.find(module) is not None for targets in self.targets)


def contradictions(claims: Claims, quantized: Collection[str], dense: Mapping[str, int], *, tied: bool) -> list[str]:
    """One sentence for each way in which the metadata and the tensors disagree. ``quantized``: modules with codes; ``dense``: others
    and how many dimensions their weights have; ``tied``: whether lm_head needs no tensor of its own."""
    modules = [*quantized, *dense, *(["lm_head"] if tied else [])]
    notes = []
    if wild := [item for patterns in (claims.ignore, *claims.targets) for item in patterns.wild]:
        notes.append(f"{shown(wild[0])} is too complex a pattern to be matched safely; it is passed over")
    if idle := claims.ignore.idle(modules):
        notes.append(f"ignore names {listed(idle)}, and no module of the folder is called so")
    if idle := [item for targets in claims.targets for item in targets.idle(modules)]:
        notes.append(f"a config group targets {listed(idle)}, and no module of the folder is called so")
    if stray := [module for module in quantized if not claims.means(module)]:
        notes.append(f"{listed(stray)} quantized, which ignore excludes or no config group targets; the tensors are used")
    blocks = {split_block(module)[0] for module in quantized} - {""}
    inside = [module for module, n_dims in dense.items() if n_dims == 2 and split_block(module)[0] in blocks]
    if claimed := [module for module in inside if claims.means(module)]:
        notes.append(f"{listed(claimed)} dense and not named by ignore; an engine that takes it for a linear of a group will not load it")
    return notes


def listed(names: Sequence[str]) -> str:
    """The first of ``names`` and how many more."""
    return shown(names[0]) + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def targets_of(members: Collection[str], others: Iterable[str]) -> list[str]:
    """Targets that mean the modules ``members`` and none of ``others``: one pattern where they differ in nothing but numbers.

    No class: where groups differ, vLLM looks for the class of a fused q/k/v before it looks for its members' names.
    """
    foreign = {numberless(module) for module in others}
    shapes = {numberless(module): module for module in members}
    targets = {f"re:^{shape}$" for shape in shapes if shape not in foreign}
    return sorted(targets) + sorted(module for module in members if numberless(module) in foreign)


def numberless(module: str) -> str:
    r"""The pattern of ``module`` with every number in it any number: ``model\.layers\.\d+\.mlp\.down_proj``."""
    return r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in module.split("."))
