"""tokenizer.model: the pieces of a SentencePiece model, and what its header says of the text before they are matched."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gguf import TokenType

from quantcli.errors import CheckpointError

UNIGRAM = 1
TRAINER, NORMALIZER = 2, 3
"""Field numbers of ModelProto (google/sentencepiece, sentencepiece_model.proto); those of its two specs stand where they are read."""


@dataclass(frozen=True)
class SentencePiece:
    """``pieces``: (text, score, type) by id. ``charsmap``: the compiled normalization table, empty for none."""

    pieces: list[tuple[str, float, TokenType]]
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
        return None  # Llama 3 ships a tiktoken file under this name, beside tokenizer.json
    questions = [(model.is_unknown, TokenType.UNKNOWN), (model.is_control, TokenType.CONTROL)]
    questions += [(model.is_unused, TokenType.UNUSED), (model.is_byte, TokenType.BYTE)]
    kinds = [next((kind for ask, kind in questions if ask(i)), TokenType.NORMAL) for i in range(model.get_piece_size())]
    pieces = [(model.id_to_piece(i), model.get_score(i), kind) for i, kind in enumerate(kinds)]
    _, messages = protobuf(model.serialized_model_proto())
    trainer, _ = protobuf(messages.get(TRAINER, b""))
    flags, tables = protobuf(messages.get(NORMALIZER, b""))
    return SentencePiece(
        pieces,
        is_unigram=trainer.get(3, UNIGRAM) == UNIGRAM,
        adds_prefix=bool(flags.get(3, 1)),
        merges_spaces=bool(flags.get(4, 1)),
        charsmap=tables.get(2, b""),
    )


def protobuf(data: bytes) -> tuple[dict[int, int], dict[int, bytes]]:
    """A protobuf message as {field: number} and {field: bytes}, the last of each; the sentencepiece package hands out no header."""
    numbers: dict[int, int] = {}
    chunks: dict[int, bytes] = {}
    at = 0
    while at < len(data):
        tag, at = varint(data, at)
        wire = tag & 7
        if wire == 0:
            numbers[tag >> 3], at = varint(data, at)
            continue
        size, at = ({1: 8, 5: 4}[wire], at) if wire in (1, 5) else varint(data, at)
        chunks[tag >> 3] = data[at : at + size]
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
