"""Evaluation: perplexity, KL divergence, top-1 agreement and the error of each layer, for any checkpoint, layer by layer.

Where an engine rounds what its linears read (W8A8 and its like), so does the walk: the figures are those of the model as it is run.
A model and its baseline go side by side: layer i of one, layer i of the other. Memory: one layer, the hidden states of the windows of both
models in float32 (at most ``MAX_HIDDEN_BYTES``; more windows take more walks), and the logits of one batch of tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantcli import qtypes
from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.errors import CheckpointError, NumericsError, RecipeError, UnsupportedError
from quantcli.forward import Forward, HiddenStates
from quantcli.ops import round_cache, round_inputs
from quantcli.ops.activations import STATIC
from quantcli.planning.arrange import open_forward
from quantcli.tensors import Scheme, ordered_sum

MAX_HIDDEN_BYTES = 4 << 30

LOGITS_AT_ONCE = 1 << 23
"""Logits of one model that are held at a time; their softmax is taken in float64."""

SIMULATED, AS_THEY_ARE = "simulated", "none"


@dataclass(frozen=True, slots=True)
class LayerWalked:
    """All windows of one walk have gone through one layer. ``relative_error``: ‖h−ĥ‖² / ‖h‖² of its output, with a baseline."""

    name: str
    index: int
    n_layers: int
    relative_error: float | None
    seconds: float


@dataclass(frozen=True, slots=True)
class Scores:
    """What an evaluation found; natural logarithms throughout.

    ``perplexity_stderr`` is perplexity · (standard error of the mean negative log-likelihood over tokens), as llama.cpp states it.
    ``n_tokens``: predicted tokens. ``activations``: :data:`SIMULATED` when linears read what their engine would round their inputs to,
    else :data:`AS_THEY_ARE`; ``not_simulated``: the quantized tensors whose inputs could not be
    reached, and the attentions whose cache could not. ``n_bytes``, ``bpw``: of the model's tensors, where the caller knows them. With a
    baseline: ``kld_*`` is
    KL(baseline ‖ model) over every position, ``top1_agreement`` the share of positions where both hold the same token for the likeliest,
    ``layer_errors`` name → relative error of the hidden states. A model that predicts no next token (an encoder, a classifier, an
    embedding model) has these errors alone; the other figures are None, and ``n_tokens`` counts the tokens read.
    """

    perplexity: float | None
    perplexity_stderr: float | None
    n_tokens: int
    seq_len: int
    activations: str = AS_THEY_ARE
    not_simulated: tuple[str, ...] = ()
    baseline_perplexity: float | None = None
    kld_mean: float | None = None
    kld_p99: float | None = None
    kld_max: float | None = None
    top1_agreement: float | None = None
    n_bytes: int | None = None
    bpw: float | None = None
    layer_errors: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The keys of ``quantcli eval --json``."""
        keys = ["perplexity", "perplexity_stderr", "n_tokens", "seq_len", "activations"]
        data: dict[str, Any] = {key: getattr(self, key) for key in keys}
        data |= {key: value for key, value in (("n_bytes", self.n_bytes), ("bpw", self.bpw)) if value is not None}
        if self.baseline_perplexity is None and not self.layer_errors:
            return data
        keys = ["baseline_perplexity", "kld_mean", "kld_p99", "kld_max", "top1_agreement"]
        data |= {key: getattr(self, key) for key in keys}
        return data | {"layers": [{"name": name, "relative_error": error} for name, error in self.layer_errors.items()]}


def perplexity(checkpoint: Checkpoint, ids: Tensor, *, device: str = "cpu", activations: bool = True) -> Scores:
    """Scores of ``checkpoint`` on token windows ``ids``: [n, T] int64; each predicts its tokens 1 … T−1."""
    return _last(evaluate(checkpoint, ids, device=device, activations=activations))


def compare(checkpoint: Checkpoint, baseline: Checkpoint, ids: Tensor, *, device: str = "cpu", activations: bool = True) -> Scores:
    """Scores of ``checkpoint`` against ``baseline`` on token windows ``ids``: [n, T] int64."""
    return _last(evaluate(checkpoint, ids, baseline=baseline, device=device, activations=activations))


def evaluate(
    checkpoint: Checkpoint, ids: Tensor, *, baseline: Checkpoint | None = None, device: str = "cpu", activations: bool = True
) -> Iterator[LayerWalked | Scores]:
    """The walk behind :func:`perplexity` and :func:`compare`: an event for each layer, the scores last.

    ``activations``: round what quantized linears read as their engines do; False leaves the weights' loss alone.
    """
    if ids.shape[1] < 2:
        raise RecipeError(f"windows of {ids.shape[1]} token leave nothing to predict; give a longer text or --seq-len")
    models = [open_forward(source, device=device) for source in (checkpoint, baseline) if source is not None]
    if len(models) == 2:
        _check_alike(*models)
    predicts = models[0].predicts
    if not predicts and baseline is None:
        raise UnsupportedError(
            f"{checkpoint.source}: {models[0].model_class} predicts no next token, so it has no perplexity; give --baseline, the model it "
            "was made from, to compare what their layers make"
        )
    left = [simulate(model) for model in models] if activations else [()]
    simulated = activations and len(left[0]) < len(rounded_inputs(checkpoint)) + len(checkpoint.kv_cache)
    tally = _Tally()
    groups = _groups(ids, models[0].hidden_size * len(models))
    n_layers = len(models[0].layers)
    for g, group in enumerate(groups):
        walked = [HiddenStates.embed(model, group) for model in models]
        for i, name in enumerate(models[0].layers):
            started = time.perf_counter()
            for model, states in zip(models, walked, strict=True):
                with model.layer(i) as layer:
                    states.advance(layer)
            error = tally.add_layer(name, *(a.hidden for a in walked))
            yield LayerWalked(name, g * n_layers + i, len(groups) * n_layers, error, time.perf_counter() - started)
        for model, states in zip(models, walked, strict=True):
            states.hidden = states.hidden.to(model.device)
        if predicts:
            _score(tally, models, walked)
    found = tally.scores(ids.shape[1]) if predicts else Scores(None, None, ids.numel(), ids.shape[1], layer_errors=tally.layer_errors())
    yield replace(found, activations=SIMULATED if simulated else AS_THEY_ARE, not_simulated=left[0])


def rounded_inputs(checkpoint: Checkpoint) -> dict[str, str]:
    """The weights whose engine rounds what their linear reads → how (``act`` of :func:`quantcli.ops.round_inputs`)."""
    acts = {name: engine_act(scheme) for name, scheme in checkpoint.schemes.items()}
    return {name: act for name, act in acts.items() if act}


def engine_act(scheme: Scheme) -> str:
    """How the engine of ``scheme`` rounds inputs; "" where it takes them as they are."""
    return str(scheme.get("act") or qtypes.of(scheme.qtype).engine_act)


def simulate(model: Forward) -> tuple[str, ...]:
    """Have ``model`` read inputs, keys and values as its engine rounds them.

    Returns the weights whose inputs it cannot reach (experts that run fused), and the attention modules whose cache it cannot.
    """
    checkpoint = model.checkpoint
    wanted = {name: act for name, act in rounded_inputs(checkpoint).items() if name not in model.unused}
    left = [name for name, act in wanted.items() if not model.on_read(name, _Rounding(checkpoint, name, act))]
    caches = checkpoint.kv_cache.items()
    return (*left, *(name for name, word in caches if not model.on_cache(name, _CacheRounding(checkpoint, name, word))))


class _Rounding:
    """What the engine of the weight ``name`` makes of X; the scale that the file has for it is read when it is first needed."""

    def __init__(self, checkpoint: Checkpoint, name: str, act: str) -> None:
        self._checkpoint = checkpoint
        self._name = name
        self._act = act
        self._scale: Tensor | None = None

    def __call__(self, X: Tensor) -> Tensor:
        if self._scale is None and self._act in STATIC:
            self._scale = self._checkpoint.quantized(self._name).parts["input_scale"].to(X.device)
        return round_inputs(X, self._act, self._scale)


class _CacheRounding:
    """What the module ``attention`` gets back of its keys and values from the engine's cache; the scales are read when first needed."""

    def __init__(self, checkpoint: Checkpoint, attention: str, word: str) -> None:
        self._checkpoint = checkpoint
        self._attention = attention
        self._word = word
        self._scales: tuple[Tensor, Tensor] | None = None

    def __call__(self, K: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
        if self._scales is None:
            k, v = self._checkpoint.cache_scales(self._attention)
            n = K.shape[1] if self._word.endswith("-head") else 1
            if (len(k), len(v)) != (n, n):
                got = f"{len(k)} scales of keys and {len(v)} of values"
                raise CheckpointError(f"{self._attention}: {got} for its cache; {self._word} has {n} of each")
            self._scales = k.to(K.device), v.to(V.device)
        return round_cache(K, self._word, self._scales[0]), round_cache(V, self._word, self._scales[1])


class _Tally:
    """What the batches add up to: values of each token on the CPU in float64 (24 bytes a token)."""

    def __init__(self) -> None:
        self.nll: list[Tensor] = []
        self.baseline_nll: list[Tensor] = []
        self.kld: list[Tensor] = []
        self.n_agreed = 0
        self.layers: dict[str, tuple[float, float]] = {}  # ‖h−ĥ‖², ‖h‖²

    def add_layer(self, name: str, hidden: Tensor, baseline: Tensor | None = None) -> float | None:
        if baseline is None:
            return None
        error, total = self.layers.get(name, (0.0, 0.0))
        for h, b in zip(hidden, baseline, strict=True):  # window by window: no third copy of the hidden states
            error += float(ordered_sum((h - b).square()))
            total += float(ordered_sum(b.square()))
        self.layers[name] = (error, total)
        return error / total if total else float(error > 0)

    def add_tokens(self, logp: Tensor, targets: Tensor, baseline: Tensor | None = None) -> None:
        """Log-probabilities [n, vocab] float64 of the positions before ``targets`` [k]: k is n, or n − 1 at the end of a window."""
        k = len(targets)
        self.nll.append(-logp[:k].gather(1, targets[:, None])[:, 0].cpu())
        if baseline is None:
            return
        self.baseline_nll.append(-baseline[:k].gather(1, targets[:, None])[:, 0].cpu())
        p = baseline.exp()
        terms = torch.where(p > 0, p * (baseline - logp), 0.0)
        self.kld.append(terms.sum(1).clamp_(min=0).cpu())
        self.n_agreed += int((logp.argmax(1) == baseline.argmax(1)).sum())

    def layer_errors(self) -> dict[str, float]:
        """Layer → ‖h−ĥ‖² / ‖h‖² of its output."""
        return {name: error / total if total else float(error > 0) for name, (error, total) in self.layers.items()}

    def scores(self, seq_len: int) -> Scores:
        nll = torch.cat(self.nll)
        value = float(nll.mean().exp())
        stderr = value * float(nll.std()) / math.sqrt(len(nll)) if len(nll) > 1 else math.nan
        if not self.kld:
            return Scores(value, stderr, len(nll), seq_len)
        kld = torch.cat(self.kld).numpy()
        return Scores(
            value,
            stderr,
            len(nll),
            seq_len,
            baseline_perplexity=float(torch.cat(self.baseline_nll).mean().exp()),
            kld_mean=float(kld.mean()),
            kld_p99=float(np.quantile(kld, 0.99)),
            kld_max=float(kld.max()),
            top1_agreement=self.n_agreed / len(kld),
            layer_errors=self.layer_errors(),
        )


def _score(tally: _Tally, models: list[Forward], walked: list[HiddenStates]) -> None:
    """Logits of every position, a batch of tokens at a time, into ``tally``."""
    step = max(1, LOGITS_AT_ONCE // models[0].vocab_size)
    for i, ids in enumerate(walked[0].ids):
        for t in range(0, len(ids), step):
            logp = [_log_probabilities(m, a.hidden[i : i + 1, t : t + step]) for m, a in zip(models, walked, strict=True)]
            tally.add_tokens(logp[0], ids[t + 1 : t + 1 + step].to(models[0].device), *logp[1:])


def _log_probabilities(model: Forward, hidden: Tensor) -> Tensor:
    """[n, vocab] float64 of ``hidden`` [1, n, hidden]. Raises :class:`NumericsError` for NaN."""
    logits = model.head(hidden)[0]
    if logits.isnan().any():
        raise NumericsError(f"{model.checkpoint.source}: logits have NaN; check the output embedding and the final norm")
    return torch.log_softmax(logits.double(), -1)


def _groups(ids: Tensor, width: int) -> list[Tensor]:
    """Windows [n, T] in groups whose hidden states, ``width`` floats a token, fit into MAX_HIDDEN_BYTES."""
    size = max(1, MAX_HIDDEN_BYTES // (4 * width * ids.shape[1]))
    return list(ids.split(size))


def _check_alike(model: Forward, baseline: Forward) -> None:
    """A model and its baseline have the same layers and vocabulary, and the same use for them."""
    for what in ("layers", "hidden_size", "vocab_size", "predicts"):
        got, expected = (len(v) if isinstance(v := getattr(m, what), tuple) else v for m in (model, baseline))
        if got != expected:
            raise RecipeError(
                f"{model.checkpoint.source} cannot be compared with {baseline.checkpoint.source}: {what} is {got} in the one and "
                f"{expected} in the other; give the model it was made from as --baseline"
            )


def _last(events: Iterator[LayerWalked | Scores]) -> Scores:
    *_, scores = events
    assert isinstance(scores, Scores)
    return scores
