"""SmolLM3: Llama's layers, of which every fourth rotates nothing."""

from dataclasses import replace

from quantcli.archs import Key, llama
from quantcli.archs.shared.usual import HEAD_SIZES, RMS, SIZES

ARCH = replace(
    llama.ARCH,
    model_types=("smollm3",),
    hf_class="SmolLM3ForCausalLM",
    gguf_arch="smollm3",
    keys=(
        *SIZES,
        "rope",
        RMS,
        *HEAD_SIZES,
        Key("vocab_size", "vocab_size"),
        Key("rope.dimension_count", computed="head_dim"),
    ),
    losses=("window of the last layers",),
    defaults={"tie_word_embeddings": True, "rope_theta": 2000000.0},
)
