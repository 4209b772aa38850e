"""Chooses the scheme of each tensor: from a recipe's rules, mix and scheme, from the codes of its source, and from outlier inputs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from quantcli import conversions, formats, qtypes
from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.views import HEAD_WEIGHT, tied_embedding
from quantcli.errors import RecipeError, UnsupportedError
from quantcli.formats import Request
from quantcli.recipe import Recipe
from quantcli.statistics.outliers import Protected
from quantcli.tensors import Scheme


def choose_schemes(source: Checkpoint, recipe: Recipe, taps: Mapping[str, str], request: Request) -> dict[str, Scheme]:
    """Tensor name → scheme of the tensors that do not stay as they are: the first rule that matches, else the mix or the scheme."""
    schemes: dict[str, Scheme] = {}
    if recipe.mix is not None:
        fmt = formats.of(recipe.format)
        if not fmt.has_mixes:
            raise RecipeError(f"{recipe.mix} is a mix of types for GGUF; the {recipe.format} format has none: leave --format out")
        schemes = fmt.mix(recipe.mix, source.specs, source.config, request)
        if recipe.codes != "requantize":  # what the mix leaves as it is stays so when it is codes of the format's own
            schemes = {name: have for name, have in source.schemes.items() if fmt.supports(have)} | schemes
    elif recipe.scheme is not None:
        schemes = dict.fromkeys(taps, recipe.scheme)
    if recipe.codes == "keep" and source.schemes:
        schemes = kept_schemes(source, recipe, schemes)
    matrices = [name for name, spec in source.specs.items() if name in taps or (len(spec.shape) == 2 and layer_of(name) == name)]
    used: set[int] = set()
    for name in matrices:
        hits = [i for i, rule in enumerate(recipe.rules) if rule.matches(name)]
        used.update(hits)
        if not hits:
            continue
        scheme = recipe.rules[hits[0]].scheme
        if scheme is None:
            schemes.pop(name, None)
        else:
            schemes[name] = scheme
    # What a rule keeps may also be what stays as it is anyway (a router, a norm).
    used |= {i for i, rule in enumerate(recipe.rules) if rule.scheme is None and any(map(rule.matches, source.specs))}
    if idle := [rule.pattern for i, rule in enumerate(recipe.rules) if i not in used]:
        example = matrices[0] if matrices else "none"
        if re.search(idle[0], HEAD_WEIGHT) and source.config.get("tie_word_embeddings"):
            raise RecipeError(
                f"rule '{idle[0]}': the output embedding of {source.source} is its input embedding (tie_word_embeddings) and stays so; "
                "leave the rule out, or give it codes"
            )
        raise RecipeError(f"rule '{idle[0]}' matches no weight matrix of {source.source}; the first of them is {example}")
    return schemes


def untied_head(source: Checkpoint, recipe: Recipe) -> str | None:
    """The input embedding's weight, where the output embedding is tied to it and a rule gives the latter alone codes: it must be untied."""
    rule = next((rule for rule in recipe.rules if rule.matches(HEAD_WEIGHT)), None)
    embedding = tied_embedding(source) if rule is not None and is_quantized(rule.scheme) else None
    return None if embedding is None or rule is None or rule.matches(embedding) else embedding


def kept_schemes(source: Checkpoint, recipe: Recipe, wanted: Mapping[str, Scheme]) -> dict[str, Scheme]:
    """The schemes of a quantized source's tensors in the recipe's format: the first that holds their codes, else the format's usual one.

    ``wanted``: what the recipe says of all tensors; of those that the source left dense a plain dtype alone is taken from it.
    """
    fmt = formats.of(recipe.format)
    schemes = {name: scheme for name, scheme in wanted.items() if name not in source.schemes and not is_quantized(scheme)}
    for name, scheme in source.schemes.items():
        shape = source.specs[name].shape
        held = (
            s for s in conversions.candidates(scheme) if fmt.supports(s) and conversions.exactness(scheme, s, shape[-1]) and fits(shape, s)
        )
        fitting = (s for s in held if fmt.why_not(s, source.config) is None)
        if (chosen := next(fitting, None)) is None and fmt.usual_scheme is not None:
            chosen = Scheme.parse(fmt.usual_scheme)
        if chosen is not None:
            schemes[name] = chosen
    return schemes


def fits(shape: tuple[int, ...], scheme: Scheme) -> bool:
    """Whether ``scheme`` can code a matrix of ``shape`` at all."""
    try:
        qtypes.of(scheme.qtype).layout(shape, scheme)
    except RecipeError:
        return False
    return True


def keeping_codes(source: Checkpoint, recipe: Recipe, schemes: Mapping[str, Scheme]) -> set[str]:
    """The tensors whose codes go over from the source, because the scheme chosen for them can hold these."""
    if recipe.codes == "requantize":
        return set()
    specs, chosen = source.specs, ((name, have, schemes.get(name)) for name, have in source.schemes.items())
    return {name for name, have, want in chosen if want is not None and conversions.exactness(have, want, specs[name].shape[-1])}


def protect(
    recipe: Recipe, schemes: Mapping[str, Scheme], taps: Mapping[str, str], protected: Sequence[Protected] | None
) -> tuple[dict[str, Scheme], tuple[str, ...]]:
    """``schemes`` with those of ``protected`` replaced by what ``protect_outliers`` says, unless a rule names the tensor; and a note."""
    if recipe.protect_outliers is None:
        return dict(schemes), ()
    scheme, chosen = recipe.protect_outliers.scheme, dict(schemes)
    if scheme is not None and not formats.of(recipe.format).supports(scheme):
        raise UnsupportedError(f"protect_outliers: the {recipe.format} format cannot hold {scheme}; choose another, or 'keep'")
    if protected is None:
        return chosen, ("protect_outliers: what it protects is known once inputs are measured, or from --stats",)
    protected_taps = {tap for unit in protected for tap in unit.taps}
    names = [
        n
        for n, tap in taps.items()
        if tap in protected_taps and is_quantized(schemes.get(n)) and not any(r.matches(n) for r in recipe.rules)
    ]
    for name in names:
        chosen.pop(name)
        chosen |= {} if scheme is None else {name: scheme}
    if not names:
        return chosen, ("protect_outliers: no inputs go beyond its thresholds",)
    return chosen, (f"protect_outliers: {len(names)} linears {'stay as they are' if scheme is None else f'in {scheme}'}: {listed(names)}",)


def is_quantized(scheme: Scheme | None) -> bool:
    """Whether ``scheme`` is more than a plain float dtype."""
    return scheme is not None and scheme.qtype not in ("f32", "f16", "bf16")


def layer_of(name: str) -> str:
    """The layer that tensor ``name`` belongs to: up to its first number ("model.layers.3"), or the name itself."""
    match = re.match(r"(.*?\.\d+)\.", name)
    return match[1] if match else name


def listed(names: Sequence[str]) -> str:
    """The first two of ``names`` and how many more."""
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
