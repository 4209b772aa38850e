"""The tokenizer that comes with a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quantcli.errors import CheckpointError

if TYPE_CHECKING:
    from quantcli.checkpoint.checkpoint import Checkpoint


def tokenizer(checkpoint: Checkpoint) -> Any:
    """The tokenizer that comes with ``checkpoint``; from the metadata of a GGUF file. Raises :class:`CheckpointError`.

    ``trust_remote_code=False`` is explicit: without it transformers asks on the terminal whether to run the repository's code.
    """
    from transformers import AutoTokenizer

    path = checkpoint.path
    try:
        if path.is_file():
            return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
        made = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        made("a")  # some values of tokenizer_config.json are looked at with the first text
        return made
    except Exception as error:  # any error that a foreign file's values cause in transformers' code and in tokenizers'
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(": ")
        raise CheckpointError(f"{checkpoint.source}: no tokenizer that transformers can read: {reason}") from error
