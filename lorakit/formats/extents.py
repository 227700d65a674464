"""How many rows and inputs the weight of a module has, by the shapes of what changes it."""

from collections.abc import Mapping

Shapes = Mapping[str, tuple[int, ...]]  # by role
# Roles whose rows are those of the weight, by algorithm.
ROWS = {
    "lora": ("b", "bias", "magnitude"),
    "loha": ("w1_a", "w2_a", "bias", "magnitude"),
    "full": ("diff", "bias"),
    "set": ("value", "bias"),
    "norm": ("weight", "bias"),
}
INPUTS = ("a", "w1_b", "diff", "value")


def rows_of(algo: str, shapes: Shapes) -> int:
    """The number of output rows, 0 where no role tells it."""
    first = next((shapes[r] for r in ROWS.get(algo, ()) if r in shapes), None)
    if first is not None:
        return first[0] if first else 0
    return _kron(algo, shapes, 0)


def inputs_of(algo: str, shapes: Shapes) -> int:
    """The number of inputs, 0 where no role tells it."""
    down = next((shapes[r] for r in INPUTS if r in shapes), None)
    if down is not None and algo != "lokr":
        return down[1] if len(down) > 1 else 0
    return _kron(algo, shapes, 1)


def _kron(algo: str, shapes: Shapes, axis: int) -> int:
    """Rows or columns of a Kronecker product."""
    if algo != "lokr":
        return 0
    end = ("_a", "_b")[axis]
    count = 1
    for side in ("w1", "w2"):
        whole = side in shapes
        shape = shapes.get(side if whole else side + end, ())
        at = axis if whole or side == "w1" or "t2" not in shapes else 1
        count *= shape[at] if len(shape) > at else 0
    return count
