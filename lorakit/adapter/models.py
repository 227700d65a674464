"""An adapter of several models of a pipeline in one file of PEFT, whose modules are called after
these: what `combine` and `resize` make of files for several models.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from lorakit.adapter.config import AdapterConfig
from lorakit.formats.components import model_of, models_in

if TYPE_CHECKING:
    from lorakit.adapter.adapter import Adapter

PATTERNS = ("rank_pattern", "alpha_pattern")


def by_model(adapter: "Adapter") -> dict[str, "Adapter"]:
    """What an adapter is to each model, by the names of its modules; {} where these say none."""
    names = [*(m.name for m in adapter.modules.values()), *adapter.full]
    return {model: _of(adapter, model) for model in models_in(names)}


def side_by_side(adapters: Sequence["Adapter"]) -> list["Adapter"]:
    """The same adapters; if they are for several models, the names of modules of each begin with
    that of its model.
    """
    models = {model for adapter in adapters for model in adapter.parts}
    if len(models) < 2:
        return list(adapters)
    return [_in(a, next(iter(a.parts))) if len(a.parts) == 1 else a for a in adapters]


def _in(adapter: "Adapter", model: str) -> "Adapter":
    """An adapter of one model with the name of that before its modules."""
    modules = {
        f"{model}.{key}": replace(module, name=f"{model}.{module.name}")
        for key, module in adapter.modules.items()
    }
    full = {f"{model}.{name}": info for name, info in adapter.full.items()}
    config = _with_patterns(adapter, lambda p: re.sub(r"^\^", rf"^{model}\.", p))
    return replace(adapter, config=config, modules=modules, full=full)


def _of(adapter: "Adapter", model: str) -> "Adapter":
    front = f"{model}."
    modules = {
        key.removeprefix(front): replace(module, name=module.name.removeprefix(front))
        for key, module in adapter.modules.items()
        if module.name.startswith(front)
    }
    full = {n.removeprefix(front): i for n, i in adapter.full.items() if n.startswith(front)}
    config = _with_patterns(adapter, lambda p: _for_model(p, model))
    return replace(adapter, config=config, modules=modules, full=full, part=model)


def _for_model(pattern: str, model: str) -> str:
    """A pattern for names without that of the model; "" of one that is for another model alone."""
    if model_of(pattern.lstrip("^").replace("\\", "")) not in ("", model):
        return ""
    return re.sub(rf"\^?{model}\\?\.", "^", pattern)


def _with_patterns(adapter: "Adapter", change: Callable[[str], str]) -> AdapterConfig:
    """The config with its patterns changed, but for those of which nothing is left."""
    raw = adapter.config.raw
    patterns = {
        name: {new: value for pattern, value in raw[name].items() if (new := change(pattern))}
        for name in PATTERNS
        if isinstance(raw.get(name), Mapping)
    }
    return AdapterConfig({**raw, **patterns}, adapter.config.file)
