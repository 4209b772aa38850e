"""Token windows for calibration and evaluation, cut from datasets or from text that comes with Python."""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import random
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantcli.errors import RecipeError
from quantcli.text.documents import Dataset, Held, Renderer
from quantcli.text.documents.files import LargeText

EVAL_TEXT_CHARS = 400_000

CHARS_A_TOKEN = 6
"""Characters read at first for each token wanted: a little more than English has."""

_CODE = re.compile(  # docstrings, and the comments and other strings in which quotes must not be mistaken for theirs
    r'#[^\n]*|"""[^"\\]*(?:(?:\\.|"(?!""))[^"\\]*)*"""|\'\'\'[^\'\\]*(?:(?:\\.|\'(?!\'\'))[^\'\\]*)*\'\'\'|'
    r'"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'',
    re.DOTALL,
)
_HEADING = re.compile(r"(?:\A|:[ \t]*\n)\s*([rR]?)\Z")  # what stands before a docstring: a file's beginning, or def and class


def default_text() -> str:
    """CPython's language reference (``pydoc_data.topics``): half a megabyte of English and code that comes with Python."""
    from pydoc_data import topics

    return "\n\n".join(text for _, text in sorted(topics.topics.items()))


def default_eval_text() -> str:
    """Docstrings of CPython's standard library, module by module: a text that :func:`default_text` does not contain."""
    return _joined(_docstrings(), EVAL_TEXT_CHARS)[0]


def windows(texts: Sequence[str], tokenizer: Any, *, n_samples: int, seq_len: int, seed: int = 0) -> Tensor:
    """Token windows to calibrate on: documents in an order drawn by ``seed``, joined by the tokenizer's separator, cut, and drawn again.

    Returns [n, seq_len] int64 with n ≤ ``n_samples``: as many as a short text gives, and one shorter window when it does not fill one.
    Each window begins with BOS or CLS, and ends with SEP, where the tokenizer puts these around a text, as in inference.
    """
    return _drawn_windows(Dataset("", Held(texts)), Renderer(tokenizer), n_samples, seq_len, seed)


def windows_of(
    names: Sequence[str], tokenizer: Any, n_samples: int, seq_len: int, seed: int = 0, *, note: Callable[[str], None] = lambda _: None
) -> Tensor:
    """Windows [n, seq_len] of the datasets ``names``, each with its weight's share; without any, of :func:`default_text`.

    Conversations go through the tokenizer's chat template. ``note`` receives messages for the user: that the default text was used, that
    there is no template, that there were fewer windows than asked for.
    """
    if not names:
        note("calibrating on CPython's language reference; for best results give --dataset with text of your own domain")
    datasets = [Dataset.open(name) for name in names] or [Dataset("default", Held([default_text()]))]
    render = Renderer(tokenizer, note)
    if len(datasets) == 1:
        ids = _drawn_windows(datasets[0], render, n_samples, seq_len, seed)
    else:
        ids = _mixed(datasets, render, n_samples, seq_len, seed)
    _note_fewer(ids, n_samples, seq_len, note)
    return ids


def eval_windows_of(
    names: Sequence[str], tokenizer: Any, n_samples: int, seq_len: int, *, note: Callable[[str], None] = lambda _: None
) -> Tensor:
    """The first windows [n, seq_len] of the datasets ``names``, one after the other; without any, of Python's docstrings.

    Only as much is read and tokenized as the windows need.
    """
    if not names:
        note("measuring on docstrings of CPython's standard library; give --dataset with text of your own domain")
    datasets = [Dataset.open(name) for name in names]
    render = Renderer(tokenizer, note)
    n_chars = CHARS_A_TOKEN * n_samples * seq_len
    while True:
        text, is_whole = _joined(_in_order(datasets, render) if names else _docstrings(), n_chars)
        # One window more than needed, so that the end of the text read so far affects none of those that are.
        ids = eval_windows(text, tokenizer, n_samples=n_samples + 1, seq_len=seq_len)
        if is_whole or len(ids) > n_samples:
            break
        n_chars *= 2
    _note_fewer(ids[:n_samples], n_samples, seq_len, note)
    return ids[:n_samples]


def eval_windows(text: str, tokenizer: Any, *, n_samples: int | None, seq_len: int) -> Tensor:
    """The first ``n_samples`` (None: all) consecutive windows of ``text``, which do not overlap: [n, seq_len] int64.

    Each begins with BOS or CLS, and ends with SEP, where the tokenizer puts these around a text. A text shorter than one window is one
    shorter window; a shorter rest at the end is left out.
    """
    before, after = put_around(tokenizer)
    body = seq_len - len(before) - len(after)
    if body < max(1, 2 - len(before) - len(after)):
        raise RecipeError(f"--seq-len {seq_len} leaves nothing to predict")
    tokens = _stream([text], tokenizer, None)
    cut = [tokens[i : i + body] for i in range(0, len(tokens) - body + 1, body)] or [tokens]
    return _stack(cut[:n_samples], before, after)


def put_around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts around a text by itself: [BOS] or an encoder's [CLS] before it, [SEP] after it; or []."""
    ids = list(tokenizer("a")["input_ids"])
    first, last = {tokenizer.bos_token_id, tokenizer.cls_token_id} - {None}, {tokenizer.sep_token_id} - {None}
    return [x for x in ids[:1] if x in first], [x for x in ids[1:][-1:] if x in last]


def sha256(ids: Tensor) -> str:
    """Fingerprint of token windows [n, T]: the shape and the ids as little-endian int64."""
    digest = hashlib.sha256(json.dumps(list(ids.shape)).encode())
    digest.update(ids.to(torch.int64).contiguous().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def _drawn_windows(dataset: Dataset, render: Renderer, n_samples: int, seq_len: int, seed: int) -> Tensor:
    draw = random.Random(seed)
    before, after = put_around(render.tokenizer)
    body = seq_len - len(before) - len(after)
    if body < 1:
        raise RecipeError(f"--seq-len {seq_len} leaves no tokens for text besides {'BOS' if not after else 'CLS and SEP'}")
    tokens = _stream(map(render, dataset.source.drawn(draw)), render.tokenizer, n_samples * body)
    cut = [tokens[i : i + body] for i in range(0, len(tokens) - body + 1, body)] or [tokens]
    return _stack(draw.sample(cut, min(n_samples, len(cut))), before, after)


def _mixed(datasets: Sequence[Dataset], render: Renderer, n_samples: int, seq_len: int, seed: int) -> Tensor:
    parts: list[Tensor] = []
    for dataset, share in zip(datasets, _shares([d.weight for d in datasets], n_samples), strict=True):
        if share == 0:
            raise RecipeError(f"--dataset {dataset.name}: its weight gives it none of the {n_samples} windows; raise one of the two")
        part = _drawn_windows(dataset, render, share, seq_len, seed)
        if part.shape[1] < seq_len:
            raise RecipeError(f"--dataset {dataset.name} has {part.shape[1]} tokens, less than one window of {seq_len}; lower --seq-len")
        parts.append(part)
    ids = torch.cat(parts)
    return ids[random.Random(seed).sample(range(len(ids)), len(ids))]


def _stream(texts: Iterable[str], tokenizer: Any, at_least: int | None) -> list[int]:
    """Tokens of ``texts`` joined by a separator; stops after the document that brings ``at_least`` tokens.

    Special tokens with which a document begins or ends, as a chat template writes them, are not added again.
    """
    separators = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.sep_token_id)
    separator = next((token for token in separators if token is not None), None)
    bos, _ = put_around(tokenizer)
    tokens: list[int] = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if tokens and ids and separator is not None and tokens[-1] != separator:
            tokens.append(separator)
        tokens += ids[1:] if bos and ids[:1] == bos else ids
        if at_least is not None and len(tokens) >= at_least:
            break
    if not tokens:
        raise RecipeError("the text to calibrate or measure on is empty")
    return tokens


def _stack(cut: Sequence[list[int]], before: list[int], after: list[int]) -> Tensor:
    return torch.tensor([before + tokens + after for tokens in cut], dtype=torch.int64)


def _shares(weights: Sequence[float], n: int) -> list[int]:
    """``n`` divided by ``weights``: largest remainders round up, so the shares add up to ``n``."""
    exact = [n * w / sum(weights) for w in weights]
    shares = [int(x) for x in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: shares[i] - exact[i])
    for i in by_remainder[: n - sum(shares)]:
        shares[i] += 1
    return shares


def _note_fewer(ids: Tensor, n_samples: int, seq_len: int, note: Callable[[str], None]) -> None:
    if ids.shape != (n_samples, seq_len):
        note(f"the text gives {ids.shape[0]} windows of {ids.shape[1]} tokens; {n_samples} of {seq_len} were asked for")


def _in_order(datasets: Sequence[Dataset], render: Renderer) -> Iterator[str]:
    """The datasets' documents with their separators, to be joined to one text."""
    for i, dataset in enumerate(datasets):
        in_pieces = isinstance(dataset.source, LargeText)
        for j, document in enumerate(dataset.source.in_order()):
            separator = "" if i == j == 0 or (in_pieces and j > 0) else "\n\n"
            yield separator + render(document)


def _docstrings() -> Iterator[str]:
    """Docstrings of the standard library, module by module, each with an empty line after it; found ten times as fast as by parsing."""
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        source = file.read_text("utf8")
        for match in _CODE.finditer(source):
            if not match[0].startswith(('"""', "'''")):
                continue
            if heading := _HEADING.search(source[max(0, match.start() - 200) : match.start()]):
                yield inspect.cleandoc(ast.literal_eval(heading[1] + match[0])) + "\n\n"


def _joined(pieces: Iterable[str], n_chars: int) -> tuple[str, bool]:
    """The ``pieces`` joined, up to ``n_chars``, and whether that is all of them."""
    held: list[str] = []
    n_held = 0
    for piece in pieces:
        held.append(piece)
        n_held += len(piece)
        if n_held > n_chars:
            return "".join(held)[:n_chars], False
    return "".join(held), True
