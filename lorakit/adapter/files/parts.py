"""One module of the original code as the modules that Diffusers makes of it, and back.

Rows are cut and joined, and halves of rows change places; see `lorakit.math.surgery`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from math import prod

import numpy as np

from lorakit.adapter.delta import Delta, Values
from lorakit.adapter.files.values import computed, moved
from lorakit.errors import MisfitError
from lorakit.formats.extents import ROWS, inputs_of, rows_of
from lorakit.formats.templates import Found, Row, filled
from lorakit.math.cast import Array
from lorakit.math.surgery import swapped

DIFFSYNTH = ".lora_A.default."  # in the names of DiffSynth-Studio, and of no other tool
PEFT_NORMS = ".lora_magnitude_vector"
ACTING = ("ia3", "glora", "oft")  # what a weight is multiplied with, as a whole
MLP = 4  # times the inputs: the rows of the last part of a fused projection with four


def parts_of(delta: Delta, found: Found) -> Iterator[Delta]:
    """The deltas in Diffusers' names of one that has this place in the templates; one that
    cannot be cut, or whose halves cannot change places, keeps its name in the original code.

    Raises:
        MisfitError: the tensors of a fused projection cannot be cut into its parts.
    """
    row, numbers = found.row, found.numbers
    if found.part is not None:  # it goes by the name of Diffusers
        yield replace(delta, module=filled(row.parts[found.part], numbers))
        return
    delta = replace(delta, module=filled(row.original, numbers))
    if delta.algo in ACTING and (len(row.parts) > 1 or swaps(delta, row)):
        yield delta
        return
    if len(row.parts) == 1:
        one = turned(delta) if swaps(delta, row) else delta
        yield replace(one, module=filled(row.parts[0], numbers))
        return
    if by_inputs(delta):  # its norms run over all of its rows
        yield delta
        return
    if delta.algo not in ROWS and not _cuttable(delta):
        delta = as_lora(delta)
    sizes = row.sizes(height_of(delta), width_of(delta))
    if not sizes or not height_of(delta):
        raise MisfitError(
            f"{delta.module!r} is fused, and has no factors that tell how many rows its parts "
            "have.",
            hint="Take its tensors out of the file, or train it anew.",
            tensor=delta.module,
        )
    if min(sizes) < 1:
        raise MisfitError(
            f"{delta.module!r} is fused, and {height_of(delta)} rows for {width_of(delta)} inputs "
            f"are too few for its {len(sizes)} parts.",
            hint="The file is damaged, or of another model; --family says which.",
            tensor=delta.module,
        )
    if row.head and any(DIFFSYNTH in v.key for v in delta.tensors.values()):
        delta = mapped(delta, _by_part(len(row.parts), row.head))
    start = 0
    for part, size in zip(row.parts, sizes, strict=True):
        stop = start + size
        one = _some(delta, start, stop)
        yield replace(one, module=filled(part, numbers), how="split")
        start = stop


def _cuttable(delta: Delta) -> bool:
    """Whether it is a Kronecker product and nothing else, which has rows of it as what it is."""
    return delta.algo == "lokr" and not {"bias", "magnitude"} & delta.tensors.keys()


def _some(delta: Delta, start: int, stop: int) -> Delta:
    if delta.algo == "lokr":
        return replace(delta, rows=(start, stop))
    return mapped(delta, _rows(start, stop), rows=stop - start)


def turned(delta: Delta) -> Delta:
    """The delta with the halves of its rows changed over; with plain factors, where its own tensors
    do not have these rows.

    Raises:
        MisfitError: there are none, or the rows have no halves.
    """
    if height_of(delta) % 2:
        having = [delta.tensors[r] for r in ROWS.get(delta.algo, ()) if r in delta.tensors]
        first = (having or list(delta.tensors.values()))[0].key
        raise MisfitError(
            f"{first!r} is of {height_of(delta)} rows, whose two halves are to change places.",
            hint="Save the adapter again; this file is damaged, or of another model.",
            tensor=first,
        )
    if delta.algo in ROWS:
        return replace(mapped(delta, swapped), how="swapped")
    return replace(mapped(as_lora(delta), swapped), how="computed")


def swaps(delta: Delta, row: Row) -> bool:
    """Whether the halves of the rows are the other way round in the original code."""
    return row.swaps(height_of(delta), width_of(delta))


def height_of(delta: Delta) -> int:
    """The number of output rows, 0 where no role tells it."""
    if delta.rows:
        return delta.rows[1] - delta.rows[0]
    return rows_of(delta.algo, _shapes(delta))


def width_of(delta: Delta) -> int:
    """The number of inputs, 0 where no role tells it."""
    return inputs_of(delta.algo, _shapes(delta))


def _shapes(delta: Delta) -> dict[str, tuple[int, ...]]:
    return {role: values.shape for role, values in delta.tensors.items()}


def as_lora(delta: Delta) -> Delta:
    """The same update with plain factors, float32.

    Raises:
        MisfitError: it has none that are exact.
    """
    from lorakit.math import lycoris

    exact: Mapping[str, Callable[..., tuple[Array, Array]]] = {
        "lora": lycoris.tucker,
        "loha": lycoris.loha,
        "lokr": lycoris.lokr,
    }
    if delta.algo == "lora" and "mid" not in delta.tensors:
        return delta
    if delta.algo not in exact:
        raise MisfitError(
            f"{delta.module!r} is of {delta.algo}, which has no plain factors.",
            hint="Only a merge takes it; convert leaves it out with --drop.",
        )
    tensors = {r: v.read().astype("f8") for r, v in delta.tensors.items() if _numbers(v)}
    a, b = exact[delta.algo](tensors)
    if delta.rows:
        b = b[slice(*delta.rows)]
    kernel = (lycoris.lokr_kernel(tensors) if delta.algo == "lokr" else ()) or delta.kernel
    if a.ndim == 2 and kernel and a.shape[1] % prod(kernel) == 0:
        a = a.reshape(len(a), -1, *kernel)
    b = b.reshape(*b.shape[:2], *(1,) * (a.ndim - 2))
    made = {r: computed(x.astype(np.float32)) for r, x in (("a", a), ("b", b))}
    beside = {r: delta.tensors[r] for r in ("bias", "magnitude") if r in delta.tensors}
    scaling = scaling_of(delta)
    alpha = None if scaling == 1.0 and delta.alpha is None else scaling * len(a)
    return Delta(delta.component, delta.module, "lora", {**made, **beside}, alpha, how="computed")


def scaling_of(delta: Delta) -> float:
    """What an update of any of the low-rank algorithms is multiplied with. The alpha of a Kronecker
    product of two whole matrices means nothing: AI Toolkit writes one that float16 has as Inf.
    """
    if delta.algo == "lora":
        return delta.scaling
    roles = ("w1_b",) if delta.algo == "loha" else ("w2_b", "w1_b")
    low = next((delta.tensors[r] for r in roles if r in delta.tensors), None)
    if low is None or (alpha := delta.alpha_value) is None:
        return 1.0
    return alpha / low.shape[0]


def _numbers(values: Values) -> bool:
    return bool(values.shape)


def by_inputs(delta: Delta) -> bool:
    """Whether DoRA's norms are those of inputs. PEFT's have that shape and are of outputs, where
    the weight is a convolution's: their name tells, which a square one's sizes do not.
    """
    found = delta.tensors.get("magnitude")
    if found is None or PEFT_NORMS in found.key:
        return False
    return len(found.shape) > 1 and found.shape[0] == 1


def mapped(delta: Delta, change: Callable[[Array], Array], rows: int = 0) -> Delta:
    """The delta with its output rows changed; `rows` are left of them, 0: as many as before."""
    tensors = dict(delta.tensors)
    for role in ROWS.get(delta.algo, ()):
        if role in tensors and not (role == "magnitude" and by_inputs(delta)):
            old = tensors[role]
            shape = (rows or old.shape[0], *old.shape[1:])
            tensors[role] = moved(old, change, shape)
    return replace(delta, tensors=tensors)


def _rows(start: int, stop: int) -> Callable[[Array], Array]:
    return lambda x: x[start:stop]


def _by_part(count: int, head: int) -> Callable[[Array], Array]:
    """From parts head by head to one part below the other."""

    def change(x: Array) -> Array:
        if len(x) % (count * head):
            raise MisfitError(f"{len(x)} rows are not those of {count} parts with heads of {head}.")
        return x.reshape(-1, count, head, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape)

    return change


def by_row(deltas: Iterable[tuple[Delta, Found]]) -> list[tuple[Found, dict[int, Delta]]]:
    """The parts, by their numbers, of each module of the original code, in their order."""
    rows: dict[tuple[str, str], tuple[Found, dict[int, Delta]]] = {}
    for delta, found in deltas:
        key = (delta.component, filled(found.row.original, found.numbers))
        rows.setdefault(key, (found, {}))[1][found.part or 0] = delta
    return list(rows.values())
