"""layer_replication: a stack of layers rebuilt from ranges of the base's, each copy a layer of its
own in the result.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lorakit.adapter.adapter import Adapter
from lorakit.errors import InputError, MisfitError
from lorakit.naming.replication import config_facts, replicated
from lorakit.tensors import TensorInfo


@dataclass(frozen=True)
class Layers:
    """The tensors of the rebuilt model by their sources; without ranges, the base's own."""

    ranges: Sequence[tuple[int, int]] = ()
    names: Mapping[str, str] = field(default_factory=dict)  # new -> source

    def of(self, infos: Mapping[str, TensorInfo]) -> Iterator[tuple[str, TensorInfo]]:
        """(name, source) of what is made of some tensors, in the order of the result."""
        if not self.ranges:
            yield from infos.items()
        yield from ((new, infos[old]) for new, old in self.names.items() if old in infos)

    def infos(self, infos: Mapping[str, TensorInfo]) -> Mapping[str, TensorInfo]:
        """The tensors of the rebuilt model."""
        return {n: replace(i, name=n) for n, i in self.of(infos)} if self.ranges else infos

    def facts(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """What the rebuilt stack changes in config.json."""
        return config_facts(config, self.ranges) if self.ranges and config else {}

    def notes(self, infos: Mapping[str, TensorInfo]) -> list[str]:
        """A line on the new stack, and on layers that are in no range."""
        if not self.ranges:
            return []
        gone = len(set(infos) - set(self.names.values()))
        count = sum(stop - start for start, stop in self.ranges)
        shown = ", ".join(f"{a}-{b - 1}" for a, b in self.ranges)
        left = f"; {gone} tensors of layers in no range are left out" if gone else ""
        return [f"the result has {count} layers, copies of layers {shown} of the base{left}."]


def layers_of(infos: Mapping[str, TensorInfo], adapters: Sequence[Adapter]) -> Layers:
    """The stack that the adapters were trained on.

    Raises:
        MisfitError: they were not all trained on the same.
        InputError: the ranges are not of this base's layers.
    """
    wanted = [a.config.layer_replication for a in adapters]
    if any(w != wanted[0] for w in wanted):
        raise MisfitError(
            f"the adapters have other layer_replication: {wanted[0]} and "
            f"{next(w for w in wanted if w != wanted[0])}.",
            hint="Merge them one by one, each into its own stack.",
            file=adapters[0].path,
        )
    if not wanted or not wanted[0]:
        return Layers()
    try:
        return Layers(wanted[0], dict(replicated(infos, wanted[0])))
    except InputError as error:
        hint = "It was trained on another model."
        raise InputError(f"{error}.", hint=hint, file=adapters[0].config.file) from None
