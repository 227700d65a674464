"""Block-diagonal factors (BD-LoRA), which files hold as their blocks, one below the other.

Law: `expand(x, blocks)` has `x` cut into equal row blocks on its diagonal and zeros elsewhere, so
its shape is that of `x` with `blocks` times the columns.

Source: huggingface/peft v0.21.2, BlockDiagonalLinear in tuners/lora/variants.py.
"""

from lorakit.errors import MisfitError
from lorakit.math.namespace import Array, array_namespace

Shape = tuple[int, ...]


def expand(x: Array, blocks: int) -> Array:
    """The block-diagonal matrix, (rows, blocks * cols), of blocks that are stored as (rows, cols).

    Raises:
        MisfitError: the rows cannot be cut into that many equal blocks.
    """
    rows, cols = x.shape
    if blocks < 1 or rows % blocks:
        raise MisfitError(f"a factor of {rows} rows cannot be {blocks} equal blocks")
    xp = array_namespace(x)
    height = rows // blocks
    whole = xp.zeros((rows, blocks * cols), dtype=x.dtype, device=x.device)
    for i in range(blocks):
        band = slice(i * height, (i + 1) * height)
        whole[band, i * cols : (i + 1) * cols] = x[band, :]
    return whole


def blocks_of(a: Shape, b: Shape, weight: Shape) -> tuple[int, int]:
    """Into how many blocks each of the factors of shapes `a` and `b` is cut; 1 is a plain factor.

    `weight` is (out, in). A plain `a` is (rank, in) and a plain `b` is (out, rank); the factor that
    is narrower is the one in blocks.

    Raises:
        MisfitError: neither plain factors nor one in equal blocks would give an update of `weight`.
    """
    (rank, across), (out, inner) = a, weight
    narrow_a, narrow_b = _times(across, inner), _times(b[1], rank)
    whole = narrow_a and narrow_b and rank % narrow_a == 0 and out % narrow_b == 0
    if b[0] != out or not whole or (narrow_a > 1 and narrow_b > 1):
        raise MisfitError(
            f"factors of shapes {a} and {b} are no update of a weight of shape {weight}, "
            "neither as they are nor with one of them in blocks"
        )
    return narrow_a, narrow_b


def _times(part: int, whole: int) -> int:
    """How often `part` goes into `whole`, 0 if it does not."""
    return 0 if part < 1 or whole % part else whole // part
