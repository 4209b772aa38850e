"""The recipe that the words of a command line name: a method, a file, a GGUF type, and what is set on top of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.cli import options
from quantcli.cli.console import Console

if TYPE_CHECKING:
    from quantcli.recipe import Recipe


def choose_recipe(method: str | None, recipe: str | None, type_: str | None, format_: str | None = None) -> Recipe:
    """The recipe that the ways to name one agree on. What fits no model at all is a usage error."""
    from quantcli import recipe as recipes

    if recipe is not None and (method is not None or type_ is not None):
        raise options.wrong("--recipe", "it already says the method and the type; give either --recipe or --method and --type")
    format_ = None if format_ is None else check_format(format_)
    if format_ == "gguf" and recipe is None and type_ is None:
        raise options.wrong("--format", f"gguf needs a file type; give --type, one of: {', '.join(gguf_types())}")
    if method is not None and method not in recipes.methods():
        raise options.wrong("--method", f"no method '{method}'; there are: {', '.join(recipes.methods())}")
    if recipe is not None:
        chosen = recipes.load(recipe)
    elif type_ is None:
        chosen = recipes.default_for(method) if method else usual_recipe(format_)
    else:
        chosen = load_type(type_, "--type")
        if method in (None, "rtn"):
            chosen = replace(chosen, codes="reuse")
        else:
            chosen = replace(chosen, name=f"{chosen.mix}-{method}", passes=recipes.default_for(str(method)).passes)
    return replace(chosen, format=format_ or chosen.format)


def usual_recipe(format_: str | None) -> Recipe:
    """What ``quantize`` does when told no method: GPTQ, or round to nearest for a format that cannot hold what GPTQ's recipe makes."""
    from quantcli import formats
    from quantcli import recipe as recipes
    from quantcli.recipe import PassSpec
    from quantcli.tensors import Scheme

    gptq = recipes.default_for("gptq")
    if format_ is None or gptq.scheme is None or formats.of(format_).supports(gptq.scheme):
        return gptq
    usual = formats.of(format_).usual_scheme
    if usual is None:
        raise options.wrong("--format", f"{format_} holds no quantized tensors; use quantcli export, or a recipe that names a dtype")
    return recipes.Recipe(f"{format_}-{usual}", format_, (PassSpec("rtn"),), scheme=Scheme.parse(usual))


def check_format(word: str) -> str:
    """The output format that ``word`` names."""
    from quantcli import formats

    writable = [name for name in formats.names() if formats.of(name).is_written]
    word = word.lower().replace("_", "-")
    if word not in writable:
        raise options.wrong("--format", f"no format '{word}' to write; there are: {', '.join(writable)}")
    return word


def gguf_types() -> dict[str, str]:
    """The GGUF file types that a shipped recipe writes → that recipe; Q4_K and Q5_K mean what they mean to llama-quantize."""
    from quantcli import recipe as recipes
    from quantcli.formats.gguf.types.filetypes import ALIASES

    types = {mix: name for name in recipes.shipped() if (mix := recipes.load(name).mix)}
    return types | {alias: types[name] for alias, name in ALIASES.items() if name in types}


def load_type(word: str, option: str) -> Recipe:
    """The recipe of a GGUF file type."""
    from quantcli import recipe as recipes

    types = gguf_types()
    if word.upper() not in types:
        raise options.wrong(option, f"'{word}' is no GGUF file type; there are: {', '.join(types)}")
    return recipes.load(types[word.upper()])


def set_scheme(recipe: Recipe, **overrides: Any) -> Recipe:
    """The recipe with the scheme options that were given on the command line."""
    given = {key: value for key, value in overrides.items() if value is not None}
    return recipe.with_scheme(**given) if given else recipe


def set_cache(recipe: Recipe, word: str | None) -> Recipe:
    """The recipe with the command line's word for the key-value cache, which its name tells too."""
    from quantcli.tensors import KV_CACHES

    if word is None:
        return recipe
    if word not in KV_CACHES:
        raise options.wrong("--kv-cache", f"'{word}' is none of {', '.join(KV_CACHES)}")
    return replace(recipe, kv_cache=word, name=f"{recipe.name}-kv-{word}")


def set_rules(recipe: Recipe, rules: list[str], skips: list[str]) -> Recipe:
    """Rules of the command line go before those of the recipe, skips before rules."""
    from quantcli.recipe import Rule
    from quantcli.tensors import KEEP

    pairs = [(pattern, KEEP) for pattern in skips] + [options.split_pair(text, "--rule") for text in rules]
    return replace(recipe, rules=(*(Rule.parse(*pair) for pair in pairs), *recipe.rules))


def check_imatrix(recipe: Recipe, imatrix: Path | None, stats: Path | None) -> None:
    """Refuse an importance matrix where nothing would read it."""
    if imatrix is not None and recipe.format != "gguf":
        raise options.wrong("--imatrix", f"belongs to --format gguf, not to {recipe.format}")
    if imatrix is not None and stats is not None:
        raise options.wrong("--imatrix", "has no meaning beside --stats; give one of the two")


def set_calibration(
    console: Console, recipe: Recipe, stats: Path | None, *, dataset: list[str] | None, samples: int | None, seq_len: int | None
) -> Recipe:
    """The recipe with the texts of the command line. Options that nothing would read are an error or a warning, never silent."""
    given = {"--dataset": dataset, "--samples": samples, "--seq-len": seq_len}
    idle = [option for option, value in given.items() if value is not None]
    if stats is not None and idle:
        raise options.wrong("--stats", f"{idle[0]} has no meaning beside it: the statistics were gathered before; give one of the two")
    if not recipe.is_calibrated and (idle or stats is not None):
        console.warn(f"recipe '{recipe.name}' uses no calibration: {', '.join(idle or ['--stats'])} ignored")
    old = recipe.calibration
    new = replace(old, samples=samples or old.samples, seq_len=seq_len or old.seq_len, datasets=tuple(dataset or old.datasets))
    return replace(recipe, calibration=new)
