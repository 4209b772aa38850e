"""Selects a recipe by method, GGUF type, format or the codes of a source, and the default output path."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from quantcli import formats
from quantcli import recipe as recipes
from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.hub import model_name
from quantcli.errors import OptionError
from quantcli.formats.gguf.file.container import ggml_type_of
from quantcli.formats.gguf.types.filetypes import ALIASES
from quantcli.planning.schemes import kept_schemes
from quantcli.recipe import MOE, PassSpec, Recipe, Rule
from quantcli.tensors import KEEP, KV_CACHES, Scheme

DENSE_TYPES = {"bfloat16": "BF16", "float32": "F32"}
"""config.json's dtypes → the GGUF type that holds them; float16 and what says nothing is F16."""


def choose(method: str | None = None, recipe: str | None = None, type: str | None = None, format: str | None = None) -> Recipe:
    """The recipe that the ways to name one agree on; GPTQ where nothing is named. :class:`OptionError` for what fits no model at all."""
    if recipe is not None and (method is not None or type is not None):
        raise OptionError("recipe", "it already says the method and the type; give either --recipe or --method and --type")
    format = None if format is None else writable(format)
    if format == "gguf" and recipe is None and type is None:
        raise OptionError("format", f"gguf needs a file type; give --type, one of: {', '.join(gguf_types())}")
    if method is not None and method not in recipes.methods():
        raise OptionError("method", f"no method '{method}'; there are: {', '.join(recipes.methods())}")
    if recipe is not None:
        chosen = recipes.load(recipe)
    elif type is None:
        chosen = recipes.default_for(method) if method else usual(format)
    else:
        chosen = of_gguf_type(type, "type")
        if method in (None, "rtn"):
            chosen = replace(chosen, codes="reuse")
        else:
            chosen = replace(chosen, name=f"{chosen.mix}-{method}", passes=recipes.default_for(str(method)).passes)
    return replace(chosen, format=format or chosen.format)


def usual(format: str | None) -> Recipe:
    """What ``quantize`` does when told no method: GPTQ, or round to nearest for a format that cannot hold what GPTQ's recipe makes."""
    gptq = recipes.default_for("gptq")
    if format is None or gptq.scheme is None or formats.of(format).supports(gptq.scheme):
        return gptq
    scheme = formats.of(format).usual_scheme
    if scheme is None:
        raise OptionError("format", f"{format} holds no quantized tensors; use quantcli export, or a recipe that names a dtype")
    return Recipe(f"{format}-{scheme}", format, (PassSpec("rtn"),), scheme=Scheme.parse(scheme))


def writable(format: str) -> str:
    """The name of the output format that ``format`` spells; :class:`OptionError` for one that is not written."""
    known = [name for name in formats.names() if formats.of(name).is_written]
    format = format.lower().replace("_", "-")
    if format not in known:
        raise OptionError("format", f"no format '{format}' to write; there are: {', '.join(known)}")
    return format


def gguf_types() -> dict[str, str]:
    """The GGUF file types that a shipped recipe writes → that recipe; Q4_K and Q5_K mean what they mean to llama-quantize."""
    types = {mix: name for name in recipes.shipped() if (mix := recipes.load(name).mix)}
    return types | {alias: types[name] for alias, name in ALIASES.items() if name in types}


def of_gguf_type(type: str, option: str) -> Recipe:
    """The recipe of a GGUF file type; ``option``: what an error calls it."""
    types = gguf_types()
    if type.upper() not in types:
        raise OptionError(option, f"'{type}' is no GGUF file type; there are: {', '.join(types)}")
    return recipes.load(types[type.upper()])


def of_type(format: str, type: str) -> Recipe:
    """Every matrix in the type that was asked for: a GGUF file type, or the scheme of another format."""
    if format == "gguf":
        return replace(of_gguf_type(type, "TYPE"), codes="reuse")
    scheme = Scheme.parse(type)
    return Recipe(f"{format}-{scheme}", format, (PassSpec("rtn"),), scheme=scheme, codes="reuse")


def that_keeps(checkpoint: Checkpoint, format: str) -> Recipe:
    """The source's codes wherever the format can hold them, and the format's usual scheme where it cannot."""
    recipe = Recipe(format, format, (PassSpec("rtn"),), codes="keep")
    if format != "gguf":
        scheme = formats.of(format).usual_scheme
        return replace(recipe, scheme=None if scheme is None else Scheme.parse(scheme))
    if checkpoint.kind == "gguf":
        return replace(recipe, name="copy")
    if not checkpoint.schemes:
        raise OptionError("TYPE", f"a GGUF file type is missing; there are: {', '.join(gguf_types())}")
    config = checkpoint.config
    dense = DENSE_TYPES.get(str(config.get("dtype") or config.get("torch_dtype")), "F16")
    return replace(recipe, name=commonest_type(checkpoint, replace(recipe, mix=dense)), mix=dense)


def commonest_type(checkpoint: Checkpoint, recipe: Recipe) -> str:
    """The GGUF type that most of a quantized source's weights take: it names the output."""
    n_weights: Counter[str] = Counter()
    for name, scheme in kept_schemes(checkpoint, recipe, {}).items():
        n_weights[ggml_type_of(scheme.qtype)] += checkpoint.specs[name].n_elements
    return n_weights.most_common(1)[0][0]


def with_cache(recipe: Recipe, kv_cache: str | None) -> Recipe:
    """``recipe`` with scales for a quantized key-value cache, which its name tells too."""
    if kv_cache is None:
        return recipe
    if kv_cache not in KV_CACHES:
        raise OptionError("kv_cache", f"'{kv_cache}' is none of {', '.join(KV_CACHES)}")
    return replace(recipe, kv_cache=kv_cache, name=f"{recipe.name}-kv-{kv_cache}")


def with_rules(recipe: Recipe, rules: Sequence[tuple[str, str]], skips: Sequence[str] = ()) -> Recipe:
    """``recipe`` with rules (pattern, scheme) before its own, and patterns of what is to stay dense before these."""
    pairs = [*((pattern, KEEP) for pattern in skips), *rules]
    return replace(recipe, rules=(*(Rule.parse(*pair) for pair in pairs), *recipe.rules))


def with_text(
    recipe: Recipe, *, datasets: Sequence[str] = (), samples: int | None = None, seq_len: int | None = None, moe: str | None = None
) -> Recipe:
    """``recipe`` calibrated on other text, on more or less of it, or with experts measured on other tokens."""
    if moe is not None and moe not in MOE:
        raise OptionError("moe", f"expected {' or '.join(MOE)}, not '{moe}'")
    old = recipe.calibration
    new = replace(
        old,
        samples=samples or old.samples,
        seq_len=seq_len or old.seq_len,
        datasets=tuple(datasets) or old.datasets,
        moe=moe or old.moe,
    )
    return replace(recipe, calibration=new)


def default_output(source: Checkpoint, recipe: Recipe) -> Path:
    """``<model>-<recipe>`` in the current folder; ``<model>-Q4_K_M.gguf`` for GGUF."""
    model = model_name(source.source)
    if recipe.format == "gguf":
        kind = recipe.name if recipe.codes == "keep" else recipe.mix or recipe.name
        return Path(f"{model.removesuffix('.gguf')}-{kind}.gguf")
    return Path(f"{model}-{recipe.name}")
