"""llama.cpp's own programs as peers of the GGUF format: its converter, its quantizer, and what it computes with a file."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from quantcli.formats.gguf.file.container import Container, Field
from quantcli.formats.gguf.file.headers import read_header

LLAMA_CPP = Path(os.environ.get("QUANTCLI_LLAMA_CPP", "/nowhere"))
if not (LLAMA_CPP / "build/bin/llama-quantize").is_file():
    pytest.skip("QUANTCLI_LLAMA_CPP names no built llama.cpp", allow_module_level=True)

CONVERT = """
import runpy, sys
root, model, out, pre = sys.argv[1:]
sys.path[:0] = [root, root + "/gguf-py"]
from conversion import base
if pre:
    base.TextModel.get_vocab_base_pre = lambda self, tokenizer: pre
sys.argv = ["convert", model, "--outfile", out, "--outtype", "bf16"]
runpy.run_path(root + "/convert_hf_to_gguf.py", run_name="__main__")
"""


def run(program: str, *arguments: str | Path) -> str:
    done = subprocess.run(
        [LLAMA_CPP / "build/bin" / program, *arguments],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def convert(folder: Path, out: Path, pre: str = "") -> Path:
    done = subprocess.run(
        [sys.executable, "-c", CONVERT, str(LLAMA_CPP), str(folder), str(out), pre], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return out


CONVERT_ALL = """
import sys
root, *words = sys.argv[1:]
sys.path[:0] = [root, root + "/gguf-py"]
import runpy, traceback
from conversion import base
base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
for model, out in zip(words[::2], words[1::2]):
    sys.argv = ["convert", model, "--outfile", out, "--outtype", "bf16"]
    try:
        runpy.run_path(root + "/convert_hf_to_gguf.py", run_name="__main__")
    except (Exception, SystemExit):
        print(traceback.format_exc())
"""


def convert_all(folders: Mapping[Path, Path]) -> None:
    """convert_hf_to_gguf for several folders → files in one process, with gpt-2's pre-tokenizer."""
    words = [str(path) for pair in folders.items() for path in pair]
    done = subprocess.run([sys.executable, "-c", CONVERT_ALL, str(LLAMA_CPP), *words], capture_output=True, text=True, check=False)
    assert not done.stdout, done.stdout[-3000:]
    assert not done.returncode, done.stderr[-3000:]


def plain(field: Field) -> tuple:
    value = field.value.tolist() if isinstance(field.value, np.ndarray) else field.value
    return field.type, field.element, np.float32(value) if isinstance(value, float) else value


def data(container: Container, name: str) -> bytes:
    start = container.offsets[name]
    return container.path.read_bytes()[start : start + container.specs[name].nbytes]


def assert_same(ours: Path, theirs: Path, but: Collection[str] = (), elsewhere: Collection[str] = ()) -> None:
    """Every key, type and value, but for the keys ``but``, and in the same order, but for those that they write ``elsewhere``; every
    tensor's name, place in the order, type, shape and bytes. Ours has quantcli.* keys besides."""
    a, b = read_header(ours), read_header(theirs)
    skipped = {*but, *elsewhere}
    assert [key for key in a.fields if not key.startswith("quantcli.") and key not in skipped] == [k for k in b.fields if k not in skipped]
    for key, field in b.fields.items():
        assert key in but or plain(a.fields[key]) == plain(field), key
    assert list(a.specs.values()) == list(b.specs.values())
    for name in a.specs:
        assert data(a, name) == data(b, name), name


def log_probabilities(path: Path, text: Path, n_ctx: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What llama.cpp computes with the file at ``path`` for windows of ``n_ctx`` tokens of ``text``, in float32 throughout.

    Returns the windows' ids [n_windows, n_ctx] and the log probabilities [n_windows, n_ctx − 1 − n_ctx // 2, n_vocab] after each token of
    their second halves but the last. llama-perplexity writes them in 16 bits between the largest and the smallest of a token.
    """
    file = path.with_suffix(".logits")
    precise = ["-ctk", "f32", "-ctv", "f32", "-fa", "off"]
    size = ["-c", str(n_ctx), "-b", str(n_ctx), "-t", "1", "--no-warmup"]
    run("llama-perplexity", "-m", path, "-f", text, "--kl-divergence-base", file, *size, *precise)
    raw = file.read_bytes()
    assert raw[:8] == b"_logits_"
    n_ctx, n_vocab, n_windows = struct.unpack("<3i", raw[8:20])
    ids = np.frombuffer(raw, "<i4", n_windows * n_ctx, 20).reshape(n_windows, n_ctx)
    width = 2 * ((n_vocab + 1) // 2) + 4
    coded = np.frombuffer(raw, "<u2", -1, 20 + ids.nbytes).reshape(n_windows, -1, width)
    scale, least = (np.ascontiguousarray(coded[..., 2 * k : 2 * k + 2]).view("<f4") for k in (0, 1))
    return torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(coded[..., 4 : 4 + n_vocab] * scale + least)
