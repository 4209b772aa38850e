"""Which kernels run: the compiled module and its instruction set, or the torch references."""

from __future__ import annotations

import os
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from quantcli.errors import KernelError

REFERENCE = "reference"


@cache
def _compiled() -> ModuleType | None:
    """The compiled module, on as many threads as torch, or None where the package was installed without one."""
    try:
        import quantcli._kernels as kernels
    except ModuleNotFoundError:
        return None
    kernels.set_threads(torch.get_num_threads())
    compiled: ModuleType = kernels
    return compiled


_forced_reference: bool | None = None
"""None until the environment has been read."""


def available(*, hidden: bool = False) -> tuple[str, ...]:
    """What :func:`use` takes on this machine: "reference" and its instruction sets, best last. ``hidden`` adds those only tests use."""
    compiled = _compiled()
    return (REFERENCE, *(compiled.sets(hidden) if compiled else ()))


def use(name: str | None) -> None:
    """Force "reference" or an instruction set for this process; None goes back to the best there is. Not found: :class:`KernelError`."""
    global _forced_reference
    compiled = _compiled()
    name = name or available()[-1]
    if name != REFERENCE and compiled is None:
        raise KernelError(f"instruction set '{name}' is not available: this installation has no compiled kernels; there is: {REFERENCE}")
    if name != REFERENCE and compiled is not None:
        compiled.use(name)
    _forced_reference = name == REFERENCE


def active() -> str:
    """The instruction set in use: "reference", "baseline", "avx2", "avx512" or "neon". QUANTCLI_KERNELS forces one."""
    if _forced_reference is None:
        use(os.environ.get("QUANTCLI_KERNELS"))
    compiled = _compiled()
    return REFERENCE if _forced_reference or compiled is None else compiled.active()


def set_threads(n: int) -> None:
    """Run kernels and torch on ``n`` threads. Results do not depend on it."""
    torch.set_num_threads(n)
    if compiled := _compiled():
        compiled.set_threads(n)


def kernel(tensor: Tensor) -> ModuleType | None:
    """The compiled module if it has kernels for this tensor's device and they are in use; None: run the reference."""
    if active() == REFERENCE:
        return None
    compiled = _compiled()
    device = tensor.device.type
    return compiled if compiled and (device == "cpu" or (device == "cuda" and compiled.has_cuda)) else None


def stream(tensor: Tensor) -> int:
    """The handle of the CUDA stream that torch uses for this tensor; 0 on the CPU."""
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0
