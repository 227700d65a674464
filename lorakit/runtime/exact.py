"""In which arithmetic a weight is computed that is kept, or rounded once."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def wide(dtype: torch.dtype) -> torch.dtype:
    """What weights of a dtype are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def exactly(function: Function) -> Function:
    """A function of a tensor, its first argument, that torch.autocast around it does not reach."""

    @wraps(function)
    def exact(tensor: torch.Tensor, *rest: Any, **options: Any) -> Any:
        with torch.autocast(tensor.device.type, enabled=False):
            return function(tensor, *rest, **options)

    return exact  # type: ignore[return-value]
