"""Layers of bitsandbytes: what their codes mean, and new codes for a changed weight.

Source: bitsandbytes 0.46 to 0.50, nn/modules.py (Params4bit, Int8Params, Linear8bitLt).
"""

from collections.abc import Callable
from copy import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.runtime.offloaded import value_of

QUANTISED = ("Linear4bit", "Linear8bitLt")


def is_quantised(layer: nn.Module) -> bool:
    """Whether the weight of a layer is stored as codes, by bitsandbytes."""
    return type(layer).__name__ in QUANTISED


def dequantised(layer: nn.Module, parameter: str = "weight") -> Tensor:
    """A parameter of a layer as numbers: as it is, or as its codes mean it."""
    value = value_of(layer, parameter)
    if not is_quantised(layer) or parameter != "weight":
        return value.detach()
    from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant

    if type(layer).__name__ == QUANTISED[0]:
        return dequantize_4bit(*_unpacked(value))
    scales = value.SCB if value.SCB is not None else layer.state.SCB
    return int8_vectorwise_dequant(value.data, scales)


def _unpacked(weight: nn.Parameter) -> tuple[Tensor, Any]:
    """Codes and their state in the usual layout; a forward on a CPU packs them in place."""
    state = copy(weight.quant_state)
    if not getattr(state, "packing_format_for_cpu", False):
        return weight.data, state
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    state.original_nested = False  # scales stay numbers
    codes, plain = _convert_weight_packed_for_cpu_inverse(weight.data, state)
    plain.absmax = plain.absmax.T.reshape(-1).float()
    return codes, plain


def requantise(layer: nn.Module, weight: Tensor) -> Callable[[], None]:
    """Give a layer the codes of another weight, of the kind that it has; how to take that back."""
    import bitsandbytes

    old = layer._parameters["weight"]
    if type(layer).__name__ == QUANTISED[0]:
        state, facts = old.quant_state, ("blocksize", "quant_type", "quant_storage")
        new = bitsandbytes.nn.Params4bit(
            weight.to(getattr(state, "original_dtype", state.dtype)).cpu(),
            compress_statistics=getattr(state, "original_nested", state.nested),
            **{fact: getattr(old, fact) for fact in facts},
        ).to(old.device)
        _put4(layer, new, new.quant_state)
        return partial(_put4, layer, old, state)
    undo = partial(_put8, layer, old, layer.state.CB, layer.state.SCB)
    values = weight.to(torch.float16).cpu()
    new = bitsandbytes.nn.Int8Params(values, requires_grad=False, has_fp16_weights=False)
    _put8(layer, new.to(old.device))
    return undo


def _put4(layer: nn.Module, weight: nn.Parameter, state: object) -> None:
    layer._parameters["weight"], layer.quant_state = weight, state


def _put8(
    layer: nn.Module, weight: nn.Parameter, codes: object = None, scales: object = None
) -> None:
    """Without codes, the layer takes them from the weight the next time it is called."""
    layer._parameters["weight"], layer.state.CB, layer.state.SCB = weight, codes, scales
