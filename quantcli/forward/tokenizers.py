"""The tokenizer that comes with a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quantcli.errors import CheckpointError

if TYPE_CHECKING:
    from quantcli.checkpoint import Checkpoint


def tokenizer(checkpoint: Checkpoint) -> Any:
    """The tokenizer that comes with ``checkpoint``; from the metadata of a GGUF file. Raises :class:`CheckpointError`."""
    from transformers import AutoTokenizer

    path = checkpoint.path
    try:
        if path.is_file():
            return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(": ")
        raise CheckpointError(f"{checkpoint.source}: no tokenizer that transformers can read: {reason}") from error
