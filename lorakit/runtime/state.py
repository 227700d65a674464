"""What a model remembers of the adapters that are attached to it, kept on the model itself."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lorakit.errors import MisfitError, UsageError
from lorakit.runtime.change import Change
from lorakit.runtime.seat import Use, seats_in
from lorakit.verbs.base.targets import Options

STATE = "_lorakit"


@dataclass(frozen=True)
class Loaded:
    """An attached adapter: its config, its tensors by their names in the file, their dtypes there,
    and how it was attached.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, nn.Parameter]
    dtypes: Mapping[str, str]
    options: Options
    dtype: str
    trainable: bool = False


@dataclass
class State:
    """All that a model has to remember."""

    adapters: dict[str, Loaded] = field(default_factory=dict)
    active: dict[str, list[Use]] = field(default_factory=dict)
    frozen: list[nn.Parameter] = field(default_factory=list)
    originals: list[Callable[[], Any]] = field(default_factory=list)  # how to undo a merge
    merged: dict[str, float] = field(default_factory=dict)
    inseparable: str = ""  # a parameter that merging parted, in a model that always shares it
    meanwhile: bool = False  # within disable_adapter or mixed_batch
    folded: set[tuple[nn.Module, str]] = field(default_factory=set)  # parameters, by a merge
    spoiled: bool = False  # by a merge for good that did not end

    def take_back(self) -> None:
        """Undo a merge."""
        for undo in reversed(self.originals):
            undo()
        self.originals, self.merged = [], {}


def state_of(model: nn.Module) -> State:
    """What a model remembers of its adapters; of none, where there are none."""
    found: State | None = unwrapped(model).__dict__.get(STATE)
    return found if found is not None else State()


def unwrapped(model: nn.Module) -> nn.Module:
    """The model that torch.compile was given.

    Raises:
        UsageError: it is no model.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"a {type(model).__name__} is given where a torch.nn.Module is.",
            hint="Of a pipeline, give one of its models, such as pipe.unet.",
        )
    return getattr(model, "_orig_mod", model)


def found_in(model: nn.Module, *names: str) -> State:
    """The state of a model that has these adapters."""
    state = state_of(model)
    for name in names:
        if name not in state.adapters:
            known = ", ".join(map(repr, state.adapters)) or "none"
            raise UsageError(f"there is no adapter {name!r}; attached: {known}.")
    return state


def check_unmerged(state: State) -> None:
    """Refuse to go on while adapters are in the weights.

    Raises:
        UsageError: naming them.
    """
    check_whole(state)
    if state.merged:
        names = ", ".join(map(repr, state.merged))
        raise UsageError(f"merged: {names}.", hint="Call unmerge_adapter first.")


def check_whole(state: State) -> None:
    """Refuse what a model cannot do whose own weights are gone in part.

    Raises:
        UsageError: a merge for good did not end.
    """
    if state.spoiled:
        raise UsageError(
            f"merge_and_unload did not end, and {len(state.folded)} weights have the adapters in "
            "them.",
            hint="Call it again, or load the model again.",
        )


def check_for_good(state: State) -> None:
    """Refuse what would last, where other adapters are applied for a while only.

    Raises:
        UsageError: within `disable_adapter` or `mixed_batch`.
    """
    if state.meanwhile:
        raise UsageError(
            "this would last, and within disable_adapter or mixed_batch other adapters are applied "
            "for a while only.",
            hint="Do it outside of the with block.",
        )


def activate(model: nn.Module, uses: Mapping[str, Sequence[Use]]) -> None:
    """Apply these adapters, and no others, from now on."""
    model, state = unwrapped(model), state_of(model)
    for _, seat in seats_in(model):
        _check_apart([(n, c) for n, c in seat.changes if n in uses])
    state.active = {n: list(u) for n, u in uses.items()}
    for layer, seat in seats_in(model):
        seat.apply(layer, uses)


@contextmanager
def meanwhile(model: nn.Module, uses: Mapping[str, Sequence[Use]]) -> Iterator[None]:
    """Apply other adapters within this."""
    state = state_of(model)
    before, outer = state.active, state.meanwhile
    activate(model, uses)
    state.meanwhile = True
    try:
        yield
    finally:
        state.meanwhile = outer
        activate(model, before)


def forget_compiled() -> None:
    """Have whatever is compiled compiled again: its guards do not look at hooks."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def drop(model: nn.Module, names: Sequence[str]) -> None:
    """Take adapters off."""
    state = state_of(model)
    for name in names:
        for layer, seat in seats_in(unwrapped(model)):
            seat.drop(layer, name)
        del state.adapters[name]
    forget_compiled()


def leave(model: nn.Module) -> nn.Module:
    """The model without adapters, whatever its weights are now."""
    state = state_of(model)
    drop(model, list(state.adapters))
    for parameter in state.frozen:
        parameter.requires_grad_(True)
    model.__dict__.pop(STATE, None)
    return model


def _check_apart(changes: Sequence[tuple[str, Change]]) -> None:
    """Refuse two adapters that replace the same tensor, or the same row of one."""
    taken: dict[tuple[str, int | None], str] = {}
    for name, change in changes:
        if change.action == "update":
            continue
        for row in change.spec.get("indices", [None]):
            other = taken.setdefault((change.place, row), name)
            if other != name:
                raise MisfitError(
                    f"the adapters {other!r} and {name!r} both replace {change.place!r}"
                    + ("." if row is None else f", row {row}."),
                    hint="Make one of them active, or one adapter of both with lorakit.combine.",
                    tensor=change.place,
                )
