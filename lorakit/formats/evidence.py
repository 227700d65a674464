"""What the shapes of a file's modules say of the family that they are read as.

Sources: the configs of the models that huggingface/diffusers loads, src/diffusers/models.
"""

from collections.abc import Mapping

from lorakit.formats.families import Family
from lorakit.formats.templates import Found

Extent = tuple[int, int]  # rows and inputs, 0 where nothing tells them
AGAINST, NOTHING, POSSIBLE, EXACT = range(4)
BLOCKS = ("transformer_blocks.#.", "layers.#.")
QUERIES = (".attn.to_q", ".attn1.to_q", ".attention.to_q")


def likely(family: Family, found: Mapping[str, Found], extents: Mapping[str, Extent]) -> int:
    """AGAINST where a shape is none of the family's, EXACT where blocks and inputs are as many as
    one of its models has, POSSIBLE where such a model has more blocks, else NOTHING.
    """
    if any(_speaks_against(family, f, extents.get(m, (0, 0))) for m, f in found.items()):
        return AGAINST
    queries = {m for m, f in found.items() if f.row.parts[0].endswith(QUERIES) and not f.part}
    blocks = {int(f.numbers[0]) for f in found.values() if f.row.parts[0].startswith(BLOCKS)}
    inputs = {extents[m][1] for m in queries if m in extents and _in_blocks(found[m])} - {0}
    if len(inputs) != 1 or not blocks:
        return NOTHING
    (width,), count = inputs, max(blocks) + 1
    counts = [number for number, known in family.sizes if known == width]
    if count in counts:
        return EXACT
    return POSSIBLE if any(count < number for number in counts) else NOTHING


def _in_blocks(found: Found) -> bool:
    return found.row.parts[0].startswith(BLOCKS)


def _speaks_against(family: Family, found: Found, extent: Extent) -> bool:
    row, (rows, inputs) = found.row, extent
    if row.ratio and found.part is None and rows and inputs:
        return rows * row.ratio[1] != inputs * row.ratio[0]
    keys = row.original.endswith(("attn2.to_k", "attn2.to_v"))
    return keys and bool(inputs and family.context) and inputs != family.context
