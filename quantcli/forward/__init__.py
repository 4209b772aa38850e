"""Runs a decoder layer of any HF causal LM on its own; the only importer of transformers."""

from quantcli.forward.fused import expert_pieces
from quantcli.forward.hidden import HiddenStates
from quantcli.forward.layer import LoadedLayer
from quantcli.forward.model import Forward, run_dtype
from quantcli.forward.modules import modules_of
from quantcli.forward.skeleton import build
from quantcli.forward.tokenizers import tokenizer

__all__ = ["Forward", "HiddenStates", "LoadedLayer", "build", "expert_pieces", "modules_of", "run_dtype", "tokenizer"]
