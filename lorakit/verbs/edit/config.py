"""The config of an edited adapter: that of the adapter, with what is another now.

Rule: fields that an edit has nothing to do with stay as they are, unknown ones included.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from lorakit.adapter.adapter import Adapter
from lorakit.adapter.new_config import Saved, config_of
from lorakit.formats.peft import saves
from lorakit.verbs.edit.selection import Held
from lorakit.verbs.edit.strengths import Scaled

# What PEFT takes for no module at all (huggingface/peft v0.21.2, src/peft/utils/constants.py).
NO_MODULE = "dummy-target-modules"
PATTERNS = ("rank_pattern", "alpha_pattern")
NUMBERS = ("r", "lora_alpha", *PATTERNS)


def edited_config(
    adapter: Adapter,
    stays: Sequence[Held],
    gone: Sequence[Held],
    weights: Sequence[Scaled],
    *,
    rslora: bool,
    flatten: bool = False,
) -> dict[str, Any]:
    """The config of what stays; `weights` are the updates among that. With `flatten` patterns go,
    also where all of them say the same.
    """
    raw = dict(adapter.config.raw)
    same_names = not gone and all(one.new == one.module for one in stays)
    patterns = flatten and any(raw.get(name) for name in PATTERNS)
    same_numbers = rslora == adapter.config.rslora and not patterns
    same_numbers &= all(
        (one.rank, one.alpha, one.scaling) == (one.new_rank, one.old_alpha, one.new_scaling)
        for one in weights
    )
    if same_names and same_numbers:
        return raw
    if rslora != adapter.config.rslora:
        raw["use_rslora"] = rslora
    if not same_names:
        raw |= _whole(raw, stays, gone)
        if not weights and any(one.kind == "update" for one in gone):
            raw |= {"target_modules": NO_MODULE, "rank_pattern": {}, "alpha_pattern": {}}
            raw |= {"target_parameters": None} if "target_parameters" in raw else {}
    renames = {one.module: one.new for one in stays if one.kind in ("rows", "whole")}
    found = config_of(raw, _saved(weights), renames, version=None)
    if same_names:
        return {**raw, **{n: found[n] for n in NUMBERS}}
    return found


def _saved(weights: Sequence[Scaled]) -> list[Saved]:
    """What a config tells of each name; a MultiheadAttention is one name for two weights."""
    found = {}
    for one in weights:
        name = one.held.new_name if one.held.parameter else one.held.new
        found[name] = Saved(name, one.new_rank, one.alpha, not one.held.parameter)
    return list(found.values())


def _whole(raw: Mapping[str, Any], stays: Sequence[Held], gone: Sequence[Held]) -> dict[str, Any]:
    """What a config says of tensors held whole and of token rows, once some are gone."""
    kept = {kind: [o for o in stays if o.kind == kind] for kind in ("whole", "rows")}
    lost = {kind: [o for o in gone if o.kind == kind] for kind in ("whole", "rows")}
    found: dict[str, Any] = {}
    saved = raw.get("modules_to_save")
    if lost["whole"] and isinstance(saved, list):
        left = [new for n in saved for new in _left(n, kept["whole"], lost["whole"])]
        found["modules_to_save"] = left or None
    biases = [any(o.parameter == "bias" for o in x["whole"]) for x in (kept, lost)]
    if biases == [False, True] and "bias" in raw:
        found["bias"] = "none"
    if lost["rows"]:
        indices = raw.get("trainable_token_indices")
        if isinstance(indices, Mapping):
            left_rows = {k: v for k, v in indices.items() if _means(k, kept["rows"])}
            found["trainable_token_indices"] = left_rows or None
        elif indices and not kept["rows"]:
            found["trainable_token_indices"] = None
    return found


def _left(name: str, kept: Sequence[Held], lost: Sequence[Held]) -> list[str]:
    """A name of `modules_to_save`, or where some of what it means is gone, what of that is left."""
    if not _means(name, lost):
        return [name]
    return sorted({one.module for one in kept if saves(name, one.module)})


def _means(name: str, things: Sequence[Held]) -> bool:
    """Whether a name of a config means the module of any: its path, or a part of that."""
    return any(saves(name, one.module) for one in things)
