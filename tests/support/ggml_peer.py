"""ggml's own quantizer and dequantizer through ctypes: the peer of the block ops."""

from __future__ import annotations

import ctypes
import faulthandler
import os

import torch
from torch import Tensor

from quantcli.ops.blocks import KINDS

TYPES = {"q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "q2_k": 10, "q3_k": 11, "q4_k": 12, "q5_k": 13, "q6_k": 14}
TYPES |= {"iq3_s": 21, "iq3_xxs": 18, "iq2_xs": 17, "iq2_xxs": 16, "iq2_s": 22}
TYPES |= {"iq4_nl": 20, "iq4_xs": 23, "tq1_0": 34, "tq2_0": 35, "ggml_mxfp4": 39, "ggml_nvfp4": 40}
"""ggml's enum values."""


class Ggml:
    """``libggml-base.so`` at ``path``."""

    def __init__(self, path: str) -> None:
        self.library = ctypes.CDLL(path)
        self.library.ggml_quantize_chunk.restype = ctypes.c_size_t
        self.library.ggml_quantize_chunk.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]

    def quantize(self, W: Tensor, kind: str, importance: Tensor | None = None) -> Tensor:
        """The bytes of ``W`` [out, in] float32: [out, row_bytes] uint8."""
        rows, cols = W.shape
        blocks = torch.empty(rows, cols // KINDS[kind].block * KINDS[kind].n_bytes, dtype=torch.uint8)
        weights = None if importance is None else importance.data_ptr()
        self.library.ggml_quantize_chunk(TYPES[kind], W.contiguous().data_ptr(), blocks.data_ptr(), 0, rows, cols, weights)
        return blocks

    def quantize_if_it_can(self, W: Tensor, kind: str, importance: Tensor | None = None) -> Tensor | None:
        """The same, but None where ggml aborts: types with a code book assert that scales are numbers and neighbours at finite distances.

        In a child process, on tables made here: ggml makes them on threads, which do not survive a fork.
        """
        if not KINDS[kind].has_book:
            return self.quantize(W, kind, importance)
        self.library.ggml_quantize_init(TYPES[kind])
        blocks = torch.empty(W.shape[0], W.shape[1] // KINDS[kind].block * KINDS[kind].n_bytes, dtype=torch.uint8).share_memory_()
        child = os.fork()
        if child == 0:
            faulthandler.disable()
            os.environ["GGML_NO_BACKTRACE"] = "1"
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.dup2(nowhere, 2)
            blocks.copy_(self.quantize(W, kind, importance))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        return None if status else blocks

    def dequantize(self, blocks: Tensor, kind: str, in_features: int) -> Tensor:
        W = torch.empty(blocks.shape[0], in_features)
        decode = getattr(self.library, f"dequantize_row_{kind.removeprefix('ggml_').replace('_k', '_K')}")
        decode.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
        decode(blocks.contiguous().data_ptr(), W.data_ptr(), W.numel())
        return W
