"""ggml's code books in torch: what all types of a code book do (:mod:`quantcli.ops.block_iq2_iq3` has each one's layout).

Magnitudes of a run of 4 or 8 weights are a point of a code book; the search works on odd numbers 2·level + 1 in their place. Here a lane is
a sub-block, and a run takes the first nearest of ggml's whole list of its cell: the compiled codecs look at a part of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from gguf import quants
from torch import Tensor

from quantcli.ops.block_search import (
    Found,
    Kind,
    Params,
    from_half,
    nearest_int,
    ordered_sum,
    ratio,
    spacing,
    square_root,
    to_half,
)

LARGEST = torch.finfo(torch.float32).max
NO_SCALE = 0x7E00
"""NaN as a half: what a block gets for which ggml finds no neighbour, or no scale that is a number, and aborts."""


@dataclass(frozen=True)
class CodeBook:
    """A code book and ggml's lists of neighbours (iq2xs_init_impl, iq3xs_init_impl), made from the gguf package's table of ``name``.

    ``n_levels``: levels on each axis; ``n_distances``: how many of the smallest distances from a cell its list has. A cell is any run of
    levels, numbered Σ level[i]·n_levelsⁱ.
    """

    name: str
    n_levels: int
    n_distances: int

    @cached_property
    def levels(self) -> Tensor:
        """[n_points, run] int32."""
        table = getattr(quants, self.name)
        table.init_grid()
        magnitudes = np.asarray(table.grid).reshape(table.grid.shape[-2:])
        return torch.from_numpy(np.searchsorted(np.asarray(table.grid_map), magnitudes)).int()

    @property
    def run(self) -> int:
        return self.levels.shape[1]

    def cell(self, levels: Tensor) -> Tensor:
        """The number of the cell of ``levels`` [run, …]."""
        number = torch.zeros_like(levels[0])
        for level in levels.flip(0):
            number = number * self.n_levels + level
        return number

    @cached_property
    def lists(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """start, length [n_cells] and is_point [n_cells] of each cell's list, and the points of all lists, nearest first."""
        numbers = torch.arange(self.n_levels**self.run)
        cells = torch.stack([numbers // self.n_levels**axis % self.n_levels for axis in range(self.run)], 1)
        distance = torch.cdist(cells.double(), self.levels.double()).square().round().int()  # [n_cells, n_points]
        limit = distance.amin(1, keepdim=True)
        is_point = limit[:, 0] == 0
        for _ in range(self.n_distances - 1):
            limit = torch.where(distance > limit, distance, distance.max() + 1).amin(1, keepdim=True)
        limit[is_point] = 0
        cell, point = (distance <= limit).nonzero(as_tuple=True)
        order = np.lexsort((point.numpy(), distance[cell, point].numpy(), cell.numpy()))
        length = torch.bincount(cell, minlength=len(cells))
        return length.cumsum(0) - length, length, is_point, point[torch.from_numpy(order)]

    def index(self, levels: Tensor) -> Tensor:
        """The point at ``levels`` [run, …], or else the one nearest to them."""
        start, _, _, points = (part.to(levels.device) for part in self.lists)
        return points[start[self.cell(levels).long()]].int()

    def nearest(self, cell: Tensor, x: Tensor, root: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """The first point of least Σ root·(scale·q − x)² in each cell's list, and where there is none.

        ``cell``: [runs, n]; ``x``, ``root``: [runs, run, n]; ``scale``: [n]. Returns points, is_lost: [runs, n].
        """
        start, length, is_point, points = (part.to(cell.device) for part in self.lists)
        flat = cell.flatten().long()
        n = length[flat]
        item = torch.arange(len(flat), device=cell.device).repeat_interleave(n)
        pair = torch.arange(len(item), device=cell.device)
        chosen = points[start[flat][item] + pair - (n.cumsum(0) - n)[item]]
        scales = scale.expand(cell.shape).flatten()[item]
        distance = torch.zeros_like(scales)
        for axis in range(self.run):
            diff = scales * (2 * self.levels.to(cell.device)[chosen, axis] + 1).float() - x[:, axis].flatten()[item]
            distance = distance + root[:, axis].flatten()[item] * diff * diff
        distance = torch.where(distance < LARGEST, distance, LARGEST)
        least = torch.full_like(flat, LARGEST, dtype=torch.float32).scatter_reduce(0, item, distance, "amin")
        is_best = (distance == least[item]) & ((distance < LARGEST) | is_point[flat][item])
        first = torch.full_like(flat, len(pair)).scatter_reduce(0, item, torch.where(is_best, pair, len(pair)), "amin")
        is_lost = first == len(pair)
        found = chosen[torch.where(is_lost, 0, first)]
        return found.int().view(cell.shape), is_lost.view(cell.shape)


@dataclass(slots=True)
class Sub:
    """Sub-blocks, one a lane: magnitudes, weights and √weights [sub, n]; ``live`` [n]: not all zero."""

    x: Tensor
    w: Tensor
    root: Tensor
    live: Tensor


def make_even(x: Tensor, sub: Tensor, w: Tensor, minus: Tensor) -> tuple[Tensor, Tensor]:
    """Of each eight weights with an odd number of minus signs the one of least w·x² takes the other sign: magnitudes, minus signs.

    ``x``, ``sub`` (magnitudes), ``w``, ``minus``: [8, …].
    """
    odd = minus.sum(0) % 2 == 1
    power = w * x * x
    least, at = power[0], torch.zeros_like(odd, dtype=torch.int64)
    for i in range(1, 8):
        less = power[i] < least
        least, at = torch.where(less, power[i], least), torch.where(less, i, at)
    place = torch.arange(8, device=x.device).view(8, *[1] * (x.ndim - 1))
    here = odd & (place == at)
    return torch.where(here, -sub, sub), minus ^ here


class GridType:
    """256 weights in sub-blocks with a 4-bit scale: w = ±step(d, scale)·magnitude; codes are magnitudes with their signs."""

    kind: Kind
    book: CodeBook
    width: int  # the odd number of the highest level
    step: float
    n_steps: int
    magnitudes: tuple[int, ...]
    fudge: float = 1.0
    even_signs: bool = False
    least_peak: float = 0.0
    refines: str = "off_points"  # the runs looked at again: off_points, all_if_any, all

    @classmethod
    def weights(cls, x: Tensor, importance: Tensor | None, power: Tensor) -> Tensor:
        """[sub, n] of sub-blocks ``x`` with their block's Σ x² [n]."""
        raise NotImplementedError

    @classmethod
    def search(cls, x: Tensor, importance: Tensor | None, power: Tensor | None) -> Found:
        n_subs, n = 256 // cls.kind.sub, x.shape[1]

        def by_subs(values: Tensor) -> Tensor:
            return values.view(n_subs, cls.kind.sub, n).transpose(0, 1).reshape(cls.kind.sub, -1)

        of_block = ordered_sum(x * x).repeat(n_subs)
        subs = by_subs(x)
        w = cls.weights(subs, None if importance is None else by_subs(importance), of_block)
        scale, points, minus, live, lost = cls.search_subs(subs, w)
        points = torch.where(live, points, 0).view(-1, n_subs, n).transpose(0, 1).reshape(-1, n)  # [256 / run, n]
        minus = (minus & live).view(-1, n_subs, n).transpose(0, 1).reshape(256, n)
        scale, live, lost = (part.view(n_subs, n) for part in (torch.where(lost, 0.0, scale), live, lost))
        params = cls.store_scales(scale)
        params.d = torch.where(lost.any(0), NO_SCALE, params.d)
        points, minus = cls.finish(points, minus, scale, live)
        none = torch.empty(0, device=x.device)
        return Found(params, none, none, codes=cls.expand(points, minus))

    @classmethod
    def search_subs(cls, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Of sub-blocks ``x`` [sub, n]: scale [n], points [runs, n], minus [sub, n], live and lost [n]."""
        minus, magnitude = x < 0, x.abs()
        if cls.even_signs:
            eights = [part.view(-1, 8, x.shape[1]).transpose(0, 1) for part in (x, magnitude, w, minus)]
            magnitude, minus = (part.transpose(0, 1).reshape(x.shape) for part in make_even(*eights))
        peak = magnitude[0]
        for row in magnitude[1:]:
            peak = torch.where(peak > row, peak, row)
        live = peak >= cls.least_peak if cls.least_peak else peak != 0
        sub = Sub(magnitude, w, square_root(w), live)
        reach, start = cls.start(sub, peak)
        scale, points, best_inverse, lost = cls.try_scales(sub, reach, start)
        scale, points, lost_again = cls.refine(sub, scale, points, best_inverse)
        minus = minus ^ (scale < 0)
        lost = sub.live & (lost | lost_again | scale.isnan())
        return torch.where(sub.live, scale.abs(), 0.0), points, minus, sub.live, lost

    @classmethod
    def start(cls, sub: Sub, peak: Tensor) -> tuple[Tensor, Tensor]:
        """What the trials' scales span, and the scale where none of them will do."""
        return peak, peak / cls.width

    @classmethod
    def cells(cls, sub: Sub, inverse: Tensor, live: Tensor) -> Tensor:
        """The cell of each run [runs, n] at 1/scale = ``inverse`` [n]; 0, which is a point, where not ``live``."""
        levels = nearest_int(0.5 * (inverse * sub.x - 1)).clamp(0, cls.book.n_levels - 1)
        return torch.where(live, cls.book.cell(levels.view(-1, cls.book.run, inverse.shape[0]).transpose(0, 1)), 0)

    @classmethod
    def nearest(cls, sub: Sub, cells: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Points [runs, n] of ``cells``, and which lanes found none [n]."""
        x, root = (part.view(-1, cls.book.run, scale.shape[0]) for part in (sub.x, sub.root))
        points, is_lost = cls.book.nearest(cells, x, root, scale)
        return points, is_lost.any(0)

    @classmethod
    def sums(cls, sub: Sub, points: Tensor) -> tuple[Tensor, Tensor]:
        q = (2 * cls.levels_of(points) + 1).float()
        return ordered_sum(sub.w * sub.x * q), ordered_sum(sub.w * q * q)

    @classmethod
    def levels_of(cls, points: Tensor) -> Tensor:
        """[runs, n] → [runs · run, n]."""
        return cls.book.levels.to(points.device)[points.long()].transpose(1, 2).reshape(-1, points.shape[1])

    @classmethod
    def try_scales(cls, sub: Sub, reach: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Scale, points, best inverse (0 where no trial would do), lost."""
        best, best_inverse = torch.zeros_like(scale), torch.zeros_like(scale)
        points = torch.zeros(len(sub.x) // cls.book.run, len(scale), dtype=torch.int32, device=scale.device)
        lost = torch.zeros_like(sub.live)
        reach = torch.where(sub.live, reach, 1.0)
        for trial in range(-cls.n_steps, cls.n_steps + 1):
            inverse = ratio(spacing(cls.width, 0.0, cls.step, trial), reach)
            found, is_lost = cls.nearest(sub, cls.cells(sub, inverse, sub.live), ratio(1, inverse))
            lost = lost | is_lost
            lx, l2 = cls.sums(sub, found)
            better = (l2 > 0) & (lx * lx > best * l2)
            scale = torch.where(better, lx / l2, scale)
            best = torch.where(better, scale * lx, best)
            best_inverse = torch.where(better, inverse, best_inverse)
            points = torch.where(better, found, points)
        return scale, points, best_inverse, lost

    @classmethod
    def refine(cls, sub: Sub, scale: Tensor, points: Tensor, best_inverse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scale, points, lost, with runs found once more at the best trial's scale."""
        settled = best_inverse != 0
        again = torch.ones_like(points, dtype=torch.bool)
        if cls.refines != "all":
            own = cls.book.cell(cls.levels_of(points).view(-1, cls.book.run, len(scale)).transpose(0, 1))
            again = settled & (cls.cells(sub, best_inverse, sub.live) != own)
        if cls.refines == "all_if_any":  # and where no trial would do, ggml counts no run as a point
            again = (again.any(0) | ~settled).expand(points.shape)
        some = sub.live & (scale > 0) & again.any(0)
        scale_used = torch.where(some, scale, 1.0)
        cells = torch.where(again, cls.cells(sub, ratio(1, scale_used), some), 0)
        found, lost = cls.nearest(sub, cells, scale_used)
        points = torch.where(some & again, found, points)
        lx, l2 = cls.sums(sub, points)
        return torch.where(some & (l2 > 0), lx / l2, scale), points, lost

    @classmethod
    def store_scales(cls, scale: Tensor) -> Params:
        d = ratio(scale.amax(0), 31)
        codes = nearest_int(0.5 * (ratio(1, d) * scale - 1)).clamp(0, 15)
        return Params(to_half(d * torch.tensor(cls.fudge, dtype=torch.float32)), codes)

    @classmethod
    def finish(cls, points: Tensor, minus: Tensor, scale: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
        """A block without a scale has no points nor signs."""
        some = (scale != 0).any(0)
        return torch.where(some, points, 0), minus & some

    @classmethod
    def expand(cls, points: Tensor, minus: Tensor) -> Tensor:
        """Codes [256, n]."""
        magnitude = torch.tensor(cls.magnitudes, dtype=torch.int32, device=points.device)[cls.levels_of(points).long()]
        return torch.where(minus, -magnitude, magnitude)

    @classmethod
    def contract(cls, codes: Tensor) -> tuple[Tensor, Tensor]:
        """The indices [256 / run, n] of the points in ``codes``, and minus signs [256, n] as 0, 1.

        A magnitude between two levels counts as the lower, and a run that is no point as the one nearest to it.
        """
        steps = torch.tensor(cls.magnitudes[1:], dtype=torch.int32, device=codes.device)
        levels = torch.bucketize(codes.abs(), steps, right=True).int()
        runs = levels.view(-1, cls.book.run, codes.shape[1]).transpose(0, 1)
        return cls.book.index(runs), (codes < 0).int()

    @staticmethod
    def encode(x: Tensor, found: Found) -> Tensor:
        assert found.codes is not None
        return found.codes

    @classmethod
    def steps(cls, d: Tensor, scale: Tensor) -> Tensor:
        """What a magnitude is multiplied with: ``d`` [n], ``scale`` [n_sub, n]."""
        raise NotImplementedError

    @classmethod
    def decode(cls, codes: Tensor, params: Params) -> Tensor:
        assert params.scale is not None
        return cls.steps(from_half(params.d), params.scale.float()).repeat_interleave(cls.kind.sub, 0) * codes.float()
