"""Texts to calibrate and measure on, and the token windows cut from them: files, datasets by name, CPython's language reference."""

from __future__ import annotations

import ast
import hashlib
import itertools
import json
import random
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantcli.errors import CheckpointError, RecipeError

MAX_DOCUMENTS = 20_000
"""Documents taken from a dataset by name, which may be larger than any disk."""

EVAL_TEXT_CHARS = 400_000

FIELDS = ("text", "content", "messages")


@dataclass(frozen=True, slots=True)
class Dataset:
    """One ``--dataset``: documents and their weight among several datasets."""

    name: str
    documents: Sequence[str]
    weight: float = 1.0

    @classmethod
    def open(cls, word: str) -> Dataset:
        """The dataset that ``word`` names: ``PATH`` (.txt, .jsonl or .parquet) or ``NAME[:CONFIG][:SPLIT]``, either with ``=WEIGHT``.

        Raises :class:`CheckpointError` for a file that cannot be read, :class:`RecipeError` for a name without the extra to fetch it.
        """
        match = re.fullmatch(r"(.+)=(\d+(?:\.\d+)?)", word)
        if match is None or Path(word).exists():
            return cls(word, _documents(word))
        if float(match[2]) == 0:
            raise RecipeError(f"--dataset {word}: a weight must be above zero")
        return cls(match[1], _documents(match[1]), float(match[2]))


def default_text() -> str:
    """CPython's language reference (``pydoc_data.topics``): half a megabyte of English and code that every Python carries."""
    from pydoc_data import topics

    return "\n\n".join(text for _, text in sorted(topics.topics.items()))


def default_eval_text() -> str:
    """Docstrings of CPython's standard library, module by module: a text that :func:`default_text` does not contain."""
    docs: list[str] = []
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        tree = ast.parse(file.read_bytes())
        nodes = [n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
        docs += [doc for n in nodes if (doc := ast.get_docstring(n))]
        if sum(map(len, docs)) > EVAL_TEXT_CHARS:
            break
    return "\n\n".join(docs)


def read(word: str) -> str:
    """All documents of the dataset that ``word`` names as one text."""
    return "\n\n".join(Dataset.open(word).documents)


def windows(texts: Sequence[str], tokenizer: Any, *, n_samples: int, seq_len: int, seed: int = 0) -> Tensor:
    """Token windows to calibrate on: documents in an order drawn by ``seed``, joined by the tokenizer's separator, cut, and drawn again.

    Returns [n, seq_len] int64 with n ≤ ``n_samples``: all there are when the text is short, and one shorter window when it does not fill
    one. Each window begins with BOS where the tokenizer puts one before a text, as inference will.
    """
    draw = random.Random(seed)
    order = draw.sample(range(len(texts)), len(texts))
    bos = bos_added(tokenizer)
    body = seq_len - len(bos)
    if body < 1:
        raise RecipeError(f"--seq-len {seq_len} leaves no room for text")
    tokens = _stream((texts[i] for i in order), tokenizer, n_samples * body)
    cut = [tokens[i : i + body] for i in range(0, len(tokens) - body + 1, body)] or [tokens]
    chosen = draw.sample(cut, min(n_samples, len(cut)))
    return _stack(chosen, bos)


def windows_of(
    words: Sequence[str], tokenizer: Any, n_samples: int, seq_len: int, seed: int = 0, *, note: Callable[[str], None] = lambda _: None
) -> Tensor:
    """Windows [n, seq_len] of the datasets that ``words`` name, each with its weight's share; none means :func:`default_text`.

    ``note`` is told what a user should know: that the default text was used, that there were fewer windows than asked.
    """
    if not words:
        note("calibrating on CPython's language reference; for best results give --dataset with text of your own domain")
    datasets = [Dataset.open(word) for word in words] or [Dataset("default", [default_text()])]
    if len(datasets) == 1:
        ids = windows(datasets[0].documents, tokenizer, n_samples=n_samples, seq_len=seq_len, seed=seed)
    else:
        ids = _mixed(datasets, tokenizer, n_samples, seq_len, seed)
    if ids.shape != (n_samples, seq_len):
        note(f"the text gives {ids.shape[0]} windows of {ids.shape[1]} tokens; {n_samples} of {seq_len} were asked for")
    return ids


def _mixed(datasets: Sequence[Dataset], tokenizer: Any, n_samples: int, seq_len: int, seed: int) -> Tensor:
    parts: list[Tensor] = []
    for dataset, share in zip(datasets, _shares([d.weight for d in datasets], n_samples), strict=True):
        if share == 0:
            raise RecipeError(f"--dataset {dataset.name}: its weight gives it none of the {n_samples} windows; raise one of the two")
        part = windows(dataset.documents, tokenizer, n_samples=share, seq_len=seq_len, seed=seed)
        if part.shape[1] < seq_len:
            raise RecipeError(f"--dataset {dataset.name} has {part.shape[1]} tokens, less than one window of {seq_len}; lower --seq-len")
        parts.append(part)
    ids = torch.cat(parts)
    return ids[random.Random(seed).sample(range(len(ids)), len(ids))]


def eval_windows(text: str, tokenizer: Any, *, n_samples: int | None, seq_len: int) -> Tensor:
    """The first ``n_samples`` (None: all) consecutive windows of ``text``, which do not overlap: [n, seq_len] int64.

    Each begins with BOS where the tokenizer puts one before a text. A text shorter than one window is one shorter window; a shorter
    rest at the end is left out.
    """
    bos = bos_added(tokenizer)
    body = seq_len - len(bos)
    if body < 2 - len(bos):
        raise RecipeError(f"--seq-len {seq_len} leaves nothing to predict")
    tokens = _stream([text], tokenizer, None)
    cut = [tokens[i : i + body] for i in range(0, len(tokens) - body + 1, body)] or [tokens]
    return _stack(cut[:n_samples], bos)


def bos_added(tokenizer: Any) -> list[int]:
    """[BOS] when the tokenizer puts it before a text by itself, else []."""
    ids = list(tokenizer("a")["input_ids"])
    return ids[:1] if tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id] else []


def sha256(ids: Tensor) -> str:
    """Fingerprint of token windows [n, T]: the shape and the ids as little-endian int64."""
    digest = hashlib.sha256(json.dumps(list(ids.shape)).encode())
    digest.update(ids.to(torch.int64).contiguous().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def _stream(texts: Iterable[str], tokenizer: Any, at_least: int | None) -> list[int]:
    """Tokens of ``texts`` joined by a separator; stops after the document that brings ``at_least`` tokens."""
    separator = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.bos_token_id
    tokens: list[int] = []
    for text in texts:
        if tokens and separator is not None:
            tokens.append(separator)
        tokens += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if at_least is not None and len(tokens) >= at_least:
            break
    if not tokens:
        raise RecipeError("the text to calibrate or measure on is empty")
    return tokens


def _stack(cut: Sequence[list[int]], bos: list[int]) -> Tensor:
    return torch.tensor([bos + tokens for tokens in cut], dtype=torch.int64)


def _shares(weights: Sequence[float], n: int) -> list[int]:
    """``n`` divided by ``weights``: largest remainders round up, so the shares add up to ``n``."""
    exact = [n * w / sum(weights) for w in weights]
    shares = [int(x) for x in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: shares[i] - exact[i])
    for i in by_remainder[: n - sum(shares)]:
        shares[i] += 1
    return shares


def _documents(name: str) -> list[str]:
    path = Path(name).expanduser()
    readers = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if path.suffix in readers:
        if not path.is_file():
            raise CheckpointError(f"--dataset {name}: no such file")
        return readers[path.suffix](path)
    if path.exists():
        raise RecipeError(f"--dataset {name}: a file must end in {', '.join(readers)}")
    return _fetch(name)


def _read_txt(path: Path) -> list[str]:
    return [_decode(path)]


def _read_jsonl(path: Path) -> list[str]:
    documents = []
    for number, line in enumerate(_decode(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise CheckpointError(f"{path}:{number}: not a line of JSON: {error}") from error
        documents.append(_text_of(row, f"{path}:{number}"))
    return documents


def _read_parquet(path: Path) -> list[str]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise RecipeError(f"--dataset {path}: reading Parquet needs pyarrow: pip install 'quantcli[data]'") from error
    try:
        rows = parquet.read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        raise CheckpointError(f"{path}: not a Parquet file that pyarrow reads: {error}") from error
    return [_text_of(row, f"{path}, row {i}") for i, row in enumerate(rows)]


def _fetch(name: str) -> list[str]:
    """The first documents of the dataset ``NAME[:CONFIG][:SPLIT]``; its train split, or its first one, unless a split is named."""
    try:
        import datasets
    except ImportError as error:
        raise RecipeError(
            f"--dataset {name}: no such file, and fetching a dataset by name needs the extra: pip install 'quantcli[data]'"
        ) from error
    repo, *rest = name.split(":")
    config = rest[0] if len(rest) > 1 else None
    try:
        available = datasets.get_dataset_split_names(repo, config)
        split = rest[-1] if rest else ("train" if "train" in available else available[0])
        rows = datasets.load_dataset(repo, config, split=split, streaming=True)
        return list(_texts_of(rows, f"dataset {name}"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"--dataset {name}: cannot be fetched: {error}") from error


def _texts_of(rows: Iterable[Mapping[str, Any]], where: str) -> Iterator[str]:
    for i, row in enumerate(itertools.islice(rows, MAX_DOCUMENTS)):
        yield _text_of(row, f"{where}, row {i}")


def _text_of(row: Any, where: str) -> str:
    """The text of one record: its field ``text`` or ``content``, or the contents of its ``messages``."""
    field = next((f for f in FIELDS if isinstance(row, Mapping) and row.get(f)), None)
    if field is None:
        found = f"its fields are {', '.join(map(str, row))}" if isinstance(row, Mapping) else "it is no record"
        raise CheckpointError(f"{where}: no text in any of the fields {', '.join(FIELDS)}; {found}")
    if field != "messages":
        return str(row[field])
    return "\n".join(str(message.get("content") or "") for message in row[field])


def _decode(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8 text: {error}") from error
