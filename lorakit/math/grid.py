"""What sums are put on where they are not rounded to a dtype: codes on a grid with scales.

A quantised weight is several tensors, each of which is a grid here: its codes, which follow from
the sums row by row, and its scales, which follow from what is the largest among them.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from lorakit.math.cast import Array


class Grid(Protocol):
    """One tensor of a quantised weight, as new values make it.

    Rows are those of the weight as a fold has them: `w` has their values before, `new` after.
    """

    @property
    def codes(self) -> bool:
        """Whether these are the codes, and not scales."""
        ...

    @property
    def coupled(self) -> bool:
        """Whether all rows have to be surveyed before any can be encoded."""
        ...

    def survey(self, w: Array, new: Array, start: int) -> Any:
        """What the scales of these rows follow from; `start` is the first.

        Raises:
            InputError: there is NaN or Inf among the new values.
        """
        ...

    def settled(self, seen: Sequence[Any], start: int = 0) -> "Grid":
        """The grid that knows the scales of rows from `start` on, from their surveys."""
        ...

    def encode(self, new: Array, start: int, out: Array, at: int) -> Array:
        """Put the codes of these rows into `out`, the bytes of a block in which they are the rows
        from `at` on; the values that the codes stand for, float32 in the shape of `new`.
        """
        ...

    def beside(self) -> Array:
        """The scales, as they are written."""
        ...
