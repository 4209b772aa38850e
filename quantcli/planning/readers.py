"""What the readers of a folder make of its linears: the modules that they look for, and what they load dense whatever the folder has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from quantcli import archs
from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.modules import DERIVED, Modules
from quantcli.checkpoint.views import HEAD_WEIGHT
from quantcli.experts import expert_of, is_router, stacks_of
from quantcli.formats import Format
from quantcli.planning.schemes import is_quantized, layer_of
from quantcli.tensors import Scheme


def reader_modules(source: Checkpoint, fmt: Format) -> Modules:
    """The modules of ``source`` where a folder of ``fmt`` names modules and readers may have other names for them than the folder."""
    if not fmt.lists_modules or is_plain(source):
        return Modules()
    from quantcli.forward import modules_of  # transformers takes seconds to import

    return modules_of(source) or Modules()


def is_plain(source: Checkpoint) -> bool:
    """Whether ``source`` is a language model and nothing else, of a family in ``archs/``: transformers has its linears by the same names.

    Its matrices are then linears of its layers, what belongs to experts, an embedding, or the output embedding.
    """
    arch = archs.of(source.config)
    if arch is None or isinstance(arch, archs.StoredNames) or source.config.get("text_config"):
        return False
    stacks = stacks_of(source.specs)
    root = arch.layer.partition(".")[0]
    return all(
        len(spec.shape) != 2 or arch.tap(name) or name == HEAD_WEIGHT or "embed" in name or expert_of(name) or is_router(name, stacks)
        for name, spec in source.specs.items()
        if name.endswith(".weight")
    ) and all(name.startswith((f"{root}.", "lm_head.")) for name in source.specs)


def dense_reasons(source: Checkpoint, fmt: Format, schemes: Mapping[str, Scheme], modules: Modules) -> dict[str, str]:
    """The tensors of ``schemes`` that readers of ``fmt`` load dense whatever the folder has → why."""
    if fmt.has_own_names:
        return {}
    arch, stacks = archs.of(source.config), stacks_of(source.specs)
    reasons: dict[str, str] = {}
    for name, scheme in schemes.items():
        module = modules.of.get(name)
        if fmt.stays_dense(name):
            reasons[name] = f"engines that read {fmt.name} load them dense"
        elif not is_quantized(scheme):
            continue
        elif is_router(name, stacks):
            reasons[name] = "engines load routers dense"
        elif module is not None and module.kept:
            reasons[name] = f"transformers' {module.kept}, and loads no codes there"
        elif not fmt.takes_derived and (
            (module is not None and module.kind == DERIVED) or (arch is not None and arch.tap(name) and arch.derived)
        ):
            reasons[name] = f"they are of a class derived from torch's linear, for which transformers loads no codes of {fmt.name}"
    return reasons


def left_reasons(left: Sequence[str], taps: Mapping[str, str], modules: Modules) -> dict[str, str]:
    """The matrices of layers that no linear is found for, ``left`` → why they stay dense. ``taps``: the linears that are found."""
    run = {layer_of(name) for name in taps}
    reasons: dict[str, str] = {}
    for name in left:
        module = modules.of.get(name)
        if run and layer_of(name) not in run:
            reasons[name] = "matrices in layers that no text runs through (of images or sound, or for further tokens)"
        elif module is not None and module.kept:
            reasons[name] = f"transformers' {module.kept}, and loads no codes there"
        else:
            reasons[name] = "matrices in layers that are no linears of their own (fused experts, routers)"
    return reasons
