"""Makes ``mixes.json``: the type that llama-quantize gives every tensor of ``mix_models.MODELS`` in every file type.

python tests/data/make_mixes.py PATH/TO/llama-quantize
"""

from __future__ import annotations

import json
import string
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from quantcli.formats.gguf.types.mixes import TABLE
from support.mix_models import GOLDEN, LEFT, MODELS, some_imatrix, sparse_file, types_by_llama_quantize

FILE_TYPES = [name for name in TABLE if name != "F32"]
"""All but the one that the mock models' weights have already, which llama-quantize would only copy."""


def main(program: str) -> None:
    letters: dict[str, str] = {}
    models = {}
    with tempfile.TemporaryDirectory() as folder:
        imatrix = some_imatrix(Path(folder) / "imatrix.dat")
        for name, model in MODELS.items():
            path = sparse_file(model, Path(folder) / "model.gguf")
            models[name] = {}
            for file_type in FILE_TYPES:
                for suffix, options in (("", ()), (" weighed", ("--imatrix", imatrix))):
                    types = types_by_llama_quantize(Path(program), path, file_type, *options)
                    for ggml_type in types.values():
                        letters.setdefault(ggml_type, string.ascii_letters[len(letters)])
                    models[name][file_type + suffix] = "".join(letters.get(types.get(tensor, ""), LEFT) for tensor in model.names)
    GOLDEN.write_text(json.dumps({"letters": {letter: name for name, letter in letters.items()}, "models": models}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
