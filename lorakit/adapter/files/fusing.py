"""Parts of a fused projection as one module again."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from lorakit.adapter.delta import Delta, Values
from lorakit.adapter.files.parts import MLP, as_lora, by_inputs, height_of, swaps, turned, width_of
from lorakit.adapter.files.values import computed
from lorakit.errors import MisfitError
from lorakit.formats.templates import Found, Row, filled
from lorakit.math.cast import Array
from lorakit.math.surgery import Factors, joined, stacked


def fused(found: Found, parts: Mapping[int, Delta]) -> tuple[Delta, bool]:
    """The delta of the original module that these parts make, and whether it is exact.

    A part that is not there was not trained: its rows are zeros.

    Raises:
        MisfitError: parts have DoRA norms and one is missing, or their kinds cannot be joined.
    """
    row = found.row
    module = filled(row.original, found.numbers)
    first = next(iter(parts.values()))
    if len(row.parts) == 1:
        return turned(first) if swaps(first, row) else first, True
    if stays_apart(found, parts):
        raise MisfitError(
            f"{module!r} is fused, and its parts have DoRA norms that it cannot have as a whole: "
            "not all have them, or they are those of inputs.",
            hint="Write comfyui for FLUX.1, SD3 or Z-Image, else diffusers, or merge the adapter.",
            tensor=module,
        )
    if all(p.algo == "full" for p in parts.values()):
        return _stacked(module, parts, len(row.parts)), True
    if uncut := _of_one(parts, len(row.parts)):
        return replace(uncut, module=module), True
    plain = {n: as_lora(p) for n, p in parts.items()}
    sizes = _sizes(row, plain, module)
    factors = [
        Factors(p.tensors["a"].read(), p.tensors["b"].read(), p.plain_alpha) if p else None
        for p in (plain.get(n) for n in range(len(row.parts)))
    ]
    whole, exact = joined(factors, sizes)
    tensors = {"a": computed(whole.a), "b": computed(whole.b)}
    for role in ("bias", "magnitude"):
        if any(role in p.tensors for p in plain.values()):
            tensors[role] = computed(_beside(role, plain, sizes))
    return Delta(first.component, module, "lora", tensors, _kept(plain, whole)), exact


def _of_one(parts: Mapping[int, Delta], count: int) -> Delta | None:
    """The Kronecker product that all of these parts were cut from; None if there is no such."""
    first = next(iter(parts.values()))
    ends = [0]
    for number in range(count):
        part = parts.get(number)
        if part is None or part.rows is None or part.rows[0] != ends[-1]:
            return None
        if any(part.tensors[r] is not v for r, v in first.tensors.items()):
            return None
        ends.append(part.rows[1])
    whole = replace(first, rows=None, how="renamed")
    return whole if height_of(whole) == ends[-1] else None


def stays_apart(found: Found, parts: Mapping[int, Delta]) -> bool:
    """Whether parts of a fused projection have DoRA norms that the whole cannot have."""
    count = len(found.row.parts)
    norms = [p for p in parts.values() if "magnitude" in p.tensors]
    return count > 1 and bool(norms) and (len(norms) < count or any(map(by_inputs, norms)))


def _kept(parts: Mapping[int, Delta], whole: Factors) -> Values | float | None:
    """The alpha of the whole: the very tensor that all parts came with, where it says the same."""
    first = next(iter(parts.values()))
    same = all(p.alpha is first.alpha for p in parts.values())
    return first.alpha if same and whole.alpha == first.alpha_value else whole.alpha


def _sizes(row: Row, parts: Mapping[int, Delta], module: str) -> list[int]:
    """The rows of all parts, those that are missing included."""
    width, count = width_of(next(iter(parts.values()))), len(row.parts)
    known = {n: height_of(p) for n, p in parts.items()}
    if row.even:
        guess = [next(iter(known.values()))] * count
    elif count == 3:
        other = known.get(1, known.get(2, 0 if row.grouped else width))
        if not other:
            raise MisfitError(
                f"{module!r} is fused, and without its keys and values nothing tells their rows.",
                hint="Write diffusers or peft, which have its queries on their own.",
                tensor=module,
            )
        guess = [width, other, other]
    else:
        guess = [width] * (count - 1) + [MLP * width]
    found = [known.get(n, size) for n, size in enumerate(guess)]
    if not width:
        raise MisfitError(f"{module!r} cannot be put together from its parts.", tensor=module)
    return found


def _beside(role: str, parts: Mapping[int, Delta], sizes: list[int]) -> Array:
    there = {n: p.tensors[role].read() for n, p in parts.items() if role in p.tensors}
    like = next(iter(there.values()))
    blocks = [
        there[n].reshape(size) if n in there else np.zeros(size, like.dtype)
        for n, size in enumerate(sizes)
    ]
    whole = stacked(blocks)
    return whole if like.ndim == 1 else whole.reshape(-1, *like.shape[1:])


def _stacked(module: str, parts: Mapping[int, Delta], count: int) -> Delta:
    if len(parts) < count:
        raise MisfitError(
            f"{module!r} is fused, and some of its parts have no difference.", tensor=module
        )
    first = parts[0]
    roles = first.tensors
    tensors = {
        r: computed(stacked([parts[n].tensors[r].read() for n in range(count)])) for r in roles
    }
    return replace(first, module=module, tensors=tensors)
