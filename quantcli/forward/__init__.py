"""Runs one layer of a model of transformers on its own; the only importer of transformers."""

from quantcli.forward.classes import sees
from quantcli.forward.fused import expert_pieces
from quantcli.forward.hidden import HiddenStates
from quantcli.forward.layer import LoadedLayer
from quantcli.forward.listed import listed_linears
from quantcli.forward.model import Forward, run_dtype
from quantcli.forward.modules import modules_of
from quantcli.forward.positions import table_rows
from quantcli.forward.promises import Promise, promise
from quantcli.forward.skeleton import build
from quantcli.forward.tokenizers import tokenizer

__all__ = ["Forward", "HiddenStates", "LoadedLayer", "Promise", "build", "expert_pieces", "listed_linears", "modules_of", "promise"]
__all__ += ["run_dtype", "sees", "table_rows", "tokenizer"]
