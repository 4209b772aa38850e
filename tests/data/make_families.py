"""Write down llama.cpp's own file of every family: its keys and values, and each tensor's type, shape and hash.

    QUANTCLI_LLAMA_CPP=… PYTHONPATH=.:tests python tests/data/make_families.py [CASE…]

convert_hf_to_gguf --outtype bf16 and llama-quantize … BF16 (or the case's file type) on the models of
tests/support/families.py; one file a case in tests/data/families.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from support import families
from support.llamacpp_peer import convert_all, run


def main(asked: list[str]) -> None:
    cases = [name for name, case in families.CASES.items() if not case.converted_as and not case.unconverted]
    cases = [name for name in cases if not asked or name in asked]
    with tempfile.TemporaryDirectory() as root:
        folders = {name: families.make(name, Path(root, str(k), "tiny")) for k, name in enumerate(cases)}
        convert_all({folder: folder.with_suffix(".gguf") for folder in folders.values()})
        for name, folder in folders.items():
            run("llama-quantize", folder.with_suffix(".gguf"), folder.with_suffix(".bf16"), families.CASES[name].file_type, "1")
            text = families.as_text(families.manifest(folder.with_suffix(".bf16")))
            families.golden(name).write_text(text)


if __name__ == "__main__":
    main(sys.argv[1:])
