"""Merges of a BPE: as GGUF writes them, and whether a SentencePiece model's scores give the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

SPACE_BYTE = "\u0120"


def byte_alphabet() -> list[str]:
    """The character that stands for each byte in a byte-level BPE: printable ones for themselves, the others from U+0100 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def merge_text(merge: str | Sequence[str]) -> str:
    """A merge as GGUF has it, "left right", from either form of tokenizer.json; a space inside a half is written as the byte alphabet's."""
    if isinstance(merge, str):
        return merge
    left, right = merge
    return f"{left.replace(' ', SPACE_BYTE)} {right.replace(' ', SPACE_BYTE)}"


def ranks_of(model: Mapping[str, Any]) -> dict[str, list[int]]:
    """Piece → the ranks of the merges that make it."""
    ranks: dict[str, list[int]] = {}
    for rank, merge in enumerate(model["merges"]):
        ranks.setdefault("".join(merge.split(" ", 1) if isinstance(merge, str) else merge), []).append(rank)
    return ranks


def is_scored(model: Mapping[str, Any], ranks: Mapping[str, Sequence[int]], added: set[str]) -> bool:
    """Are these the merges of a SentencePiece model: every way to make a piece, side by side?"""
    pieces = model["vocab"]
    for piece in pieces.keys() - added:
        its = ranks.get(piece, ())
        if its and its[-1] - its[0] != len(its) - 1:
            return False
        if len(its) != sum(piece[:k] in pieces and piece[k:] in pieces for k in range(1, len(piece))):
            return False
    return True
