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
from quantcli.text.documents import Dataset, Held, Renderer, Rows
from quantcli.text.documents.files import LargeText

EVAL_TEXT_CHARS = 400_000

LEAST_TOKENS = 2
"""Of a window: the last of one predicts nothing."""

MIN_HELD_OUT = 64
"""Fewer tokens are no window of their own to measure errors on."""

HELD_OUT_TOKENS = 1024
"""Tokens on which errors are measured beside those that are calibrated on: enough for a mean, few to what calibration runs."""

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
    return _drawn_windows(Dataset("", Held(texts)), Renderer(tokenizer), n_samples, seq_len, seed)[0]


def windows_of(
    names: Sequence[str],
    tokenizer: Any,
    n_samples: int,
    seq_len: int,
    seed: int = 0,
    *,
    note: Callable[[str], None] = lambda _: None,
    read: Callable[[Rows], None] = lambda _: None,
) -> Tensor:
    """Windows [n, seq_len] of the datasets ``names``, each with its weight's share; without any, of :func:`default_text`.

    Conversations go through the tokenizer's chat template. ``note`` receives messages for the user: that the default text was used, that
    there is no template, that there were fewer windows than asked for; ``read``: how many rows of each dataset were read.
    """
    return windows_and_held_out(names, tokenizer, n_samples, seq_len, seed, note=note, read=read)[0]


def windows_and_held_out(
    names: Sequence[str],
    tokenizer: Any,
    n_samples: int,
    seq_len: int,
    seed: int = 0,
    *,
    hold_out: bool = False,
    note: Callable[[str], None] = lambda _: None,
    read: Callable[[Rows], None] = lambda _: None,
) -> tuple[Tensor, Tensor | None]:
    """The windows of :func:`windows_of`, and with ``hold_out`` about :data:`HELD_OUT_TOKENS` others to measure errors on, [k, T].

    These come from what the datasets have beyond the windows, or where that is nothing from Python's docstrings: errors on the
    windows that a method was fitted to say little of others.
    """
    if not names:
        note("calibrating on CPython's language reference; for best results give --dataset with text of your own domain")
    datasets = [Dataset.open(name) for name in names] or [Dataset("default", Held([default_text()]))]
    render = Renderer(tokenizer, note)
    n_spare = max(1, HELD_OUT_TOKENS // seq_len) if hold_out else 0
    if len(datasets) == 1:
        ids, spare = _drawn_windows(datasets[0], render, n_samples, seq_len, seed, n_spare)
    else:
        ids, spare = _mixed(datasets, render, n_samples, seq_len, seed, n_spare)
    _note_fewer(ids, n_samples, seq_len, note)
    for rows in render.rows:
        read(rows)
    if not hold_out:
        return ids, None
    if not spare:
        text = _joined(_docstrings(), 2 * CHARS_A_TOKEN * HELD_OUT_TOKENS)[0]
        return ids, eval_windows(text, tokenizer, n_samples=n_spare, seq_len=min(seq_len, HELD_OUT_TOKENS))
    return ids, _stack(spare[:n_spare], *put_around(tokenizer))[:, :HELD_OUT_TOKENS]


def eval_windows_of(
    names: Sequence[str],
    tokenizer: Any,
    n_samples: int,
    seq_len: int,
    *,
    note: Callable[[str], None] = lambda _: None,
    read: Callable[[Rows], None] = lambda _: None,
) -> Tensor:
    """The first windows [n, seq_len] of the datasets ``names``, one after the other; without any, of Python's docstrings.

    Only as much is read and tokenized as the windows need. ``note``, ``read``: as for :func:`windows_of`.
    """
    if not names:
        note("measuring on docstrings of CPython's standard library; give --dataset with text of your own domain")
    datasets = [Dataset.open(name) for name in names]
    render = Renderer(tokenizer, note)
    n_chars = CHARS_A_TOKEN * n_samples * seq_len
    while True:
        render.rows.clear()
        text, is_whole = _joined(_in_order(datasets, render) if names else _docstrings(), n_chars)
        # One window more than needed, so that the end of the text read so far affects none of those that are.
        ids = eval_windows(text, tokenizer, n_samples=n_samples + 1, seq_len=seq_len)
        if is_whole or len(ids) > n_samples:
            break
        n_chars *= 2
    _note_fewer(ids[:n_samples], n_samples, seq_len, note)
    for rows in render.rows:
        read(rows)
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
    if not tokens:
        raise RecipeError("the text to calibrate or measure on is empty")
    return _stack((_cut(tokens, body) or [tokens])[:n_samples], before, after)


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


def _drawn_windows(
    dataset: Dataset, render: Renderer, n_samples: int, seq_len: int, seed: int, n_spare: int = 0
) -> tuple[Tensor, list[list[int]]]:
    """Windows [n, seq_len], and without BOS up to ``n_spare`` others that are not among them."""
    draw = random.Random(seed)
    before, after = put_around(render.tokenizer)
    body = seq_len - len(before) - len(after)
    if body < 1:
        raise RecipeError(f"--seq-len {seq_len} leaves no tokens for text besides {'BOS' if not after else 'CLS and SEP'}")
    render.begin(dataset.name, dataset.source.documents if isinstance(dataset.source, Held) else None)
    texts = map(render, dataset.source.drawn(draw))
    tokens = _stream(texts, render.tokenizer, n_samples * body)
    if not tokens:
        render.check_read()
        raise RecipeError("the text to calibrate or measure on is empty")
    cut = _cut(tokens, body) or [tokens]
    chosen = draw.sample(range(len(cut)), min(n_samples, len(cut)))
    spare = [cut[i] for i in sorted(set(range(len(cut))) - set(chosen))][:n_spare]
    if len(spare) < n_spare:
        rest = tokens[len(cut) * body :] + _stream(texts, render.tokenizer, (n_spare - len(spare)) * body)
        more = _cut(rest, body) or ([rest] if len(rest) >= MIN_HELD_OUT and not spare else [])
        spare += more[: n_spare - len(spare)]
    return _stack([cut[i] for i in chosen], before, after), spare


def _cut(tokens: list[int], body: int) -> list[list[int]]:
    """Consecutive windows of ``body`` tokens; a shorter rest is left out."""
    return [tokens[i : i + body] for i in range(0, len(tokens) - body + 1, body)]


def _mixed(
    datasets: Sequence[Dataset], render: Renderer, n_samples: int, seq_len: int, seed: int, n_spare: int = 0
) -> tuple[Tensor, list[list[int]]]:
    parts: list[Tensor] = []
    spares: list[list[int]] = []
    for dataset, share in zip(datasets, _shares([d.weight for d in datasets], n_samples), strict=True):
        if share == 0:
            raise RecipeError(f"--dataset {dataset.name}: its weight gives it none of the {n_samples} windows; raise one of the two")
        part, spare = _drawn_windows(dataset, render, share, seq_len, seed, n_spare)
        if part.shape[1] < seq_len:
            raise RecipeError(f"--dataset {dataset.name} has {part.shape[1]} tokens, less than one window of {seq_len}; lower --seq-len")
        parts.append(part)
        n_added = sum(map(len, put_around(render.tokenizer)))
        spares += [window for window in spare if len(window) == len(spare[0]) == seq_len - n_added]
    ids = torch.cat(parts)
    return ids[random.Random(seed).sample(range(len(ids)), len(ids))], spares[:: max(1, len(spares) // max(1, n_spare))]


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
    return tokens


def _stack(cut: Sequence[list[int]], before: list[int], after: list[int]) -> Tensor:
    """Windows [n, T] of ``cut``, each between ``before`` and ``after``; :class:`RecipeError` where nothing could be predicted of them."""
    if (n_tokens := len(before) + len(cut[0]) + len(after)) < LEAST_TOKENS:
        raise RecipeError(
            f"the text gives windows of {n_tokens} token, and {LEAST_TOKENS} or more are needed; give more text, or raise --seq-len"
        )
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
        render.begin(dataset.name, dataset.source.documents if isinstance(dataset.source, Held) else None)
        for j, document in enumerate(dataset.source.in_order()):
            separator = "" if i == j == 0 or (in_pieces and j > 0) else "\n\n"
            yield separator + render(document)
        render.check_read()


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
