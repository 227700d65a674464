"""An adapter of several models of a pipeline in one file of PEFT, whose modules are called after
these: what `combine` and `resize` make of files for several models.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

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
    raw = adapter.config.raw
    patterns = {
        name: {re.sub(r"^\^", rf"^{model}\.", p): value for p, value in raw[name].items()}
        for name in PATTERNS
        if isinstance(raw.get(name), Mapping)
    }
    config = AdapterConfig({**raw, **patterns}, adapter.config.file)
    return replace(adapter, config=config, modules=modules, full=full)


def _of(adapter: "Adapter", model: str) -> "Adapter":
    front = f"{model}."
    modules = {
        key.removeprefix(front): replace(module, name=module.name.removeprefix(front))
        for key, module in adapter.modules.items()
        if module.name.startswith(front)
    }
    full = {n.removeprefix(front): i for n, i in adapter.full.items() if n.startswith(front)}
    config = AdapterConfig(_config_of(adapter.config.raw, model), adapter.config.file)
    return replace(adapter, config=config, modules=modules, full=full, part=model)


def _config_of(raw: Mapping[str, Any], model: str) -> dict[str, Any]:
    """The config with patterns for the names without that of the model; what is for another model
    alone is left out.
    """
    front = re.compile(rf"\^?{model}\\?\.")
    patterns = {
        name: {
            front.sub("^", pattern): value
            for pattern, value in raw[name].items()
            if model_of(pattern.lstrip("^").replace("\\", "")) in ("", model)
        }
        for name in PATTERNS
        if isinstance(raw.get(name), Mapping)
    }
    return {**raw, **patterns}
