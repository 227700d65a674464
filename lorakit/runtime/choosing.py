"""Which of the adapters that are attached to a model are active, and how much."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import nn

from lorakit.errors import UsageError
from lorakit.runtime.change import Change
from lorakit.runtime.fitting import config_of
from lorakit.runtime.seat import Use, seats_in
from lorakit.runtime.state import (
    activate,
    check_for_good,
    check_unmerged,
    found_in,
    meanwhile,
    state_of,
)

BASE = "__base__"  # a row of a batch that no adapter is for
# Models whose layers have the sequence before the batch, and names of experts, which are layers of
# their own and are given the tokens that a router chose.
# Source: huggingface/transformers v5.23, modeling files of these.
TURNED = ("bridgetower", "fsmt", "led", "longformer", "mask2former", "oneformer", "xlnet")
EXPERT = re.compile(r"\.experts\.\w*\d+\.")


def set_adapter(model: nn.Module, adapters: str | Sequence[str] | Mapping[str, float]) -> None:
    """Make one adapter the active one, or several, each with its weight (1 by default).

    The sum of their changes is applied, each taken of the original weight.

    Raises:
        UsageError: there is no such adapter, a weight is not finite, adapters are merged, or others
            are active for a while only.
        MisfitError: two of them replace the same tensor as a whole.
    """
    listed = [adapters] if isinstance(adapters, str) else adapters
    weights = listed if isinstance(listed, Mapping) else dict.fromkeys(listed, 1.0)
    state = found_in(model, *weights)
    check_unmerged(state)
    check_for_good(state)
    if wrong := [w for w in weights.values() if not math.isfinite(w)]:
        raise UsageError(f"a weight is {wrong[0]}.")
    activate(model, {name: [Use(float(w))] for name, w in weights.items()})


def active_adapters(model: nn.Module) -> dict[str, float]:
    """The active adapters and their weights; those that are merged, while any are."""
    state = state_of(model)
    return dict(state.merged) or {n: uses[0].weight for n, uses in state.active.items()}


def parameters(model: nn.Module, name: str = "") -> Iterator[nn.Parameter]:
    """The parameters of an adapter that are trained, for an optimiser; of all, where none is named.

    Raises:
        UsageError: there is no such adapter.
    """
    state = found_in(model, *([name] if name else ()))
    for loaded in [state.adapters[name]] if name else state.adapters.values():
        yield from (p for p in loaded.tensors.values() if p.requires_grad)


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Within this, the model is what it was without adapters."""
    state = found_in(model)
    check_unmerged(state)
    with meanwhile(model, {}):
        yield


def _shared(change: Change, *, turned: bool) -> str:
    """Why a change cannot be that of some rows of a batch only; "" where it can."""
    if change.path is None:
        return "as a whole, which cannot differ within a batch."
    if turned or EXPERT.search(change.place):
        return "in a layer that is not given the rows of a batch one after another."
    return ""


@contextmanager
def mixed_batch(model: nn.Module, adapter_names: Sequence[str]) -> Iterator[None]:
    """Within this, each row of a batch goes through the adapter that is named for it.

    `"__base__"` names none. A batch with several rows for each name (beams, or images, which are as
    many for each row) has them side by side.

    Raises:
        UsageError: there is no such adapter, or one changes weights that all rows share, or a layer
            that is not given the rows one after another.
    """
    names = set(adapter_names) - {BASE}
    check_unmerged(found_in(model, *names))
    turned = config_of(model).get("model_type") in TURNED
    for _, seat in seats_in(model):
        for name, change in seat.changes:
            if name in names and (why := _shared(change, turned=turned)):
                raise UsageError(
                    f"the adapter {name!r} changes {change.place!r} {why}",
                    hint="Use one batch for each adapter.",
                )
    uses = {n: [Use(1.0, tuple(one == n for one in adapter_names))] for n in names}
    with meanwhile(model, uses):
        yield
