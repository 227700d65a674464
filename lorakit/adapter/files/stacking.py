"""Experts that an adapter has one by one, as one stack of factors for each projection of a layer.

Law: the update of every expert is that of its slice of the stack; one that the adapter does not
have is of zeros.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from lorakit.adapter.delta import Delta, Values
from lorakit.adapter.files.values import computed, times, widened
from lorakit.errors import MisfitError
from lorakit.math.cast import Array, storage
from lorakit.math.surgery import Factors, padded

COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")  # in a config
_EXPERT = re.compile(r"(.*)\.experts\.(\d+)\.(\w+)")
Stacks = dict[tuple[str, str], dict[int, Delta]]


def parted(deltas: Iterable[Delta]) -> tuple[list[Delta], Stacks]:
    """The modules that are no experts; and those that are, by the block that they lie in and their
    projection, then by number.
    """
    rest: list[Delta] = []
    stacks: Stacks = {}
    for delta in deltas:
        found = _EXPERT.fullmatch(delta.module)
        if found is None:
            rest.append(delta)
        else:
            stacks.setdefault((found[1], found[3]), {})[int(found[2])] = delta
    return rest, stacks


def count_of(experts: Mapping[int, Delta], config: Mapping[str, Any]) -> int:
    """How many experts a layer has: by the config of the base; without one, as many as are there.

    Raises:
        MisfitError: there are more than that, or some are missing and nothing tells how many.
    """
    said = next((n for c in COUNTS if isinstance(n := config.get(c), int)), 0)
    last = max(experts)
    if last >= said and (said or len(experts) <= last):
        module = experts[last].module
        raise MisfitError(
            f"{module!r} is one of {said} experts."
            if said
            else f"some experts beside {module!r} are missing, and only the base tells how many.",
            hint="Name the folder of the base that the adapter is for with --base.",
            tensor=module,
        )
    return said or last + 1


def uniform(delta: Delta, rank: int, scaling: float) -> tuple[Delta, float]:
    """The same update with this rank and this scaling, and by how much rounding moves B.

    Ranks are filled up with zeros.
    """
    a, b = delta.tensors["a"], delta.tensors["b"]
    if rank > delta.rank:
        wide = padded(Factors(a.read(), b.read()), rank)
        a, b = computed(wide.a), computed(wide.b)
    b, error = times(b, delta.scaling / scaling)
    tensors = {**delta.tensors, "a": a, "b": b}
    return replace(delta, tensors=tensors, alpha=scaling * rank, rslora=False), error


def stacked(experts: Mapping[int, Delta], count: int) -> dict[str, Values]:
    """Factors of one rank and scaling in one: a (experts, rank, in), b (experts, out, rank).

    Raises:
        MisfitError: they are of several shapes.
    """
    found = {}
    for role in ("a", "b"):
        slices = {n: d.tensors[role] for n, d in experts.items()}
        shapes = {v.shape for v in slices.values()}
        if len(shapes) > 1:
            module = next(iter(experts.values())).module
            raise MisfitError(
                f"the experts beside {module!r} are of several shapes: {sorted(shapes)}.",
                hint="Save the adapter again; this file is damaged.",
                tensor=module,
            )
        dtypes = {v.dtype for v in slices.values()}
        dtype = dtypes.pop() if len(dtypes) == 1 else "F32"
        shape = (count, *shapes.pop())
        found[role] = Values(dtype, shape, _filled(slices, shape, dtype))
    return found


def _filled(slices: Mapping[int, Values], shape: tuple[int, ...], dtype: str) -> Any:
    def read() -> Array:
        out = np.zeros(shape, storage(dtype))
        for number, values in slices.items():
            out[number] = values.read() if values.dtype == dtype else widened(values)
        return out

    return read
