"""Which release of which engine loads what of each format: a table as data, from which plans warn and pages are made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from quantcli import formats
from quantcli.tensors import Scheme


@dataclass(frozen=True, slots=True, kw_only=True)
class Support:
    """What one release of an engine loads of one format.

    ``options``: option of a scheme → the values that it takes, any where an option is missing; ``otherwise``: what to do for other values,
    "" where the folder does not load at all; ``needs``: what must be installed beside the engine; ``takes_experts``: whether codes of
    experts load, which a format has one by one and the engine's model may have as one tensor; ``is_tested``: a test has the program
    load what we write, the others are read from its source; ``is_said``: whether a plan warns, which it does not of a second reader.
    """

    engine: str
    version: str
    format: str
    options: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    otherwise: str = ""
    needs: str = ""
    takes_experts: bool = True
    is_tested: bool = False
    is_said: bool = True

    @property
    def release(self) -> str:
        return f"{self.engine} {self.version}"

    def unmet(self, scheme: Scheme) -> tuple[str, Any] | None:
        """The option of ``scheme``, and its value, that this release does not take; None where it takes all."""
        for option, values in self.options.items():
            if (value := scheme.get(option, values[0])) not in values:
                return option, value
        return None


SUPPORT: tuple[Support, ...] = (
    Support(engine="transformers", version="5.23", format="gptq", takes_experts=False, is_tested=True),
    Support(engine="transformers", version="5.23", format="awq", takes_experts=False, is_tested=True),
    Support(engine="transformers", version="5.23", format="bitsandbytes", is_tested=True),
    Support(
        engine="transformers",
        version="5.23",
        format="compressed-tensors",
        options={"sym": (True,)},
        otherwise="with `dequantize=True`",
        is_tested=True,
    ),
    Support(engine="transformers", version="5.23", format="fp8", options={"strategy": ("block",)}, is_tested=True),
    Support(engine="transformers", version="5.17", format="compressed-tensors", is_tested=True, is_said=False),
    Support(engine="GPTQModel", version="7.7", format="gptq", is_tested=True),
    Support(engine="GPTQModel", version="7.7", format="awq", is_tested=True),
    Support(engine="llama.cpp", version="", format="gguf", is_tested=True),
    Support(engine="vLLM", version="0.33", format="compressed-tensors", options={"bits": tuple(range(2, 9))}),
    Support(engine="vLLM", version="0.33", format="gptq", options={"bits": (4, 8), "sym": (True,), "desc_act": (False,)}),
    Support(engine="vLLM", version="0.33", format="awq"),
    Support(engine="vLLM", version="0.33", format="fp8"),
    Support(engine="vLLM", version="0.33", format="bitsandbytes", needs="vllm-bnb-plugin"),
    Support(engine="vLLM", version="0.33", format="gguf", needs="vllm-gguf-plugin", is_said=False),
    Support(engine="onnxruntime-genai", version="0.18", format="gptq", options={"sym": (True,)}, is_said=False),
)
"""vLLM from vllm/model_executor/layers/quantization of the wheel of 0.33.0: auto_gptq.py, compressed_tensors/, and its list of plug-ins;
onnxruntime-genai from its builder, which adds one to every zero point."""

ARGUMENT_KEYS: dict[str, frozenset[str]] = {
    "0.12.2": frozenset(
        ("num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic", "actorder", "observer", "observer_kwargs")
    ),
}
"""Release of compressed-tensors → the keys that arguments of a config group may have; others are errors. 0.12.2 is vLLM 0.13's."""

SCHEME_KEYS = frozenset(("targets", "weights", "input_activations", "output_activations", "format"))
"""The keys of a config group in compressed-tensors since 0.11, which refuses others."""

WORDS: dict[str, dict[Any, str]] = {
    "sym": {False: "zero points"},
    "desc_act": {True: "desc_act"},
    "strategy": {"tensor": "one scale for a weight"},
}
"""How a value of an option is told."""


def of(release: str, format_: str) -> Support | None:
    """What ``release`` ("vLLM 0.33") loads of ``format_``; None where that is not known."""
    return next((row for row in SUPPORT if row.release.strip() == release and row.format == format_), None)


def warnings(format_: str, schemes: Iterable[Scheme], *, experts: Iterable[Scheme] = ()) -> tuple[str, ...]:
    """A sentence for each engine that does not load ``schemes`` in ``format_`` as they are, with a format that it loads instead.
    ``experts``: those of ``schemes`` that matrices of experts have."""
    alike, of_experts = list(dict.fromkeys(schemes)), list(dict.fromkeys(experts))
    rows = (row for row in SUPPORT if row.format == format_ and row.is_said)
    return tuple(text for row in rows if (text := next(_warning(row, alike, of_experts), None)) is not None) if alike else ()


def _warning(row: Support, schemes: list[Scheme], experts: list[Scheme]) -> Iterator[str]:
    if experts and not row.takes_experts:
        way = f"; --format {other} does" if (other := instead(row, experts[0], is_expert=True)) else ""
        others = _loading_experts(row, experts[0])
        yield f"{row.release} loads no {row.format} codes of experts and leaves these experts at random{others}{way}"
    for scheme in schemes:
        if (unmet := row.unmet(scheme)) is None:
            continue
        what = told(*unmet)
        if row.otherwise:
            yield f"{row.release} loads {row.format} with {what} only {row.otherwise.replace('`', '')}"
        else:
            way = f"; --format {other} does" if (other := instead(row, scheme)) else ""
            yield f"{row.release} does not load {row.format} with {what}{way}"
    if row.needs:
        yield f"{row.release} loads {row.format} only with {row.needs}"


def _loading_experts(row: Support, scheme: Scheme) -> str:
    """The engines that are known to load the experts of ``row``'s format in ``scheme``, in brackets; "" without one."""
    loads = [o.release for o in SUPPORT if o.format == row.format and o.takes_experts and o.is_tested and o.unmet(scheme) is None]
    return f" ({' and '.join(loads)} {'does' if len(loads) == 1 else 'do'})" if loads else ""


def instead(row: Support, scheme: Scheme, *, is_expert: bool = False) -> str | None:
    """Another format that holds ``scheme`` and that the engine of ``row`` loads; without act-order, which others have no place for.
    ``is_expert``: whether it must load experts."""
    options = dict(scheme.options)
    plain = scheme.with_options(desc_act=False) if "desc_act" in options else scheme
    others = (other for other in SUPPORT if other.release == row.release and other.format != row.format and not other.needs)
    fits = (o for o in others if o.unmet(plain) is None and (o.takes_experts or not is_expert))
    return next((o.format for o in fits if formats.of(o.format).supports(plain)), None)


def told(option: str, value: Any) -> str:
    """``value`` of ``option`` in words: "3 bits"."""
    return f"{value} {option}" if option == "bits" else WORDS.get(option, {}).get(value, f"{option} {value}")
