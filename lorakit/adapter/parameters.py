"""Which bare parameter of a module a wrapper means: adapters of `target_parameters` do not say.

Several parameters of one module have nested wrappers, and the file records only how deep each is:
the parameter that the module registered first lies innermost, behind the most `base_layer`.

Source: huggingface/peft v0.21.2, src/peft/tuners/lora/layer.py, ParamWrapper; the order of
registration is that of the experts of huggingface/transformers v5.23.
"""

from collections.abc import Mapping, Sequence

from lorakit.adapter.adapter import Adapter
from lorakit.adapter.module import Module
from lorakit.errors import MisfitError
from lorakit.formats.peft import REGISTERED


def parameters_of(adapter: Adapter) -> dict[str, str]:
    """The parameter that each module of the adapter targets, by its key in `Adapter.modules`; only
    those that `target_parameters` means.

    Raises:
        MisfitError: the config names more or fewer parameters of a module than the file wraps, or
            several whose order is not known.
    """
    wanted = adapter.config.target_parameters
    by_module: dict[str, dict[int, str]] = {}
    for key, module in adapter.modules.items():
        if module.low_rank and not module.inner:
            by_module.setdefault(module.name, {})[module.level] = key
    found: dict[str, str] = {}
    for name, levels in by_module.items():
        leaves = _targeted(wanted, name, max(levels) + 1)
        if any(levels) or (leaves and not _plain(adapter, name, leaves)):
            found |= _assigned(adapter, name, levels, leaves)
    return found


def _targeted(wanted: Sequence[str], module: str, count: int) -> list[str]:
    """The parameters of a module among the targets, in their order of registration.

    A target that is a mere leaf means any module that has such a parameter, which the file does not
    tell: those are left out where the ones of this very module are as many as it has wrapped.
    """
    pairs = [t.rpartition(".") for t in wanted]
    named = {p for m, _, p in pairs if m and (module == m or module.endswith(f".{m}"))}
    leaves = named if len(named) == count else named | {p for m, _, p in pairs if not m}
    return sorted(leaves, key=lambda p: REGISTERED.index(p) if p in REGISTERED else len(REGISTERED))


def _plain(adapter: Adapter, module: str, leaves: Sequence[str]) -> bool:
    """Whether a module is adapted as a layer, although a target that is a mere leaf fits any."""
    bare = all(leaf in adapter.config.target_parameters for leaf in leaves)
    return (
        bare and bool(adapter.config.raw.get("target_modules")) and adapter.config.targets(module)
    )


def _assigned(
    adapter: Adapter, name: str, levels: Mapping[int, str], leaves: Sequence[str]
) -> dict[str, str]:
    deepest = max(levels)
    unknown = [p for p in leaves if p not in REGISTERED]
    if sorted(levels) != list(range(deepest + 1)) or len(leaves) != deepest + 1:
        raise MisfitError(
            f"{name!r} has {len(levels)} wrapped parameters, target_parameters of its config names "
            f"{len(leaves)} ({', '.join(leaves) or 'none'}).",
            hint="Mend target_parameters in adapter_config.json, or save the adapter again.",
            file=adapter.path,
            tensor=_first(adapter.modules[levels[deepest]]),
        )
    if unknown and len(leaves) > 1:
        raise MisfitError(
            f"{name!r} has several wrapped parameters, and in which order {unknown[0]!r} comes "
            "among them is not known.",
            hint="Merge it with PEFT.",
            file=adapter.path,
            tensor=_first(adapter.modules[levels[deepest]]),
        )
    return {levels[deepest - i]: leaf for i, leaf in enumerate(leaves)}


def _first(module: Module) -> str:
    return module.a.name
