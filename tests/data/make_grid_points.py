"""Makes ``kernels/grid_points.h``: the points of the code books of ggml's IQ2 and IQ3 types, as the gguf package has them.

    python tests/data/make_grid_points.py

A point is a run of 4 (IQ3) or 8 (IQ2) levels, each one's place in the type's list of magnitudes, packed into 16 bits from the lowest up.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import quants

KINDS = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")
HEADER = Path(__file__).parents[2] / "kernels" / "grid_points.h"


def points(kind: str) -> list[int]:
    """The points of ``kind``'s code book, in the order of their indices."""
    table = getattr(quants, kind)
    table.init_grid()
    magnitudes = table.grid.reshape(table.grid.shape[-2:])  # [n_points, 4|8]
    levels = np.searchsorted(np.array(table.grid_map), magnitudes)
    bits = 16 // levels.shape[1]
    return [int(word) for word in (levels << (bits * np.arange(levels.shape[1]))).sum(1)]


def main() -> None:
    lines = [
        "// The points of ggml's code books, packed as grids.h says: made by tests/data/make_grid_points.py from the gguf package.",
        "#pragma once",
        "",
        "#include <cstdint>",
        "",
        "namespace quantcli {",
        "",
        "// clang-format off",
    ]
    for kind in KINDS:
        words = [f"0x{word:04x}," for word in points(kind)]
        lines.append(f"constexpr uint16_t k{kind}[{len(words)}] = {{")
        lines += ["    " + " ".join(words[i : i + 16]) for i in range(0, len(words), 16)]
        lines.append("};")
    HEADER.write_text("\n".join([*lines, "// clang-format on", "", "}  // namespace quantcli", ""]))


if __name__ == "__main__":
    main()
