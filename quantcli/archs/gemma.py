"""Gemma 1 and CodeGemma: Llama's layers with norms that store w − 1, and embeddings that are always the head too."""

from quantcli.archs import REQUIRED, Architecture, Key
from quantcli.archs.shared.usual import ATTENTION, ATTENTION_NAMES, DROPPED, MLP, MLP_NAMES, NORM_NAMES, RMS, TIED_ENDS

KEYS = (
    Key("context_length", "max_position_embeddings", default=REQUIRED),
    Key("embedding_length", "hidden_size", default=REQUIRED),
    Key("block_count", "num_hidden_layers", default=REQUIRED),
    Key("feed_forward_length", "intermediate_size", default=REQUIRED),
    Key("attention.head_count", "num_attention_heads", default=REQUIRED),
    Key("attention.head_count_kv", ("num_key_value_heads", "num_attention_heads")),
    RMS,
    Key("attention.key_length", "head_dim", default=REQUIRED),
    Key("attention.value_length", "head_dim", default=REQUIRED),
)

ARCH = Architecture(
    model_types=("gemma",),
    hf_class="GemmaForCausalLM",
    layer="model.layers.{i}",
    linears=(*ATTENTION, *MLP),
    gguf_arch="gemma",
    gguf_names={**TIED_ENDS, **ATTENTION_NAMES, **NORM_NAMES, **MLP_NAMES},
    norm_offset=1.0,
    keys=KEYS,
    defaults={"head_dim": 256, "max_position_embeddings": 8192, "rms_norm_eps": 1e-6, "tie_word_embeddings": True},
    dropped=DROPPED,
    fixed={"hidden_act": "gelu_pytorch_tanh"},
)
