"""How long something takes."""

from __future__ import annotations

import time
from collections.abc import Callable


def best_seconds(run: Callable[[], object], n_runs: int = 5) -> float:
    """The shortest of ``n_runs`` runs by the clock: what the machine can do when nothing comes between."""
    times = []
    for _ in range(n_runs):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)
