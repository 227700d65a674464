"""lorakit: LoRA adapter files and base checkpoints, merged, checked and explained without a model.

The verbs are functions of this package, loaded when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

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
    "save_adapter": "lorakit.verbs.save",
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

if TYPE_CHECKING:  # the same, for tools that read types
    from lorakit import runtime as runtime
    from lorakit.adapter.adapter import Adapter as Adapter
    from lorakit.adapter.adapter import open_adapter as open_adapter
    from lorakit.errors import LorakitError as LorakitError
    from lorakit.math.lowrank import LowRank as LowRank
    from lorakit.math.lowrank import cat as cat
    from lorakit.math.lowrank import delta as delta
    from lorakit.math.lowrank import transpose as transpose
    from lorakit.store.checkpoint import Checkpoint as Checkpoint
    from lorakit.store.checkpoint import open_checkpoint as open_checkpoint
    from lorakit.verbs.check import check as check
    from lorakit.verbs.combine import combine as combine
    from lorakit.verbs.combine import plan_combine as plan_combine
    from lorakit.verbs.compare import compare as compare
    from lorakit.verbs.convert import convert as convert
    from lorakit.verbs.convert import plan_convert as plan_convert
    from lorakit.verbs.demo import demo as demo
    from lorakit.verbs.edit import edit as edit
    from lorakit.verbs.edit import plan_edit as plan_edit
    from lorakit.verbs.extract import extract as extract
    from lorakit.verbs.extract import plan_extract as plan_extract
    from lorakit.verbs.fold import fold as fold
    from lorakit.verbs.init import init as init
    from lorakit.verbs.init import plan_init as plan_init
    from lorakit.verbs.inspect import inspect as inspect
    from lorakit.verbs.job import RunOptions as RunOptions
    from lorakit.verbs.loftq import loftq as loftq
    from lorakit.verbs.loftq import plan_loftq as plan_loftq
    from lorakit.verbs.merge import merge as merge
    from lorakit.verbs.merge import plan_merge as plan_merge
    from lorakit.verbs.reformat import plan_reformat as plan_reformat
    from lorakit.verbs.resize import plan_resize as plan_resize
    from lorakit.verbs.resize import resize as resize
    from lorakit.verbs.save import save_adapter as save_adapter
    from lorakit.verbs.unmerge import plan_unmerge as plan_unmerge
    from lorakit.verbs.unmerge import unmerge as unmerge
    from lorakit.verbs.verify import verify as verify
else:

    def __getattr__(name: str) -> Any:
        if name == "runtime":  # needs torch
            return importlib.import_module("lorakit.runtime")
        if name not in _HOMES:
            raise AttributeError(f"module 'lorakit' has no attribute {name!r}")
        return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
