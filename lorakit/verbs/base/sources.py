"""The files that a plan reads, and the keys by which its steps name them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from lorakit.adapter.adapter import Adapter, AdapterFile
from lorakit.engine.plan import Fold
from lorakit.store.checkpoint import Checkpoint, Part
from lorakit.tensors import Source

if TYPE_CHECKING:
    from lorakit.adapter.load import Recent
    from lorakit.math.recipe import Recipe
    from lorakit.quant.stored.tensor import StoredTensor

_BASE, _ADAPTER = "base/", "adapter"


def base_key(part: Part) -> str:
    """The key of a weight file of the base."""
    return _BASE + part.name


def adapter_key(number: int) -> str:
    """The key of the weight file of an adapter, which are counted from 0."""
    return f"{_ADAPTER}{number}"


def adapter_number(key: str) -> int | None:
    """Which adapter a key is of; None for the base's."""
    return None if key.startswith(_BASE) else int(key.removeprefix(_ADAPTER))


def sources_of(
    base: Checkpoint, adapters: Sequence[Adapter | AdapterFile]
) -> Iterator[tuple[str, Part]]:
    """Every file that a plan reads, with its key."""
    yield from ((base_key(p), p) for p in base.parts)
    yield from ((adapter_key(i), a.source) for i, a in enumerate(adapters))


def recipe_of(
    fold: Fold,
    sources: Mapping[str, Source],
    adapters: Sequence[Source],
    recent: "Recent | None" = None,
) -> "Recipe":
    """What is to be done in a fold, in the dtype of its arithmetic, read from the adapters."""
    from lorakit.adapter.load import LazyRows, load_recipe
    from lorakit.math.cast import working

    wide = working(fold.tensor.dtype, fold.origin.dtype).name
    source = sources[fold.source]
    weight = LazyRows(source, fold.origin.name, wide)
    found = load_recipe(fold.recipe, adapters, wide, weight, recent)
    return replace(found, grid=grid_of(fold, source)) if fold.unit else found


def grid_of(fold: Fold, source: Source) -> "StoredTensor":
    """What a fold into a tensor of a quantised weight is put on."""
    from lorakit.verbs.base.unpacked import Unpacked

    assert isinstance(source, Unpacked)
    return source.tensor(fold.origin.name, fold.tensor.name, fold.leading)
