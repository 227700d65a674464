"""The parameters that active adapters change, and where else each of them is."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lorakit.errors import MisfitError
from lorakit.runtime.change import Change, Changes
from lorakit.runtime.seat import seats_in
from lorakit.runtime.state import State

Slot = tuple[nn.Module, str]  # a module and the name of a parameter of it


@dataclass(frozen=True)
class Fold:
    """The changes of one parameter."""

    place: str
    slot: Slot
    changes: Changes

    @property
    def parameter(self) -> Any:
        """The parameter as it is; None where there is none."""
        module, name = self.slot
        return module._parameters[name]

    @property
    def kind(self) -> tuple[Any, ...]:
        """What is the same for parameters that change alike."""
        return tuple((*map(id, c._parameters.values()), w) for c, w in self.changes)


def folds_of(model: nn.Module, state: State) -> Iterator[Fold]:
    """The parameters that the active adapters change."""
    for layer, seat in seats_in(model):
        by_slot: dict[tuple[str, str], list[tuple[Change, float]]] = defaultdict(list)
        for name, change in seat.changes:
            for use in state.active.get(name, ()):
                by_slot[change.inside, change.parameter].append((change, use.weight))
        for (inside, parameter), changes in by_slot.items():
            yield Fold(changes[0][0].place, (layer.get_submodule(inside), parameter), changes)


def check_present(folds: Iterable[Fold]) -> None:
    """Refuse to fold into what is not there.

    Raises:
        MisfitError: a parameter is a bias that its layer does not have, or is offloaded.
    """
    for fold in folds:
        if fold.parameter is None:
            raise MisfitError(
                f"{fold.place!r} is in the adapter (lora_bias), and its layer has no bias.",
                hint="Keep the adapter beside the model.",
                tensor=fold.place,
            )
        if fold.parameter.is_meta:
            raise MisfitError(
                f"{fold.place!r} is offloaded.",
                hint="Keep the adapter beside the model, or load it with load_pretrained(…, "
                "merge=True).",
                tensor=fold.place,
            )


def alike(fold: Fold, folds: Mapping[Slot, Fold], there: Sequence[Slot]) -> bool:
    """Whether a parameter changes in the same way in all modules that share it."""
    return all(s in folds and _same(folds[s], fold) for s in there)


def _same(one: Fold, other: Fold) -> bool:
    """Whether two change alike: by the same tensors, or by whole ones of the same values."""
    if one.kind == other.kind:
        return True
    whole = all(c.action == "full" for c, _ in (*one.changes, *other.changes))
    pairs = list(zip(one.changes, other.changes, strict=False))
    return (
        whole
        and len(one.changes) == len(other.changes)
        and all(v == w and torch.equal(c.values, d.values) for (c, v), (d, w) in pairs)
    )


def slots_of(model: nn.Module) -> dict[int, list[Slot]]:
    """Where each parameter of a model is, by its identity."""
    found: dict[int, list[Slot]] = defaultdict(list)
    for module in model.modules():
        if not isinstance(module, Change):
            for name, parameter in module._parameters.items():
                found[id(parameter)].append((module, name))
    return found
