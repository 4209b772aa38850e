"""quantcli: a Hugging Face checkpoint becomes the best possible quantized model, on the hardware one has, with proof.

    import quantcli as qc
    result = qc.quantize("MODEL", "out", "gptq-int4", data="mine.txt", on_event=print)

The names below are imported when they are first used, so ``import quantcli`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantcli.api import (
        Calibration,
        ImportanceMatrix,
        Plan,
        Recipe,
        Result,
        Scheme,
        Scores,
        StatsFile,
        Windows,
        calibrate,
        evaluate,
        export,
        inspect,
        open,
        plan,
        quantize,
        use_device,
    )
    from quantcli.checkpoint.checkpoint import Checkpoint
    from quantcli.errors import (
        CheckpointError,
        GateError,
        KernelError,
        NumericsError,
        OptionError,
        QuantcliError,
        RecipeError,
        ResourceError,
        UnsupportedError,
    )
    from quantcli.walk.events import Finished, LayerDone, Note, Planned, Resumed

__version__ = "0.1.0"

__all__ = [
    "Calibration",
    "Checkpoint",
    "CheckpointError",
    "Finished",
    "GateError",
    "ImportanceMatrix",
    "KernelError",
    "LayerDone",
    "Note",
    "NumericsError",
    "OptionError",
    "Plan",
    "Planned",
    "QuantcliError",
    "Recipe",
    "RecipeError",
    "ResourceError",
    "Result",
    "Resumed",
    "Scheme",
    "Scores",
    "StatsFile",
    "UnsupportedError",
    "Windows",
    "__version__",
    "calibrate",
    "evaluate",
    "export",
    "inspect",
    "open",
    "plan",
    "quantize",
    "use_device",
]

_HOME = {
    "Checkpoint": "checkpoint.checkpoint",
    **dict.fromkeys(("Finished", "LayerDone", "Note", "Planned", "Resumed"), "walk.events"),
    **dict.fromkeys((name for name in __all__ if name.endswith("Error")), "errors"),
}
"""Name → the module that has it, where that is not ``api``."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'quantcli' has no attribute '{name}'")
    return getattr(import_module(f"quantcli.{_HOME.get(name, 'api')}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
