"""Prepares a source for a recipe: views under the names that are needed, taps, and the model to run if there is one.

The only place that shows a checkpoint under other names: experts one by one or joined, an output embedding untied, rows cut as a format
stores them. Whoever plans, measures, evaluates or counts bytes asks here, so that all see the same tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from quantcli import archs, formats
from quantcli.checkpoint import heads, views
from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.modules import Modules
from quantcli.checkpoint.views import HEAD_WEIGHT, Joint, Piece, View
from quantcli.errors import CheckpointError, UnsupportedError
from quantcli.experts import expert_of
from quantcli.formats import Format
from quantcli.planning.readers import reader_modules
from quantcli.planning.schemes import layer_of, untied_head
from quantcli.recipe import Recipe
from quantcli.tensors import KvCache

if TYPE_CHECKING:
    import torch

    from quantcli.forward import Forward


@dataclass(frozen=True, slots=True)
class Arranged:
    """``source``: the checkpoint as it is read from here on; ``format``: of the output; ``taps``: disk name of each linear's weight → tap;
    ``head``: the output embedding's weight, where what it reads can be measured, else None; ``caches``: where the layers keep keys and
    values, None where that was not traced; ``untied``: the input embedding's weight, where the model had both as one tensor; ``forward``:
    the model to run, where the recipe learns from text or nothing else knows its taps; ``notes``: what of the source is read otherwise
    than its config.json says; ``modules``: what readers of the output make of it."""

    source: Checkpoint
    format: Format
    taps: Mapping[str, str]
    head: str | None = None
    caches: tuple[KvCache, ...] | None = None
    untied: str | None = None
    forward: Forward | None = None
    notes: tuple[str, ...] = ()
    modules: Modules = field(default_factory=Modules)


def arrange(
    source: Checkpoint,
    recipe: Recipe,
    device: str = "cpu",
    *,
    run: bool | None = None,
    forward: Forward | None = None,
    modules: Modules | None = None,
    all_taps: bool = False,
) -> Arranged:
    """``source`` for ``recipe``. ``run``: whether the model is to be run, usually (None) where the recipe is calibrated; ``forward``, and
    ``modules``: what was opened, or found, before of this very source, to be taken if it is needed; ``all_taps``: also those of weights
    stored [in, out] (GPT-2's), which are measured, but which no pass takes.

    Raises :class:`UnsupportedError` where the format has no names for the model, or the model must be run and cannot be.
    """
    fmt = formats.of(recipe.format)
    notes = tuple(f"{note}; the output is untied" for note in notes_on_head(source))
    source = with_own_head(source)
    if not recipe.is_calibrated:
        source = fmt.as_stored(source)
    if (embedding := untied_head(source, recipe)) is not None:
        source, forward = untied(source, embedding), None
    if modules is None or not fmt.lists_modules:
        modules = reader_modules(source, fmt)
    is_known = archs.of(source.config) is not None or fmt.has_own_names
    must_run = recipe.is_calibrated if run is None else run
    listed: dict[str, str] = {}
    if is_known and not must_run:
        forward = None
    elif forward is None:
        from quantcli.forward import run_dtype, sees  # transformers takes seconds to import

        dtype = run_dtype(source.specs.values(), device)
        try:
            forward = open_forward(source, dtype=dtype, device=device, all_tokens=recipe.calibration.moe == "all")
        except UnsupportedError:
            if must_run or sees(source.config):  # of which only the text's layers are to be coded
                raise
            listed = listed_taps(source)
    source = experts_apart(source) if forward is None else forward.checkpoint
    if modules.of and any(name not in modules.of for name in source.specs if name.endswith(".weight") and not expert_of(name)):
        modules = modules.beside(reader_modules(source, fmt))  # experts apart, other tensors may have other names, too
    if fmt.has_own_names:
        source = cut_for(source, fmt)
    turned = forward.turned if forward is not None and not all_taps else frozenset[str]()
    taps = forward.taps if forward is not None else declared_taps(source) or listed  # where the model is built, it knows best
    head, caches = (declared_head(source), None) if forward is None else (forward.head_weight, forward.caches)
    return Arranged(
        source,
        fmt,
        {name: tap for name, tap in taps.items() if name in source.specs and name not in turned},
        head if head in source.specs else None,
        caches,
        embedding,
        forward,
        notes,
        modules,
    )


def open_forward(
    checkpoint: Checkpoint, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu", all_tokens: bool = False
) -> Forward:
    """The model of ``checkpoint``, to be run layer by layer in ``dtype`` (float32), with a tensor for each expert's linear.

    Raises :class:`UnsupportedError` where transformers does not know the architecture, :class:`CheckpointError` where the tensors are not
    those of the model.
    """
    import torch

    from quantcli.forward import Forward, build

    dtype = dtype or torch.float32
    checkpoint = with_own_head(checkpoint)
    n_layers, n_tensors = checkpoint.config.get("num_hidden_layers", 0), len(checkpoint.specs)
    if isinstance(n_layers, int) and n_layers > n_tensors:
        raise CheckpointError(f"{checkpoint.source}: config.json tells of {n_layers} layers, the checkpoint has {n_tensors} tensors in all")
    model = build(checkpoint.config, dtype, checkpoint.source)
    return Forward(experts_apart(checkpoint, model), model, dtype=dtype, device=device, all_tokens=all_tokens)


def listed_taps(source: Checkpoint) -> dict[str, str]:
    """Disk name of each linear's weight in the blocks of a model that cannot be run layer by layer → a tap of its own."""
    import torch

    from quantcli.forward import build, listed_linears

    model = build(source.config, torch.float16, source.source)  # in which models are most particular about what stays in float32
    return {name: name.removesuffix(".weight") for name in listed_linears(source, model)}


def experts_apart(source: Checkpoint, model: Any = None) -> Checkpoint:
    """``source`` with the linears of its experts one by one, under the names that its family has for them: where transformers' conversions
    of ``model`` know these, and without one where the architecture's literal says how experts are stored; else itself."""
    views.experts_apart(source)  # refuses names that mean other rows
    arch = archs.of(source.config)
    if model is not None and (arch is None or not arch.stacked):
        from quantcli.forward import expert_pieces

        return view(source, expert_pieces(source, model))
    return source if arch is None else view(source, views.pieces_of(source, arch.experts))


def experts_joined(source: Checkpoint, coded: Collection[str] = ()) -> Checkpoint:
    """``source`` with its experts in the tensors in which alone transformers knows them, where its family is of that kind and none of
    ``coded`` is one of their linears; itself otherwise."""
    joints = views.experts_apart(source)
    parts = {part for joint in joints.values() for part in joint.names}
    if not parts.isdisjoint(coded):
        return source
    pieces: dict[str, Piece | Joint] = {name: Piece(name) for name in source.specs if name not in parts}
    return view(source, {**pieces, **joints}) if joints else source


def cut_for(source: Checkpoint, fmt: Format) -> Checkpoint:
    """``source`` as ``fmt`` cuts it: experts one by one, and what else of its architecture the format stores otherwise than a folder."""
    cut = fmt.cuts(source.config)
    source = experts_apart(source)
    return view(source, views.pieces_of(source, cut))


def with_own_head(source: Checkpoint) -> Checkpoint:
    """``source`` untied, where config.json ties its embeddings and the file has both, with different numbers: as transformers 5 reads it
    and convert_hf_to_gguf converts it; itself otherwise."""
    if heads.own_head(source) is None:
        return source
    return View(source, {name: Piece(name) for name in source.specs}, untied_config(source))


def notes_on_head(source: Checkpoint) -> tuple[str, ...]:
    """What a user should know where :func:`with_own_head` unties."""
    if (ends := heads.own_head(source)) is None:
        return ()
    head, embedding = ends
    return (f"{head} holds other numbers than {embedding}, to which config.json ties it: the stored head counts, as in transformers 5",)


def untied(source: Checkpoint, embedding: str) -> Checkpoint:
    """``source`` with an output embedding of its own, the same numbers as ``embedding``, which the model tied it to."""
    pieces = {name: Piece(name) for name in source.specs} | {HEAD_WEIGHT: Piece(embedding)}
    return View(source, pieces, untied_config(source))


def untied_config(source: Checkpoint) -> dict[str, Any]:
    """The config of ``source``, of a model whose embeddings are two tensors."""
    apart = {"tie_word_embeddings": False}
    text = {"text_config": source.config["text_config"] | apart} if source.config.get("text_config") else {}
    return source.config | text | apart


def view(source: Checkpoint, pieces: Mapping[str, Piece | Joint]) -> Checkpoint:
    """``source`` under the names of ``pieces``; itself where there are none."""
    return View(source, pieces) if pieces else source


def declared_taps(source: Checkpoint) -> dict[str, str] | None:
    """Disk name of each linear's weight → its tap, from the architecture's literal; None when no literal answers to the model."""
    arch = archs.of(source.config)
    if arch is None:
        return None
    if isinstance(arch, archs.StoredNames):
        return {name: name for name, spec in source.specs.items() if len(spec.shape) > 1 and layer_of(name) != name}
    return {name: tap for name in source.specs if (tap := arch.tap(name)) is not None}


def declared_head(source: Checkpoint) -> str | None:
    """The output embedding's weight under its usual name; None where it has another, or is the input embedding's."""
    return HEAD_WEIGHT if HEAD_WEIGHT in source.specs and not source.config.get("tie_word_embeddings") else None
