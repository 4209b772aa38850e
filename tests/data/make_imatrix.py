"""Makes ``pico-imatrix.gguf``, what llama-imatrix measures of the pico model, and ``pico-weighed.json``, what llama-quantize makes with it.

    python tests/data/make_imatrix.py LLAMA_CPP

LLAMA_CPP is a source tree built in build/. Keys and values are kept in float32 and attention is plain, as in transformers: by its
defaults llama.cpp rounds them to float16, which moves the figures by 5e-4.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from data.make_manifest import manifest
from quantcli.formats import open_checkpoint
from support.gguf_export import export

HERE = Path(__file__).parent
N_CTX = 64
ZEN = """Beautiful is better than ugly. Explicit is better than implicit. Simple is better than complex. Complex is better than complicated.
Flat is better than nested. Sparse is better than dense. Readability counts. Special cases aren't special enough to break the rules.
Although practicality beats purity. Errors should never pass silently. Unless explicitly silenced.
In the face of ambiguity, refuse the temptation to guess. Now is better than never.
If the implementation is hard to explain, it's a bad idea.
Namespaces are one honking great idea: let's do more of those!"""
"""From the Zen of Python, by Tim Peters, which is in the public domain."""
TEXT = "\n".join(" ".join(ZEN.split()[k:] + ZEN.split()[:k]) for k in range(0, 60, 6))

FILE_TYPES = ("Q4_0", "Q5_0", "Q4_K_M")


def imatrix_of(llama_cpp: Path, model: Path, text: Path, out: Path, *options: str | Path) -> Path:
    """What llama-imatrix measures of a GGUF file."""
    exact = ("-c", str(N_CTX), "-b", str(N_CTX), "-t", "1", "--no-ppl", "-ctk", "f32", "-ctv", "f32", "-fa", "off")
    command = [llama_cpp / "build/bin/llama-imatrix", "-m", model, "-f", text.name, "-o", out, *exact, *options]
    subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL, cwd=text.parent)
    return out


def main(llama_cpp: Path) -> None:
    with tempfile.TemporaryDirectory() as folder, open_checkpoint(str(HERE / "pico")) as source:
        at = Path(folder)
        (at / "text.txt").write_text(TEXT)
        golden = imatrix_of(llama_cpp, export(source, at / "f32.gguf", "F32"), at / "text.txt", HERE / "pico-imatrix.gguf")
        dense, manifests = export(source, at / "bf16.gguf", "BF16"), {}
        for name in FILE_TYPES:
            command = [llama_cpp / "build/bin/llama-quantize", "--imatrix", golden, dense, at / f"{name}.gguf", name, "1"]
            subprocess.run(command, check=True, capture_output=True)
            manifests[name] = manifest(at / f"{name}.gguf")
    (HERE / "pico-weighed.json").write_text(json.dumps(manifests, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
