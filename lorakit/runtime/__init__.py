"""Adapters on a live model: put on, switched, trained, merged and taken out again to the bit."""

try:
    import torch as _torch  # noqa: F401 - what all of this is about
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "lorakit.runtime needs torch: pip install 'lorakit[runtime]'", name=error.name
    ) from error

from lorakit.runtime.attached import (
    Attachment,
    attach,
    delete_adapter,
    detach,
    swap_adapter,
    unload,
)
from lorakit.runtime.choosing import (
    active_adapters,
    disable_adapter,
    mixed_batch,
    parameters,
    set_adapter,
)
from lorakit.runtime.loading import load_pretrained
from lorakit.runtime.merged import Merged, merge_adapter, merge_and_unload, unmerge_adapter
from lorakit.runtime.moments import collect_moments
from lorakit.runtime.saving import add_weighted_adapter, save_adapter

__all__ = [
    "Attachment",
    "Merged",
    "active_adapters",
    "add_weighted_adapter",
    "attach",
    "collect_moments",
    "delete_adapter",
    "detach",
    "disable_adapter",
    "load_pretrained",
    "merge_adapter",
    "merge_and_unload",
    "mixed_batch",
    "parameters",
    "save_adapter",
    "set_adapter",
    "swap_adapter",
    "unload",
    "unmerge_adapter",
]
