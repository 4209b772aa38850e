"""A change of basis: a tap's inputs divided by s, its weights' columns multiplied by it, with the layer's function unchanged.

With x the inputs of a tap, made by an op whose output channels can be scaled (:class:`quantcli.tensors.Absorber`)::

    W·x = (W·diag(s)) · (diag(1/s)·x)        columns of every weight that reads x, times s
    x/s                                      rows of the op that makes x, and its bias, over s

A norm's weight keeps its stored dtype. Rounding it would change the function, so it is rounded first and s is computed from the result:
w′ = round(w/s), s = w/w′. The weights that are multiplied by s are float32 until they are quantized. Other tensors that stay dense (a
bias, a linear that a rule keeps) are rounded to their own dtype, as when they were published.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantcli import qtypes
from quantcli.tensors import Absorber, Layer, Scheme, Stats, ordered_sum, output_error

SAMPLED_ROWS = 256
"""Rows of a tap's weights that a search uses: enough to rank scales that all rows share, whatever the size of the matrices."""


def shared(values: Tensor, absorber: Absorber, reduce: str) -> Tensor:
    """``values`` [in] reduced ("mean", "amax") to one value for all inputs that one channel of ``absorber`` makes."""
    channel = absorber.channel.to(values.device)
    pooled = torch.zeros(int(channel.max()) + 1, dtype=values.dtype, device=values.device)
    return pooled.scatter_reduce(0, channel, values, reduce, include_self=False)[channel]


def fold(layer: Layer, tap: str, s: Tensor) -> Tensor:
    """Change the basis of ``tap``, and of the taps that share its absorber, by about ``s``.

    ``s``: [in] above zero, the same where one channel of the absorber makes several inputs. Edits ``layer.tensors`` and ``layer.scales``;
    returns the s [in] float64 that was folded.
    """
    absorber, taps = layer.absorbers[tap], layer.absorbers[tap].taps(tap)
    tensors = {name: layer.tensors[name] for name in absorber.names}
    s = s.to(tensors[absorber.names[0]].device, torch.float64)
    if tensors[absorber.names[0]].ndim == 1:
        s = attainable(tensors[absorber.names[0]], absorber, s)
    for name, tensor in tensors.items():
        over = torch.ones(len(tensor), dtype=s.dtype, device=s.device).index_put((absorber.channel.to(s.device),), s)
        offset = absorber.offset if name == absorber.names[0] else 0.0
        layer.tensors[name] = _scaled(layer, name, tensor, (1 / over).view(-1, *[1] * (tensor.ndim - 1)), offset)
    for name in (name for name, read in layer.taps.items() if read in taps):
        layer.tensors[name] = _scaled(layer, name, layer.tensors[name], s)
    layer.scales |= {each: s * layer.scales.get(each, 1.0) for each in taps}
    return s


def attainable(weight: Tensor, absorber: Absorber, s: Tensor) -> Tensor:
    """The scales nearest to ``s`` [in] by which a norm's ``weight`` can be divided in its own dtype; 1 where that holds no quotient."""
    channel = absorber.channel.to(s.device)
    w = weight.double()[channel] + absorber.offset
    quotient = (w / s - absorber.offset).to(weight.dtype).double() + absorber.offset
    exact = w / quotient
    return torch.where(torch.isfinite(exact) & (exact > 0), exact, 1.0)


def _scaled(layer: Layer, name: str, tensor: Tensor, factor: Tensor, offset: float = 0.0) -> Tensor:
    """(``tensor`` + offset)·factor − offset: in float32 or better if it is to be quantized, in its own dtype if it stays dense."""
    wide = torch.promote_types(tensor.dtype, torch.float32)
    if tensor.ndim == 1:  # a norm or a bias: few numbers
        return ((tensor.double() + offset) * factor - offset).to(tensor.dtype)
    return (tensor.to(wide) * factor.to(wide)).to(wide if name in layer.schemes or name in layer.deferred else tensor.dtype)


def rescaled(stats: Stats, s: Tensor) -> Stats:
    """The statistics of inputs divided by ``s`` [in]; without a histogram, which cannot be rescaled."""
    s = s.to(stats.importance.device, torch.float32)
    H, dXXT = (None if M is None else M / s / s[:, None] for M in (stats.H, stats.dXXT))
    fourth = None if stats.fourth is None else stats.fourth / s.square().square()
    scaled = replace(stats, importance=stats.importance / s.square(), absmax=stats.absmax / s, mean=stats.mean / s)
    return replace(scaled, H=H, fourth=fourth, dXXT=dXXT, histogram=None)


def on(stats: Stats, device: torch.device) -> Stats:
    """``stats`` on ``device``."""
    H = None if stats.H is None else stats.H.to(device, torch.float32)
    return replace(stats, importance=stats.importance.to(device), absmax=stats.absmax.to(device), mean=stats.mean.to(device), H=H)


@dataclass(frozen=True, slots=True)
class Read:
    """What a search for scales reads of one tap. ``Ws``: rows of its weights [n, in] float32 by scheme; ``stats``: of its inputs, on the
    weights' device; ``share``: its tokens divided by the most tokens of a tap with the same scales, 1 where there is no other."""

    Ws: Mapping[Scheme, list[Tensor]]
    stats: Stats
    share: float = 1.0


def reads(layer: Layer, tap: str, stats: Mapping[str, Stats]) -> list[Read]:
    """The taps that share the scales of ``tap``, except those without tokens. Their losses times their shares add up to that of all tokens.

    :data:`SAMPLED_ROWS` are spread over all of them, so that many experts cost about as much as one; of each matrix there is at least one
    row.
    """
    names = {each: members for each in layer.absorbers[tap].taps(tap) if (members := to_quantize(layer, each)) and each in stats}
    known = {each: stats[each] for each in names}
    seen = {each: one for each, one in known.items() if one.n_tokens} or {tap: known[tap]}
    among = [name for each in seen for name in names[each]]
    most = max(1, *(one.n_tokens for one in seen.values()))
    device = layer.tensors[among[0]].device
    return [Read(sampled(layer, names[each], among=among), on(one, device), one.n_tokens / most) for each, one in seen.items()]


def to_quantize(layer: Layer, tap: str) -> list[str]:
    """The tensors that read ``tap`` and are quantized, now or by later passes."""
    return [name for name in (*layer.schemes, *layer.deferred) if layer.taps.get(name) == tap]


def sampled(layer: Layer, names: Sequence[str], *, among: Sequence[str] = ()) -> dict[Scheme, list[Tensor]]:
    """Rows of the weights ``names`` by scheme, float32: theirs of about :data:`SAMPLED_ROWS` rows spread evenly over ``among`` (``names``
    where it is empty)."""
    step = max(1, sum(len(layer.tensors[name]) for name in among or names) // SAMPLED_ROWS)
    schemes, Ws = layer.schemes | layer.deferred, dict[Scheme, list[Tensor]]()
    for name in names:
        Ws.setdefault(schemes[name], []).append(layer.tensors[name][::step].float().contiguous())
    return Ws


def rounding_error(Ws: Mapping[Scheme, list[Tensor]], s: Tensor, importance: Tensor, H: Tensor) -> Tensor:
    """A number, float64 on the weights' device: the mean over tokens of ‖(W − Ŵ·diag(1/s))·x‖² over all ``Ws``, the weights [out, in] of
    one tap by scheme, quantized in the basis ``s``.

    The trace of E·H·Eᵀ: no activation is stored. ``H`` [in, in] (or a diagonal [in]), ``importance`` [in]: in the calibration's basis.
    """
    total = torch.zeros((), dtype=torch.float64, device=s.device)
    for scheme, weights in Ws.items():
        E = torch.cat(qtypes.of(scheme.qtype).errors_in(s, weights, scheme, importance / s.square()))
        total += ordered_sum(E.square() @ H) if H.ndim == 1 else output_error(E, H)
    return total


def notes(layer: Layer, tap: str, method: str) -> tuple[str, ...]:
    """A note for a tap whose basis ``method`` could not change."""
    return () if tap in layer.absorbers else (f"{method}: nothing that makes its inputs can absorb a scale; they stay as they are",)
