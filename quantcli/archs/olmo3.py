"""OLMo 3: OLMo 2 with windows in three layers of four."""

from dataclasses import replace

from quantcli.archs import Key, olmo2
from quantcli.archs.shared.usual import USUAL

ARCH = replace(
    olmo2.ARCH,
    model_types=("olmo3",),
    hf_class="Olmo3ForCausalLM",
    keys=(
        *USUAL,
        Key("attention.sliding_window", "sliding_window"),
        Key("attention.sliding_window_pattern", kind="bool", computed="layers with a window, three of four"),
    ),
    aliases={"rope_theta": "rope_local_base_freq"},  # layers with a window rotate on the same base, unscaled
    defaults={"sliding_window": 4096, "rope_theta": 500000.0, "rope_local_base_freq": 500000.0},
)
