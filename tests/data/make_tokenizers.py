"""Write down the tokenizer keys that convert_hf_to_gguf makes for every family.

python tests/data/make_tokenizers.py LLAMA_CPP
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.converted_tokenizers import GOLDEN, converted

with tempfile.TemporaryDirectory() as folder:
    manifests = converted(Path(sys.argv[1]), Path(folder))
GOLDEN.write_text(json.dumps(manifests, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
