"""Parameters that accelerate keeps in memory or on disk while their layer is not called.

Source: huggingface/accelerate v1.15, src/accelerate/hooks.py (AlignDevicesHook, SequentialHook).
"""

from typing import Any

import torch
from torch import nn


def is_offloaded(layer: nn.Module, parameter: str) -> bool:
    """Whether a parameter is there only while the layer is called."""
    value = layer._parameters.get(parameter)
    return value is not None and value.is_meta and _hook(layer) is not None


def value_of(layer: nn.Module, parameter: str) -> Any:
    """A parameter as it is, or where it was offloaded as it will be when the layer is called."""
    if not is_offloaded(layer, parameter):
        return layer._parameters[parameter]
    return _hook(layer).weights_map[parameter].to(device_of(layer, parameter))


def device_of(layer: nn.Module, parameter: str) -> torch.device:
    """Where a parameter is while the layer is called; of one that is None, its weight."""
    value = layer._parameters[parameter]
    value = layer._parameters["weight"] if value is None else value
    hook = _hook(layer) if value.is_meta else None
    return value.device if hook is None else torch.device(hook.execution_device)


def _hook(layer: nn.Module) -> Any:
    """The hook that has the values of what a layer is without, and moves nothing else."""
    one: Any = getattr(layer, "_hf_hook", None)
    for hook in getattr(one, "hooks", (one,)):
        if getattr(hook, "weights_map", None) is not None:
            return None if hook.place_submodules else hook
    return None
