"""tokenizer.model: the pieces of a SentencePiece model, and what its header sets for the text before they are matched."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import TokenType

from quantcli.errors import CheckpointError

UNIGRAM, USER_DEFINED = 1, 4
PIECES, TRAINER, NORMALIZER = 1, 2, 3
"""Values and field numbers of ModelProto (google/sentencepiece, sentencepiece_model.proto); those inside are where they are read."""


@dataclass(frozen=True)
class SentencePiece:
    """``pieces``: (text, score, type) by id; ``roles``: bos, eos, unk, pad → id; ``charsmap``: the compiled normalization, or empty."""

    pieces: list[tuple[str, float, TokenType]]
    roles: dict[str, int]
    is_unigram: bool
    adds_prefix: bool
    merges_spaces: bool
    charsmap: bytes


def read_sentencepiece(path: Path, *, required: bool) -> SentencePiece | None:
    """The model at ``path``; None when there is no such file, or (unless ``required``) when it is something else of that name."""
    if not path.is_file():
        return None
    from sentencepiece import SentencePieceProcessor  # only folders with a tokenizer.model need the library

    try:
        model = SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        if required:
            raise CheckpointError(f"{path}: not a SentencePiece model, and there is no tokenizer.json") from error
        return None  # Llama 3 ships a tiktoken file under this name, next to tokenizer.json
    _, messages = protobuf(model.serialized_model_proto())
    trainer, _ = protobuf(messages.get(TRAINER, [b""])[-1])
    flags, tables = protobuf(messages.get(NORMALIZER, [b""])[-1])
    kinds = [piece_type(model, i, message) for i, message in enumerate(messages[PIECES])]
    roles = {"bos": model.bos_id(), "eos": model.eos_id(), "unk": model.unk_id(), "pad": model.pad_id()}
    return SentencePiece(
        [(model.id_to_piece(i), model.get_score(i), kind) for i, kind in enumerate(kinds)],
        {role: id for role, id in roles.items() if id >= 0},
        is_unigram=trainer.get(3, UNIGRAM) == UNIGRAM,
        adds_prefix=bool(flags.get(3, 1)),
        merges_spaces=bool(flags.get(4, 1)),
        charsmap=tables.get(2, [b""])[-1],
    )


def piece_type(model: Any, id: int, message: bytes) -> TokenType:
    """The type of piece ``id``, whose protobuf message is ``message``: the library answers for all types but one."""
    if model.is_unknown(id):
        return TokenType.UNKNOWN
    if model.is_control(id):
        return TokenType.CONTROL
    if model.is_unused(id):
        return TokenType.UNUSED
    if model.is_byte(id):
        return TokenType.BYTE
    return TokenType.USER_DEFINED if protobuf(message)[0].get(3) == USER_DEFINED else TokenType.NORMAL


def protobuf(data: bytes) -> tuple[dict[int, int], dict[int, list[bytes]]]:
    """A protobuf message as {field: last number} and {field: all byte strings}; the sentencepiece package hands out no header."""
    numbers: dict[int, int] = {}
    chunks: dict[int, list[bytes]] = {}
    at = 0
    while at < len(data):
        tag, at = varint(data, at)
        wire = tag & 7
        if wire == 0:
            numbers[tag >> 3], at = varint(data, at)
            continue
        size, at = ({1: 8, 5: 4}[wire], at) if wire in (1, 5) else varint(data, at)
        chunks.setdefault(tag >> 3, []).append(data[at : at + size])
        at += size
    return numbers, chunks


def varint(data: bytes, at: int) -> tuple[int, int]:
    """The base-128 number at ``at`` and where it ends."""
    value = shift = 0
    while True:
        value |= (data[at] & 0x7F) << shift
        shift, at = shift + 7, at + 1
        if data[at - 1] < 0x80:
            return value, at
