"""The plan: every output name, scheme and byte, computed from a recipe and the shapes of a source."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from quantcli import conversions, qtypes
from quantcli.checkpoint import views
from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.views import HEAD_WEIGHT
from quantcli.errors import RecipeError, UnsupportedError, about
from quantcli.experts import expert_of
from quantcli.formats import Format, OutputLayout, Request
from quantcli.passes import of as pass_of
from quantcli.planning import engines as known_engines
from quantcli.planning import kv_caches
from quantcli.planning.arrange import Arranged, experts_joined
from quantcli.planning.kv_caches import PlannedCache
from quantcli.planning.readers import dense_reasons, left_reasons
from quantcli.planning.schemes import choose_schemes, is_quantized, keeping_codes, layer_of, listed, protect
from quantcli.recipe import PassSpec, Recipe
from quantcli.statistics.outliers import Protected
from quantcli.tensors import HEAD, KvCache, Scheme, TensorSpec

RTN = PassSpec("rtn")


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor of the source. ``scheme`` None: copied as it is. ``tap``: whose statistics its passes read, or None.
    ``outputs``: the file tensors it becomes; none means that the format has no place for it. ``have``: the scheme that the source codes it
    with; ``kept``: its codes go over (:mod:`quantcli.conversions`)."""

    source: TensorSpec
    scheme: Scheme | None
    tap: str | None
    outputs: tuple[TensorSpec, ...]
    have: Scheme | None = None
    kept: bool = False

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def is_solved(self) -> bool:
        """Whether the recipe's passes choose its codes: a coded linear with a tap. What else has a scheme is rounded to nearest."""
        return self.tap is not None and bool(self.outputs) and is_quantized(self.scheme) and not self.kept

    @property
    def is_requantized(self) -> bool:
        """Whether the source's codes are decoded and others chosen, on top of the error that they have."""
        return self.have is not None and bool(self.outputs) and is_quantized(self.scheme) and not self.kept


@dataclass(frozen=True, slots=True)
class PlannedLayer:
    """A decoder layer, or one tensor that belongs to none (embedding, final norm, lm_head); ``caches``: those that get scales."""

    name: str
    tensors: tuple[PlannedTensor, ...]
    caches: tuple[PlannedCache, ...] = ()

    @property
    def bpw(self) -> float:
        """Bits for each parameter of its tensors, every part counted; scales of caches are not."""
        n_bytes = sum(spec.nbytes for tensor in self.tensors for spec in tensor.outputs)
        return 8 * n_bytes / max(1, sum(tensor.source.n_elements for tensor in self.tensors))


@dataclass(frozen=True, slots=True)
class Plan:
    """What will be written, and how it lies in the files: ``layout``.

    ``source``: the checkpoint with its tensors cut as they are written; ``is_weighed``: made for rounding that is given the importance of
    inputs; ``notes``: what a user might not expect, for the command line to say; ``dense``: what stays dense because readers load it so,
    with the reason.
    """

    source: Checkpoint
    recipe: Recipe
    layers: tuple[PlannedLayer, ...]
    layout: OutputLayout
    is_weighed: bool = False
    notes: tuple[str, ...] = ()
    dense: Mapping[str, str] = field(default_factory=dict)

    @property
    def tensors(self) -> list[PlannedTensor]:
        return [tensor for layer in self.layers for tensor in layer.tensors]

    @property
    def outputs(self) -> list[TensorSpec]:
        of_caches = [spec for layer in self.layers for planned in layer.caches for spec in planned.outputs]
        return [spec for tensor in self.tensors for spec in tensor.outputs] + of_caches

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors written, headers not counted."""
        return sum(spec.nbytes for spec in self.outputs)

    @property
    def bpw(self) -> float:
        """Bits for each parameter of the source, with every scale, zero point and uncoded tensor counted."""
        return 8 * self.n_bytes / sum(t.source.n_elements for t in self.tensors)

    @property
    def coverage(self) -> float:
        """The share of the decoder layers' weights that is coded; 1 where the layers have none."""
        return self.share_of([tensor for tensor in self.matrices if is_quantized(tensor.scheme)])

    @property
    def matrices(self) -> list[PlannedTensor]:
        """What is written of the layers that text runs through, and has more than one dimension.

        Such a layer has a linear whose inputs are known; those of a vision tower or for the prediction of further tokens have none.
        """
        run = {layer_of(t.name) for t in self.tensors if t.tap is not None}
        return [t for t in self.tensors if len(t.source.shape) > 1 and layer_of(t.name) in run - {t.name} and t.outputs]

    @property
    def out_of_reach(self) -> list[PlannedTensor]:
        """The decoder layers' matrices that stay dense for being no linears of their own (experts fused in a file, convolutions), and not
        because a rule says so; largest first."""
        dense = [t for t in self.matrices if t.tap is None and not is_quantized(t.scheme)]
        return sorted((t for t in dense if not any(r.matches(t.name) for r in self.recipe.rules)), key=lambda t: -t.source.n_elements)

    def share_of(self, tensors: Sequence[PlannedTensor]) -> float:
        """The share of the decoder layers' weights that ``tensors`` are; 1 where the layers have none."""
        total = sum(t.source.n_elements for t in self.matrices)
        return sum(t.source.n_elements for t in tensors) / total if total else 1.0

    def why_dropped(self, tensor: PlannedTensor) -> str:
        """Why ``tensor`` has no outputs."""
        return self.layout.dropped.get(tensor.name, f"the {self.recipe.format} format has no place for it")

    def census(self) -> dict[str, int]:
        """How many tensors are quantized, copied and dropped: together every tensor of the source."""
        tensors = self.tensors
        dropped = sum(not t.outputs for t in tensors)
        quantized = sum(bool(t.outputs) and is_quantized(t.scheme) for t in tensors)
        return {"quantized": quantized, "copied": len(tensors) - quantized - dropped, "dropped": dropped}


def make(arranged: Arranged, recipe: Recipe, *, is_weighed: bool = False, protected: Sequence[Protected] | None = None) -> Plan:
    """The plan for what :func:`~quantcli.planning.arrange.arrange` made of a source for ``recipe``.

    ``is_weighed``: plain rounding is given the importance of inputs, by which GGUF's mixes choose; ``protected``: what the recipe's
    ``protect_outliers`` found in the inputs, None as long as these are not known.

    Raises :class:`RecipeError` for a rule that matches nothing or a shape that does not fit, :class:`UnsupportedError` for a scheme that
    the format cannot hold, and for a model in whose layers no linear is found.
    """
    source, fmt, taps = arranged.source, arranged.format, arranged.taps
    fmt.check_options(recipe.format_options)
    check_passes(recipe)
    if arranged.caches is not None:
        kv_caches.check(source, recipe, arranged.caches)
    request = Request(
        recipe.format_options,
        recipe.mix,
        recipe.kv_cache,
        is_measured=bool(recipe.needs),
        is_weighed=is_weighed,
        modules=arranged.modules,
    )
    schemes = choose_schemes(source, recipe, taps, request)
    schemes, protected_notes = protect(recipe, schemes, taps, protected)
    taps = {**taps, arranged.head: HEAD} if arranged.head is not None and is_quantized(schemes.get(arranged.head)) else taps
    kept = keeping_codes(source, recipe, schemes)
    schemes = {name: s if name in kept else fmt.suited(s, source.config) for name, s in schemes.items()}
    chosen = {name: scheme for name, scheme in schemes.items() if name not in kept}
    dense = dense_reasons(source, fmt, chosen, arranged.modules)
    if dense and len(dense) == sum(map(is_quantized, schemes.values())):
        name, reason = next(iter(dense.items()))
        raise UnsupportedError(
            f"{source.source}: nothing is left to quantize: {name} and its like stay dense: {reason}; choose another --format"
        )
    schemes = {name: scheme for name, scheme in schemes.items() if name not in dense}
    if not fmt.has_own_names:
        source = experts_joined(source, [name for name, scheme in schemes.items() if is_quantized(scheme)])
        schemes = {name: scheme for name, scheme in schemes.items() if name in source.specs}
        taps = {name: tap for name, tap in taps.items() if name in source.specs}
        kept &= source.specs.keys()
    engines = check_experts_apart(source, fmt, recipe, schemes)
    left = [name for name, spec in source.specs.items() if len(spec.shape) > 1 and layer_of(name) != name and name not in taps]
    if left and not taps and recipe.scheme is not None:
        raise UnsupportedError(
            f"{source.source}: its layers have no linears, only matrices of other kinds such as {left[0]}; nothing here can be quantized"
        )
    check_held(source, fmt, recipe, schemes)
    layout = fmt.layout(source, schemes, request)
    left = [name for name in left if name not in schemes and name not in layout.dropped]
    dense |= left_reasons(left, taps, arranged.modules)
    for name, scheme in schemes.items():
        if name not in kept and name in taps:
            with about(name):
                check_grid(recipe, scheme)
    layers = planned_layers(source, recipe, schemes, taps, kept, arranged.caches or (), layout)
    notes = (*arranged.notes, *protected_notes, *engines, *surprises(source, recipe, schemes, taps, kept), *layout.notes)
    coded = {name: scheme for name, scheme in schemes.items() if is_quantized(scheme)}
    experts = [] if engines else [scheme for name, scheme in coded.items() if expert_of(name)]  # whose note has told it
    notes += known_engines.warnings(fmt.name, coded.values(), experts=experts)
    if arranged.untied is not None:
        notes += (f"{HEAD_WEIGHT} is written beside {arranged.untied}, which it was tied to: tie_word_embeddings is false from now on",)
    if not fmt.has_own_names and (behind := source.sidecars().note()) is not None:
        notes += (behind,)
    if lost := [name for name in arranged.modules.lost.get(fmt.name, ()) if name in source.specs]:
        notes += (
            f"{listed(lost)}: transformers looks for these experts one by one in a {fmt.name} folder, and does not load it; "
            "vLLM has them in one tensor",
        )
    for reason in dict.fromkeys(dense.values()):
        notes += (f"{listed([name for name in dense if dense[name] == reason])} stay as they are: {reason}",)
    return Plan(source, recipe, layers, layout, is_weighed, notes, dense)


def check_importance(plan: Plan, importance: Collection[str]) -> None:
    """Raise :class:`RecipeError` where a type of ``plan`` is useless without importance, and neither ``importance`` (names of weights) nor
    what the recipe's passes measure gives it."""
    recipe, kept = plan.recipe, {t.name for t in plan.tensors if t.kept}
    for tensor in plan.tensors:
        if tensor.scheme is None or tensor.kept or not qtypes.of(tensor.scheme.qtype).needs_importance:
            continue
        if tensor.name not in importance and not (recipe.needs and tensor.tap is not None):
            why = f"recipe '{recipe.name}' measures none" if tensor.tap is not None else "what this tensor reads is not measured"
            raise RecipeError(
                f"{tensor.name}: {tensor.scheme} needs importance, and {why}; give --imatrix FILE, or a recipe whose passes read statistics"
            )
    if not recipe.needs:
        plan.layout.check_importance(importance, kept)


def check_held(source: Checkpoint, fmt: Format, recipe: Recipe, schemes: Mapping[str, Scheme]) -> None:
    """Raise :class:`UnsupportedError` for a scheme that the format cannot hold, :class:`RecipeError` for one that a shape does not fit."""
    for name, scheme in schemes.items():
        if not fmt.supports(scheme):
            raise UnsupportedError(f"{name}: the {recipe.format} format cannot hold {scheme}; choose another --format or scheme")
        if (reason := fmt.why_not(scheme, source.config)) is not None:
            raise UnsupportedError(f"{name}: {scheme}: {reason}; choose another scheme")
        with about(name):
            qtypes.of(scheme.qtype).layout(source.specs[name].shape, scheme)


def planned_layers(
    source: Checkpoint,
    recipe: Recipe,
    schemes: Mapping[str, Scheme],
    taps: Mapping[str, str],
    kept: Collection[str],
    caches: Sequence[KvCache],
    layout: OutputLayout,
) -> tuple[PlannedLayer, ...]:
    """Every tensor of ``source`` with what the format makes of it, layer by layer, and the caches that get scales."""
    planned: dict[str, list[PlannedTensor]] = {}
    for name, spec in source.specs.items():
        outputs = tuple(layout.outputs(spec, schemes.get(name)))
        if outputs and source.is_opaque(name):
            check_opaque(source, recipe, spec, outputs[0])
        tensor = PlannedTensor(spec, schemes.get(name), taps.get(name), outputs, source.schemes.get(name), name in kept)
        planned.setdefault(layer_of(name), []).append(tensor)
    scaled: dict[str, list[PlannedCache]] = {}
    for one in kv_caches.planned(recipe, caches, layout):
        scaled.setdefault(layer_of(f"{one.cache.attention}."), []).append(one)
    return tuple(PlannedLayer(name, tuple(planned[name]), tuple(scaled.get(name, ()))) for name in sorted(planned, key=_natural))


def check_experts_apart(source: Checkpoint, fmt: Format, recipe: Recipe, schemes: Mapping[str, Scheme]) -> tuple[str, ...]:
    """A note on which engines load experts one by one that transformers has in one tensor; :class:`UnsupportedError` where none does."""
    if fmt.has_own_names:
        return ()
    parts = {part for joint in views.experts_apart(source).values() for part in joint.names}
    coded = [name for name, scheme in schemes.items() if name in parts and is_quantized(scheme)]
    if not coded:
        return ()
    kind, engines = source.config.get("model_type"), fmt.experts_apart
    if engines is None:
        raise UnsupportedError(
            f"{coded[0]}: transformers and vLLM have the experts of {kind} in one tensor, and no engine loads an expert's gate and "
            rf"up from {recipe.format}; leave experts dense with --skip '\.experts\.', or choose --format gguf or compressed-tensors"
        )
    return (f"experts are written one by one, {engines}; transformers and vLLM have those of {kind} in one tensor and do not load them",)


def check_opaque(source: Checkpoint, recipe: Recipe, spec: TensorSpec, output: TensorSpec) -> None:
    """Raise :class:`UnsupportedError` unless a tensor of a type that nobody here decodes goes over byte for byte, to a file of its kind."""
    if (source.kind, spec.dtype) != (recipe.format, output.dtype):
        raise UnsupportedError(
            f"{spec.name}: {spec.dtype} cannot be decoded here, so nothing but a {source.kind} file can take it, and in that type alone "
            f"(--tensor-type 'REGEX={spec.dtype}' for these tensors, or no TYPE at all); got {output.dtype} in {recipe.format}"
        )


def surprises(
    source: Checkpoint,
    recipe: Recipe,
    schemes: Mapping[str, Scheme],
    taps: Mapping[str, str],
    kept: Collection[str],
) -> tuple[str, ...]:
    """What of the plan a user might not expect."""
    notes = []
    if coded_anew := [
        name for name in source.schemes if recipe.codes != "requantize" and is_quantized(schemes.get(name)) and name not in kept
    ]:
        first = coded_anew[0]
        notes.append(f"{listed(coded_anew)} decoded and coded anew, with some loss: {schemes[first]} does not hold {source.schemes[first]}")
    exactness = {name: conversions.exactness(source.schemes[name], schemes[name], source.specs[name].shape[-1]) for name in kept}
    if rounded := [name for name, degree in exactness.items() if degree == conversions.CODES]:
        notes.append(f"{listed(rounded)} keep their codes, and a scale or minimum is rounded to what {schemes[rounded[0]]} stores")
    if decoded := [name for name in source.schemes if name not in schemes]:
        notes.append(f"{listed(decoded)} decoded to a dense type: quantized in the source, and the recipe has no scheme for it")
    if recipe.needs and (unmeasured := [name for name, scheme in schemes.items() if name not in taps and is_quantized(scheme)]):
        passes = ", ".join(p.name for p in recipe.passes)
        notes.append(f"{listed(unmeasured)} rounded to nearest: {passes} has no statistics of what they read")
    return tuple(notes)


def check_passes(recipe: Recipe) -> None:
    """Raise :class:`RecipeError` where the passes leave no codes, or change a basis that ties together what is to be coded apart."""
    last = recipe.passes[-1].name
    if not pass_of(last).chooses_codes:
        raise RecipeError(f"recipe '{recipe.name}': {last} scales weights and chooses no codes; put rtn or gptq after it")
    if recipe.changes_basis and recipe.true_sequential:
        names = ", ".join(p.name for p in recipe.passes)
        raise RecipeError(f"recipe '{recipe.name}': {names} works on a whole layer at once; leave true_sequential out")


def check_grid(recipe: Recipe, scheme: Scheme) -> None:
    """Raise :class:`RecipeError` where a pass of ``recipe`` chooses codes one by one, and ``scheme`` has none for a single weight."""
    if (reason := qtypes.of(scheme.qtype).no_grid) is not None:
        for name in (p.name for p in recipe.passes if pass_of(p.name).needs_grid):
            raise RecipeError(f"the pass {name} needs a grid, and {reason}")


def _natural(layer: str) -> tuple[int, Sequence[Any]]:
    """Decoder layers by number, in between what comes before (embeddings) and after them (norm, lm_head) in a forward pass."""
    if match := re.fullmatch(r"(.*)\.(\d+)", layer):
        return (1, [match[1], int(match[2])])
    return (0 if "embed" in layer or "wte" in layer else 2, [layer])
