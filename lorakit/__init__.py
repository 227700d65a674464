"""lorakit: LoRA adapter files and base checkpoints, merged, checked and explained without a model.

The verbs are functions of this package, loaded when they are first used.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

# Public name -> the module that has it.
_HOMES = {
    "merge": "lorakit.verbs.merge",
    "plan_merge": "lorakit.verbs.merge",
    "unmerge": "lorakit.verbs.unmerge",
    "plan_unmerge": "lorakit.verbs.unmerge",
    "combine": "lorakit.verbs.combine",
    "plan_combine": "lorakit.verbs.combine",
    "resize": "lorakit.verbs.resize",
    "plan_resize": "lorakit.verbs.resize",
    "init": "lorakit.verbs.init",
    "plan_init": "lorakit.verbs.init",
    "loftq": "lorakit.verbs.loftq",
    "plan_loftq": "lorakit.verbs.loftq",
    "extract": "lorakit.verbs.extract",
    "plan_extract": "lorakit.verbs.extract",
    "convert": "lorakit.verbs.convert",
    "plan_convert": "lorakit.verbs.convert",
    "plan_reformat": "lorakit.verbs.reformat",
    "compare": "lorakit.verbs.compare",
    "check": "lorakit.verbs.check",
    "edit": "lorakit.verbs.edit",
    "plan_edit": "lorakit.verbs.edit",
    "verify": "lorakit.verbs.verify",
    "inspect": "lorakit.verbs.inspect",
    "demo": "lorakit.verbs.demo",
    "RunOptions": "lorakit.verbs.job",
    "Adapter": "lorakit.adapter.adapter",
    "open_adapter": "lorakit.adapter.adapter",
    "Checkpoint": "lorakit.store.checkpoint",
    "open_checkpoint": "lorakit.store.checkpoint",
    "LowRank": "lorakit.math.lowrank",
    "delta": "lorakit.math.lowrank",
    "transpose": "lorakit.math.lowrank",
    "cat": "lorakit.math.lowrank",
    "fold": "lorakit.verbs.fold",
    "LorakitError": "lorakit.errors",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lorakit' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
