"""The check of a source against what its architecture promises: names, shapes, dtypes and vocabulary, from headers alone.

What transformers' own model of the config needs is the truth where transformers knows the model; elsewhere its layers must agree with each
other. It runs before any work on a source, and on every output before that has its name. A GGUF source is held against its metadata by its
reader (:mod:`quantcli.formats.gguf.model.expected`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli import archs, formats
from quantcli.checkpoint import views
from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.errors import CheckpointError, QuantcliError, UnsupportedError
from quantcli.formats.gguf.model.naming import OTHER_PARTS
from quantcli.planning import siblings
from quantcli.planning.leftovers import told_by
from quantcli.planning.schemes import listed
from quantcli.planning.vocabulary import Tokens, tokens_of
from quantcli.tensors import DTYPES, TensorSpec

if TYPE_CHECKING:
    from quantcli.forward import Promise

HARMLESS = re.compile(r"rotary_emb\.|inv_freq$|\.(attn|attention)\.(masked_)?bias$|(^|\.)mtp\.|position_ids$")
"""In the names of what files have and models make themselves, and of heads that predict further tokens."""

EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|tok_embeddings)\.weight")


@dataclass(frozen=True, slots=True)
class Finding:
    """What is wrong with a source, in a sentence; ``is_error``: so that no work may begin; ``is_of_config``: unless the output is a GGUF
    file, which has no config.json."""

    text: str
    is_error: bool = True
    is_of_config: bool = False


def check(checkpoint: Checkpoint, *, takes_config: bool = True) -> tuple[str, ...]:
    """Warnings about ``checkpoint``; :class:`CheckpointError` where it is not what its architecture promises.

    ``takes_config``: the model is run, or handed on with its config.json.
    """
    found = look(checkpoint)
    errors = [finding.text for finding in found if finding.is_error and (takes_config or not finding.is_of_config)]
    if errors:
        more = f"; quantcli inspect lists {len(errors) - 1} more" if errors[1:] else ""
        raise CheckpointError(f"{checkpoint.source}: {errors[0]}{more}")
    return tuple(finding.text for finding in found)


def check_output(format: str, path: Path) -> None:
    """Read the finished output at ``path`` as any verb would, headers only, and hold it to the same check.

    Raises :class:`CheckpointError` for an output that quantcli itself would refuse.
    """
    try:
        with formats.of(format).read(path) as written:
            errors = [finding.text for finding in look(written, is_read_back=True) if finding.is_error]
    except QuantcliError as error:
        errors = [str(error)]
    if errors:
        raise CheckpointError(f"the output would be refused when it is read back: {errors[0]}; nothing is written, please report this")


def look(checkpoint: Checkpoint, *, is_read_back: bool = False) -> list[Finding]:
    """Everything that is to be said against ``checkpoint``, the causes first. ``is_read_back``: it is an output, made of a source that was
    checked: of a GGUF file, too, more is asked than what its reader does."""
    if checkpoint.kind == "gguf" and not is_read_back:
        return []
    config = {**checkpoint.config, **(_object(checkpoint.config.get("text_config")))}
    n_layers, n_tensors = config.get("num_hidden_layers"), len(checkpoint.specs)
    if isinstance(n_layers, int) and n_layers > n_tensors:
        return [Finding(f"config.json tells of {n_layers} layers, the checkpoint has {n_tensors} tensors in all")]
    from quantcli.forward import promise  # transformers takes seconds to import

    try:
        promised = promise(checkpoint, views.experts_apart(checkpoint))
    except UnsupportedError:
        return list(_by_itself(checkpoint, config, is_read_back=is_read_back))
    except CheckpointError as error:
        cause = told_by(checkpoint, list(checkpoint.specs))
        return [Finding(cause or str(error).removeprefix(f"{checkpoint.source}: "))]
    if (cause := told_by(checkpoint, list(promised.surplus))) is not None:
        return [Finding(cause)]
    found = list(_codes(checkpoint, sorted(promised.floats)))
    if found:
        return found  # what they say of names and shapes follows from that
    found += _vocabulary(checkpoint, promised.embedding, promised.misshapen, config, is_read_back=is_read_back)
    found += _padding(promised.embedding, checkpoint, config)
    found += _missing(checkpoint, promised, config)
    found += _shapes(promised)
    return found + list(_surplus(checkpoint, promised, config))


def _by_itself(checkpoint: Checkpoint, config: Mapping[str, Any], *, is_read_back: bool) -> Iterator[Finding]:
    """What can be said of a model that transformers does not know."""
    if (cause := told_by(checkpoint, list(checkpoint.specs))) is not None:
        yield Finding(cause)
        return
    if "gguf_architecture" in checkpoint.config:
        return
    yield from _codes(checkpoint, [name for name, spec in checkpoint.specs.items() if len(spec.shape) > 1 and name.endswith(".weight")])
    embeddings = [name for name, spec in checkpoint.specs.items() if EMBEDDING.search(name) and len(spec.shape) == 2]
    yield from _vocabulary(checkpoint, embeddings[0] if len(embeddings) == 1 else None, {}, config, is_read_back=is_read_back)
    yield from map(Finding, siblings.disagreements(checkpoint.specs, config))


def _codes(checkpoint: Checkpoint, floats: Sequence[str]) -> Iterator[Finding]:
    """Tensors of ``floats``, which are numbers in the model, that are codes in the file (whole, or of 8 bits) without a scheme for them."""
    coded = [name for name in floats if name in checkpoint.specs and _is_coded(checkpoint, checkpoint.specs[name])]
    if coded:
        spec = checkpoint.specs[coded[0]]
        if DTYPES[spec.dtype].is_floating_point:
            what, of = "weights of 16 or 32 bits", "FP8: F8 with a scale beside each weight"
        else:
            what, of = "floating-point weights", "bitsandbytes: U8 or I8"
        yield Finding(
            f"{listed(coded)}: {spec.dtype} {list(spec.shape)} where the model has {what}: codes of a quantized model "
            f"({of}) whose quantization_config is lost; save the model dequantized, or merge into the 16-bit model"
        )


def _is_coded(checkpoint: Checkpoint, spec: TensorSpec) -> bool:
    dtype = DTYPES.get(spec.dtype)
    return spec.name not in checkpoint.schemes and dtype is not None and (not dtype.is_floating_point or dtype.itemsize == 1)


def _missing(checkpoint: Checkpoint, promised: Promise, config: Mapping[str, Any]) -> Iterator[Finding]:
    """Tensors that the config promises and the checkpoint lacks; whole layers as one."""
    missing = dict(promised.missing)
    if not missing:
        return
    has = {stack: set(layers) for stack, layers in siblings.layers_of(checkpoint.specs).items()}
    for name in list(missing):
        if (match := siblings.IN_LAYER.match(name)) and (layers := has.get(match["stack"])) and int(match["number"]) not in layers:
            n = config.get("num_hidden_layers")
            yield Finding(
                f"{name} is missing, as all of layer {match['number']}: config.json says num_hidden_layers {n}, and the checkpoint has "
                f"{len(layers)} layers in {match['stack']}"
            )
            return
    first = next(iter(missing))
    hint = "; where the head shares the embedding, config.json must say tie_word_embeddings" if first == views.HEAD_WEIGHT else ""
    surplus = promised.surplus
    instead = f"; it has {surplus[0]}, which the model has no use for" if surplus and not hint else ""
    yield Finding(
        f"{listed(list(missing))} (shape {list(missing[first])}) is missing, which config.json promises: {promised.model}{hint}{instead}"
    )


def _shapes(promised: Promise) -> Iterator[Finding]:
    """Tensors of other shapes than the config gives them."""
    rows = promised.misshapen.get(promised.embedding or "")  # which the output embedding has, too
    misshapen = {name: shapes for name, shapes in promised.misshapen.items() if name != promised.embedding and shapes != rows}
    if not misshapen:
        return
    name, (got, wanted) = next(iter(misshapen.items()))
    more = f" (and {len(misshapen) - 1} more)" if len(misshapen) > 1 else ""
    reason = f"; {siblings.EMPTY}" if 0 in got else ", which does not fit its heads, widths or experts"
    yield Finding(f"{name}{more} has shape {list(got)}, config.json gives {list(wanted)}{reason}")


def _surplus(checkpoint: Checkpoint, promised: Promise, config: Mapping[str, Any]) -> Iterator[Finding]:
    """Tensors that the model has no use for: layers beyond the config's, parts that it denies, and what transformers would leave out."""
    predicting = _predicting(checkpoint, config)
    surplus = [name for name in promised.surplus if not HARMLESS.search(name) and not name.startswith(predicting)]
    if beyond := layers_beyond(checkpoint, surplus, config):
        yield Finding(
            f"{listed(beyond)}: of a layer after the {config.get('num_hidden_layers')} that config.json tells of (num_hidden_layers): "
            "raise that where the layers belong to the model, or remove their tensors"
        )
        return
    arch = archs.of(checkpoint.config)
    if arch is not None and (denied := [name for name in surplus if arch.gguf_name(name) is not None]):
        yield Finding(
            f"{listed(denied)} is part of a {checkpoint.config.get('model_type')} model, but not of the one that config.json tells of; "
            "correct config.json, or remove the tensors"
        )
        return
    if rest := [name for name in surplus if not OTHER_PARTS.search(name)]:
        yield Finding(f"{listed(rest)}: no tensor of {promised.model}; transformers does not use it", is_error=False)


def layers_beyond(checkpoint: Checkpoint, surplus: Sequence[str], config: Mapping[str, Any]) -> list[str]:
    """Those of ``surplus`` in decoder layers after the last one that config.json tells of."""
    n = config.get("num_hidden_layers")
    if not isinstance(n, int):
        return []
    inner = {stack for stack, layers in siblings.layers_of(checkpoint.specs).items() if len(layers) >= n}
    matches = (siblings.IN_LAYER.match(name) for name in surplus)
    return sorted(match[0] for match in matches if match and match["stack"] in inner and int(match["number"]) >= n)


def _predicting(checkpoint: Checkpoint, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Beginnings of the names of layers after the others that predict further tokens: as many as config.json counts, each with the
    projection of a hidden state and an embedding that makes it one."""
    n, n_further = config.get("num_hidden_layers"), config.get("num_nextn_predict_layers")
    if not isinstance(n, int) or not isinstance(n_further, int):
        return ()
    matches = (siblings.IN_LAYER.match(name) for name in checkpoint.specs if name.endswith(".eh_proj.weight"))
    return tuple(f"{m['stack']}.{m['number']}." for m in matches if m and n <= int(m["number"]) < n + n_further)


def _vocabulary(
    checkpoint: Checkpoint,
    embedding: str | None,
    misshapen: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]],
    config: Mapping[str, Any],
    *,
    is_read_back: bool,
) -> Iterator[Finding]:
    """Rows of the embedding, config.json's vocab_size, and the tokenizer."""
    if embedding is None:
        return
    n_rows, n_said = checkpoint.specs[embedding].shape[0], config.get("vocab_size")
    tokens = tokens_of(checkpoint.path) if checkpoint.path.is_dir() and not is_read_back else Tokens({}, frozenset())
    known = f"the tokenizer has {tokens.size} tokens" if tokens.texts else "there is no tokenizer"
    if embedding in misshapen:
        got, wanted = misshapen[embedding]
        if got[1:] != wanted[1:]:
            yield Finding(f"{embedding} has shape {list(got)}, config.json gives {list(wanted)}")
            return
        advice = (
            f"set vocab_size to {n_rows}" if tokens.size <= n_rows else "take config.json, weights and tokenizer of one and the same save"
        )
        yield Finding(f"{embedding} has {n_rows} rows, config.json says vocab_size {n_said}, and {known}; {advice}")
        return
    beyond = tokens.beyond(n_rows)
    ordinary = [id for id in beyond if id in tokens.ordinary]
    if ordinary:
        first = ordinary[0]
        yield Finding(
            f"the tokenizer's {tokens.texts[first]!r} has id {first}, of {tokens.size} tokens, and {embedding} has {n_rows} rows "
            f"(vocab_size {n_said}): resize it with resize_token_embeddings, or take the tokenizer that the model was trained with"
        )
    elif beyond:
        texts = ", ".join(tokens.texts[id] for id in beyond[:5])
        yield Finding(
            f"{len(beyond)} special tokens of the tokenizer are beyond the {n_rows} rows of {embedding} and cannot be used: {texts}",
            is_error=False,
        )


def _padding(embedding: str | None, checkpoint: Checkpoint, config: Mapping[str, Any]) -> Iterator[Finding]:
    """A padding token without a row, with which transformers does not even build the model."""
    pad, n_rows = config.get("pad_token_id"), 0 if embedding is None else checkpoint.specs[embedding].shape[0]
    if n_rows and isinstance(pad, int) and not -n_rows <= pad < n_rows:
        yield Finding(
            f"config.json's pad_token_id {pad} is beyond the {n_rows} rows of {embedding}, and transformers loads no such model: set it to "
            "null, or to a token that has a row",
            is_of_config=True,
        )


def _object(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
