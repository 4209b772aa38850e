"""Estimates how much text two sets of token windows share, from a sketch of one of them that fits into a file's metadata.

The sketch is the ``KEPT`` smallest hashes of all runs of ``RUN`` tokens (Broder, "On the resemblance and containment of documents", 1997).
Of another text, the runs with hashes as small are looked up in the sketch; the share found estimates how much of it was in the first.
The windows' positions and lengths do not matter.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

RUN = 16
"""Tokens that must agree: long enough that two texts do not share them by chance or by a common phrase."""

KEPT = 512
"""Hashes of a sketch; eight digits each, 4 KiB of text."""

_ODD = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True)
class Overlap:
    """``n_found`` of the ``n_sampled`` runs of one text are in the other."""

    n_found: int
    n_sampled: int

    @property
    def share(self) -> float:
        return self.n_found / self.n_sampled if self.n_sampled else 0.0

    @property
    def is_notable(self) -> bool:
        """More than a licence or a heading that many files begin with."""
        return self.n_found > 1 and self.share >= 0.02


def sketch(ids: Tensor) -> str:
    """The sketch of token windows ``ids``: [n, T] int64. Empty when they are shorter than a run."""
    return "".join(f"{value:08x}" for value in _hashes(ids)[:KEPT])


def overlap(known: str, ids: Tensor) -> Overlap:
    """How much of the windows ``ids`` [n, T] was in the text whose sketch is ``known``. ValueError for an invalid sketch."""
    smallest = np.array([int(known[i : i + 8], 16) for i in range(0, len(known), 8)], dtype=np.uint32)
    sampled = _hashes(ids)
    if len(smallest) >= KEPT:  # else the sketch is of all runs
        sampled = sampled[sampled <= smallest.max()]
    return Overlap(int(np.isin(sampled, smallest).sum()), len(sampled))


def _hashes(ids: Tensor) -> np.ndarray:
    """The distinct hashes of all runs of ``RUN`` tokens within windows ``ids`` [n, T], in rising order: uint32."""
    n_runs = ids.shape[1] - RUN + 1
    if n_runs < 1:
        return np.zeros(0, np.uint32)
    tokens = ids.cpu().numpy().astype(np.uint64)
    value = np.zeros((len(tokens), n_runs), np.uint64)
    for i in range(RUN):  # modulo 2**64, which numpy's unsigned integers are
        value = (value + tokens[:, i : i + n_runs] + np.uint64(1)) * _ODD
        value ^= value >> np.uint64(32)
    return np.unique((value * _ODD >> np.uint64(32)).astype(np.uint32))
