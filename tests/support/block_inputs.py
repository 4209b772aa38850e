"""Weights that ggml's block types are tried on, and the bytes that ggml makes of them."""

from __future__ import annotations

import torch
from safetensors.torch import load_file
from torch import Tensor

from quantcli.ops.blocks import KINDS
from support.places import DATA

GOLDEN = DATA / "ggml_blocks"


def importance(n: int) -> Tensor:
    """[n]: skewed as activations are, with zeros, and with values whose products leave float32's normal range."""
    values = torch.rand(n, generator=torch.Generator().manual_seed(3)) ** 3
    values[: n // 8] = 0
    values[n // 4 : n // 4 + 20] = 1e30
    values[n // 2 : n // 2 + 40] = 1e-30
    return values


def weightings(kind: str, n: int) -> list[tuple[Tensor | None, str]]:
    """The importance [n] that ``kind`` is tried with, each with its name's ending in the golden file."""
    weighted: list[tuple[Tensor | None, str]] = [(importance(n), "/weighted")]
    return weighted if KINDS[kind].needs_importance else [(None, ""), *weighted]


def make_inputs() -> dict[str, Tensor]:
    """[3, 2048] each: ordinary weights and every corner where a search returns early, overflows or divides by nothing."""
    generator = torch.Generator().manual_seed(0)
    shape = (3, 2048)

    def randn(*size: int) -> Tensor:
        return torch.randn(*(size or shape), generator=generator)

    sub_scales = torch.exp(2 * randn(3, 2048 // 16, 1)).repeat(1, 1, 16).reshape(shape)
    wild_scales = torch.exp(8 * randn(3, 2048 // 32, 1)).repeat(1, 1, 32).reshape(shape)
    half_zero = randn()
    half_zero[:, ::2] = 0
    outliers = torch.zeros(shape)  # one in every 256, at another place each time, of either sign
    outliers.view(-1, 256)[torch.arange(24), 37 * torch.arange(24) % 256] = torch.tensor([60.0, -60.0]).repeat(12)
    return {
        "gaussian": randn(),
        "heavy_tailed": torch.tan(1.5 * randn()),
        "mixed_scales": randn() * sub_scales,
        "vanishing_scales": randn() * wild_scales * 1e-5,
        "constant": torch.full(shape, 0.37),
        "negative_constant": torch.full(shape, -1.37),
        "nearly_constant": 1 + 1e-7 * randn(),
        "nearly_negative_constant": -1 + 1e-7 * randn(),
        "zero": torch.zeros(shape),
        "negative_zero": torch.full(shape, -0.0),
        "half_zero": half_zero,
        "sparse": (randn() > 2.5).float(),
        "integers": torch.randint(-8, 8, shape, generator=generator).float(),
        "denormal": randn() * 1e-40,
        "tiny": randn() * 1e-15,
        "beyond_half": randn() * 1e7,
        "huge": randn() * 1e37,
        "largest": torch.where(randn() > 0, 1.0, -1.0) * 3.4e38,
        "one_outlier": torch.where(outliers != 0, outliers, randn()),
        "nothing_but_an_outlier": outliers,
    }


INPUTS = make_inputs()


def load_golden() -> dict[str, Tensor]:
    """Inputs ``{case}/W``, and ggml's ``{case}/{kind}``, ``{case}/{kind}/weighted`` and ``decoded/{kind}``."""
    return {name: tensor for path in sorted(GOLDEN.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def gaussian(golden: dict[str, Tensor], kind: str) -> Tensor:
    """ggml's blocks of ordinary weights, without importance where that can be."""
    return golden[f"gaussian/{kind}/weighted" if KINDS[kind].needs_importance else f"gaussian/{kind}"]


def assert_as_ggml(got: Tensor, expected: Tensor | None, case: str, kind: str) -> None:
    """ggml's bytes; or, where it aborts for want of a scale or neighbour, a scale that is no number, which qtypes refuse."""
    if expected is not None:
        assert_same_bytes(got, expected, case, kind)
        return
    assert KINDS[kind].has_book
    assert not got.view(-1, KINDS[kind].n_bytes)[:, :2].contiguous().view(torch.float16).isfinite().all(), case


def assert_same_bytes(got: Tensor, expected: Tensor, case: str, kind: str) -> None:
    """Equal, or the message says how many blocks differ and at which bytes."""
    assert got.shape == expected.shape
    differs = (got != expected).view(-1, KINDS[kind].n_bytes)
    assert not differs.any(), (
        f"{case}: {int(differs.any(1).sum())} blocks differ, at bytes {differs.any(0).nonzero().flatten().tolist()[:9]}"
    )
