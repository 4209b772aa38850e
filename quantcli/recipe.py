"""Recipes: passes, number formats and output format as data, read from YAML in configs/ or a file, with overrides."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from quantcli import qtypes
from quantcli.errors import RecipeError
from quantcli.passes import of as pass_of
from quantcli.registry import names
from quantcli.statistics import ranges
from quantcli.statistics.outliers import Protection
from quantcli.tensors import KEEP, KV_CACHES, Scheme

CODES = ("requantize", "reuse", "keep")
"""What becomes of the codes of a quantized source: the weights are decoded and quantized again; codes stay where the recipe's scheme for
their tensor can hold them; or every tensor takes the first scheme of the format that can hold its codes, or the recipe's."""

OLD_CODES = {"anew": "requantize", "fitting": "reuse", "kept": "keep"}
"""Earlier spellings of :data:`CODES`, in recipes and in the records of outputs; read for one release more."""

MOE = ("routed", "all")
"""What an expert is calibrated on: the tokens that the router sends to it, or every token."""

YAML_TYPES: dict[str, tuple[type, str]] = {
    **dict.fromkeys(("name", "description", "format", "scheme", "mix", "codes", "default_for", "kv_cache"), (str, "a string")),
    **dict.fromkeys(("moe", "fallback", "input_range"), (str, "a string")),
    **dict.fromkeys(("passes", "rules", "datasets"), (list, "a list")),
    **dict.fromkeys(("calibration", "format_options", "protect_outliers"), (Mapping, "a mapping")),
    **dict.fromkeys(("seed", "samples", "seq_len", "min_tokens"), (int, "an integer")),
    "true_sequential": (bool, "true or false"),
}
"""Key of a recipe → the type of its value, and how a message calls it."""


@dataclass(frozen=True, slots=True)
class Rule:
    """Tensors whose name ``pattern`` finds (``re.search``) get ``scheme``, or stay as they are when it is None."""

    pattern: str
    scheme: Scheme | None

    @classmethod
    def parse(cls, pattern: str, scheme: str) -> Rule:
        try:
            re.compile(pattern)
        except re.error as error:
            raise RecipeError(f"rule '{pattern}' is not a regular expression: {error}") from None
        return cls(pattern, None if scheme == KEEP else Scheme.parse(scheme))

    def matches(self, name: str) -> bool:
        return re.search(self.pattern, name) is not None


@dataclass(frozen=True, slots=True)
class PassSpec:
    """A pass by name and its options, the ones left out being the pass's own defaults."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def needs(self) -> frozenset[str]:
        """Which statistics the pass reads with its options: some of H, importance, absmax, mean, dXXT."""
        return pass_of(self.name).needs(self.build_options())

    def build_options(self) -> Any:
        """The pass's ``Options`` with ours in it; an unknown option is a :class:`RecipeError`."""
        cls = pass_of(self.name).options_type
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(self.options) - known):
            raise RecipeError(f"pass '{self.name}' has no option '{unknown[0]}'; it has: {', '.join(sorted(known))}")
        try:
            return cls(**self.options)
        except TypeError as error:
            raise RecipeError(f"pass '{self.name}': an option has a value of the wrong kind: {error}") from None


@dataclass(frozen=True, slots=True)
class Calibration:
    """Which text calibrates, and how much. ``datasets``: ``PATH`` or ``NAME``, each with or without ``=WEIGHT``.

    ``moe``: which tokens calibrate an expert (:data:`MOE`). An expert that fewer than ``min_tokens`` tokens reach
    (at least one) is quantized not by the recipe's passes but by ``fallback``, a pass that needs no statistics. ``input_range``: how a
    static scale of inputs is found (:data:`quantcli.statistics.ranges.METHODS`).
    """

    samples: int = 128
    seq_len: int = 2048
    datasets: tuple[str, ...] = ()
    moe: str = "routed"
    min_tokens: int = 512
    fallback: str = "rtn"
    input_range: str = "minmax"


@dataclass(frozen=True, slots=True)
class Recipe:
    """Passes, rules and a format. The first rule that matches a tensor wins; ``scheme`` is for the linears of decoder layers that no
    rule matches, or ``mix`` is a GGUF file type that chooses the type of every tensor. ``codes``: what becomes of a quantized source's
    codes (:data:`CODES`). ``protect_outliers`` applies after the rules: linears with outlying inputs get its scheme
    (:mod:`quantcli.statistics.outliers`). ``kv_cache``: how the engine stores keys and values, with static scales
    (:data:`quantcli.tensors.KV_CACHES`; "": unquantized). ``format_options`` are passed to the format."""

    name: str
    format: str
    passes: tuple[PassSpec, ...]
    description: str = ""
    scheme: Scheme | None = None
    mix: str | None = None
    codes: str = CODES[0]
    rules: tuple[Rule, ...] = ()
    protect_outliers: Protection | None = None
    calibration: Calibration = Calibration()
    true_sequential: bool = False
    seed: int = 0
    default_for: str | None = None
    kv_cache: str = ""
    format_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def needs(self) -> frozenset[str]:
        """The statistics that it reads: those of its passes, the range of inputs for static scales, the fourth moment for outliers."""
        protection = self.protect_outliers
        schemes = [self.scheme, *(rule.scheme for rule in self.rules), None if protection is None else protection.scheme]
        has_static = any(scheme is not None and scheme.static_activations for scheme in schemes)
        found = self._range_needs if has_static else frozenset()
        found |= {"fourth"} if protection is not None else frozenset()
        return found.union(*(p.needs for p in self.passes))

    @property
    def cache_needs(self) -> frozenset[str]:
        """The statistics of keys and values that it reads: their range, where the cache has static scales."""
        return self._range_needs if self.kv_cache else frozenset()

    @property
    def is_calibrated(self) -> bool:
        """Whether it needs calibration text."""
        return bool(self.needs or self.cache_needs)

    @property
    def _range_needs(self) -> frozenset[str]:
        return frozenset({"absmax"} if self.calibration.input_range == "minmax" else {"absmax", "histogram"})

    @property
    def changes_basis(self) -> bool:
        """Whether one of its passes scales inputs against weights (awq, smoothquant)."""
        return any(pass_of(p.name).changes_basis for p in self.passes)

    @staticmethod
    def load(name: str) -> Recipe:
        """A shipped recipe by name, or the YAML file at that path; :class:`RecipeError` where there is none."""
        return load(name)

    def with_pass(self, name: str, **options: Any) -> Recipe:
        """The same recipe with ``options`` set on pass ``name``; :class:`RecipeError` when the recipe has no such pass."""
        if all(p.name != name for p in self.passes):
            raise RecipeError(f"recipe '{self.name}' has no {name} pass that could take {', '.join(options)}")
        passes = tuple(replace(p, options={**p.options, **options}) if p.name == name else p for p in self.passes)
        for spec in passes:
            spec.build_options()
        return replace(self, passes=passes)

    def with_scheme(self, **options: Any) -> Recipe:
        """The same recipe with options of its scheme replaced (bits, group_size, sym), and a name to match."""
        if self.scheme is None:
            raise RecipeError(f"recipe '{self.name}' takes its number formats from {self.mix}; it has no {', '.join(options)} to set")
        known = qtypes.of(self.scheme.qtype).options
        if unknown := sorted(set(options) - set(known)):
            raise RecipeError(f"number format {self.scheme} has no option '{unknown[0]}'")
        scheme = self.scheme.with_options(**options)
        return replace(self, scheme=scheme, name=self.name if scheme == self.scheme else f"{self.passes[-1].name}-{scheme}")

    def to_dict(self) -> dict[str, Any]:
        """What :func:`parse` reads back: the provenance that output files carry."""
        return {
            "name": self.name,
            "format": self.format,
            "passes": [{p.name: dict(p.options)} for p in self.passes],
            "scheme": None if self.scheme is None else str(self.scheme),
            "mix": self.mix,
            "codes": self.codes,
            "rules": [{"match": r.pattern, "scheme": KEEP if r.scheme is None else str(r.scheme)} for r in self.rules],
            "protect_outliers": None if self.protect_outliers is None else self.protect_outliers.to_dict(),
            "calibration": {f.name: _plain(getattr(self.calibration, f.name)) for f in fields(Calibration)},
            "true_sequential": self.true_sequential,
            "seed": self.seed,
            "kv_cache": self.kv_cache,
            "format_options": dict(self.format_options),
        }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def folder() -> Path:
    """Where the shipped recipes are: inside the installed package, or next to it in a source tree."""
    here = Path(__file__).parent
    return here / "configs" if (here / "configs").is_dir() else here.parent / "configs"


def shipped() -> dict[str, Path]:
    """The recipes that come with quantcli, by name."""
    return {path.stem: path for path in sorted(folder().glob("*.yaml"))}


def load(name: str) -> Recipe:
    """A shipped recipe by name, or the YAML file at that path."""
    path = shipped().get(name.lower())
    if path is None and Path(name).suffix in (".yaml", ".yml"):
        path = Path(name)
    if path is None or not path.is_file():
        raise RecipeError(f"no recipe '{name}'; a recipe is a YAML file or one of: {', '.join(shipped())}")
    try:
        data = yaml.safe_load(path.read_text("utf8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not YAML: {error}") from None
    return parse(data, path.stem)


def default_for(method: str) -> Recipe:
    """The recipe that ``--method METHOD`` stands for."""
    for name in shipped():
        recipe = load(name)
        if recipe.default_for == method:
            return recipe
    raise RecipeError(f"no recipe for method '{method}'; there are: {', '.join(methods())}")


def methods() -> list[str]:
    """What ``--method`` may be: the methods that a shipped recipe stands for."""
    return sorted(recipe.default_for for recipe in map(load, shipped()) if recipe.default_for)


def parse(data: Any, name: str) -> Recipe:
    """A recipe from the content of its YAML. Unknown keys, passes and schemes are errors that list the known ones."""
    if not isinstance(data, Mapping):
        raise RecipeError(f"recipe '{name}' is not a mapping of keys")
    data = dict(data)
    known = {f.name for f in fields(Recipe)}
    if unknown := sorted(set(map(str, data)) - known):
        raise RecipeError(f"recipe '{name}' has an unknown key '{unknown[0]}'; known are: {', '.join(sorted(known))}")
    _check_types(data, name)
    if missing := [key for key in ("format", "passes") if not data.get(key)]:
        raise RecipeError(f"recipe '{name}' lacks '{missing[0]}'")
    codes = data.get("codes") or CODES[0]
    codes = data["codes"] = OLD_CODES.get(codes, codes)
    if codes not in CODES:
        raise RecipeError(f"recipe '{name}': codes is one of {', '.join(CODES)}, not '{codes}'")
    if codes != "keep" and (data.get("scheme") is None) == (data.get("mix") is None):
        raise RecipeError(f"recipe '{name}' needs either a scheme or a mix")
    if data["format"] not in names("formats"):
        raise RecipeError(f"recipe '{name}': no format '{data['format']}'; there are: {', '.join(names('formats'))}")
    if (kv_cache := data.get("kv_cache")) and kv_cache not in KV_CACHES:
        raise RecipeError(f"recipe '{name}': kv_cache is one of {', '.join(KV_CACHES)}, not '{kv_cache}'")
    scheme = data.get("scheme")
    return replace(
        Recipe(name=str(data.get("name") or name), format=data["format"], passes=_parse_passes(data["passes"], name)),
        **{
            key: data[key]
            for key in ("description", "mix", "codes", "true_sequential", "seed", "default_for", "kv_cache", "format_options")
            if data.get(key) is not None
        },
        scheme=None if scheme is None else Scheme.parse(scheme),
        rules=_parse_rules(data.get("rules") or (), name),
        protect_outliers=None if (protect := data.get("protect_outliers")) is None else Protection.parse(protect, name),
        calibration=_parse_calibration(data.get("calibration") or {}, name),
    )


def _check_types(data: Mapping[str, Any], recipe: str) -> None:
    """Raise :class:`RecipeError` at the first key whose value is not of the type in :data:`YAML_TYPES`."""
    for key, value in data.items():
        kind, type_name = YAML_TYPES[key]
        if value is not None and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
            raise RecipeError(f"recipe '{recipe}': {key} is {type_name}, not {value!r}")


def _parse_calibration(data: Mapping[str, Any], recipe: str) -> Calibration:
    if unknown := sorted(set(map(str, data)) - {f.name for f in fields(Calibration)}):
        raise RecipeError(f"recipe '{recipe}': calibration takes {', '.join(f.name for f in fields(Calibration))}, not '{unknown[0]}'")
    _check_types(data, recipe)
    given = {key: value for key, value in data.items() if value is not None}
    calibration = Calibration(**{**given, "datasets": tuple(map(str, given.get("datasets", ())))})
    if calibration.samples < 1 or calibration.seq_len < 1:
        raise RecipeError(f"recipe '{recipe}': samples and seq_len are above zero, not {calibration.samples} and {calibration.seq_len}")
    if calibration.moe not in MOE:
        raise RecipeError(f"recipe '{recipe}': moe is {' or '.join(MOE)}, not '{calibration.moe}'")
    if calibration.input_range not in ranges.METHODS:
        raise RecipeError(f"recipe '{recipe}': input_range is one of {', '.join(ranges.METHODS)}, not '{calibration.input_range}'")
    if calibration.min_tokens < 1:
        raise RecipeError(f"recipe '{recipe}': min_tokens is above zero, not {calibration.min_tokens}")
    free = [name for name in names("passes") if not PassSpec(name).needs]
    if calibration.fallback not in free:
        raise RecipeError(f"recipe '{recipe}': fallback is a pass without statistics ({', '.join(free)}), not '{calibration.fallback}'")
    return calibration


def _parse_passes(items: Iterable[Any], recipe: str) -> tuple[PassSpec, ...]:
    passes = []
    for item in items:
        entry = {item: None} if isinstance(item, str) else item
        if not isinstance(entry, Mapping) or len(entry) != 1:
            raise RecipeError(f"recipe '{recipe}': a pass is a name, or one name with its options, not {item!r}")
        ((name, options),) = entry.items()
        if name not in names("passes"):
            raise RecipeError(f"recipe '{recipe}': no pass '{name}'; there are: {', '.join(names('passes'))}")
        if not isinstance(options or {}, Mapping):
            raise RecipeError(f"recipe '{recipe}': the options of {name} are a mapping, not {options!r}")
        passes.append(PassSpec(name, dict(options or {})))
        passes[-1].build_options()
    return tuple(passes)


def _parse_rules(items: Iterable[Any], recipe: str) -> tuple[Rule, ...]:
    rules = []
    for item in items:
        if not isinstance(item, Mapping) or set(item) != {"match", "scheme"}:
            raise RecipeError(f"recipe '{recipe}': a rule has the keys match and scheme, not {item!r}")
        rules.append(Rule.parse(str(item["match"]), str(item["scheme"])))
    return tuple(rules)
