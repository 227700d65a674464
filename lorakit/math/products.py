"""Updates that are products of two matrices in other ways than LoRA's: number by number (LoHa), and
Kronecker's (LoKr). As plain factors they would be as large as the weight.

Law: `block` gives rows of what `lorakit.math.lycoris` multiplies out, and cutting or turning one is
cutting or turning that.

Sources: Hyeon-Woo et al. 2021 (FedPara, arXiv 2108.06098); Yeh et al. 2023 (LyCORIS, arXiv
2309.14859), section 3.
"""

from dataclasses import dataclass, replace
from typing import Self

from lorakit.math.lowrank import LowRank, absolute, rows_of, transpose
from lorakit.math.namespace import Array, array_namespace
from lorakit.math.updates import Added


@dataclass(frozen=True)
class Hadamard:
    """`one * two`, number by number."""

    one: LowRank
    two: LowRank

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the dense update."""
        return self.one.shape

    @property
    def depth(self) -> int:
        """How many terms an element sums."""
        return self.one.rank + self.two.rank

    def rows(self, start: int, stop: int) -> Self:
        """The update of some of the output rows. Exact."""
        return replace(self, one=rows_of(self.one, start, stop), two=rows_of(self.two, start, stop))

    def turned(self) -> Self:
        """The update of the transposed matrix. Exact."""
        return replace(self, one=transpose(self.one), two=transpose(self.two))

    def block(self, w: Array, start: int, stop: int) -> Array:
        """Rows `start` to `stop` in the dtype of `w`, which is those of the weight."""
        one, two = (Added(x).change(w, start, stop) for x in (self.one, self.two))
        return one * two

    def absolute(self) -> Self:
        """The same of absolute values."""
        return replace(self, one=absolute(self.one), two=absolute(self.two))


@dataclass(frozen=True)
class Kronecker:
    """`kron(left, right)`, or `height` rows of it from `first` on."""

    left: Array  # (p, q)
    right: Array  # (c, d)
    first: int = 0
    height: int = -1  # all

    depth = 1

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the dense update."""
        rows = self.left.shape[0] * self.right.shape[0] if self.height < 0 else self.height
        return rows, int(self.left.shape[1] * self.right.shape[1])

    def rows(self, start: int, stop: int) -> Self:
        """The update of some of the output rows. Exact."""
        return replace(self, first=self.first + start, height=stop - start)

    def turned(self) -> Self:
        """The update of the transposed matrix, of which nothing is cut off. Exact."""
        assert self.height < 0
        return replace(self, left=self.left.T, right=self.right.T)

    def block(self, w: Array, start: int, stop: int) -> Array:
        """Rows `start` to `stop` in the dtype of `w`, which is those of the weight."""
        xp = array_namespace(w)
        left, right = xp.astype(self.left, w.dtype), xp.astype(self.right, w.dtype)
        deep, out = right.shape[0], xp.empty(w.shape, dtype=w.dtype, device=w.device)
        row = start
        while row < stop:  # all rows that have one row of `left`
            number, inner = divmod(self.first + row, deep)
            some = min(deep - inner, stop - row)
            into = xp.reshape(out[row - start : row - start + some, :], (some, left.shape[1], -1))
            into[...] = left[number, :, None] * right[inner : inner + some, None, :]
            row += some
        return out

    def absolute(self) -> Self:
        """The same of absolute values."""
        xp = array_namespace(self.left)
        return replace(self, left=xp.abs(self.left), right=xp.abs(self.right))


Product = Hadamard | Kronecker


@dataclass(frozen=True)
class Multiplied:
    """`weight * product`."""

    product: Product
    weight: float = 1.0
    surveys = False

    @property
    def depth(self) -> int:
        """How many terms an element of the change sums."""
        return self.product.depth

    def change(self, w: Array, start: int, stop: int) -> Array:
        """`weight * product[start:stop]`."""
        found = self.product.block(w, start, stop)
        return found if self.weight == 1.0 else self.weight * found

    def terms(self, w: Array, start: int, stop: int) -> Array:
        """The same of absolute values."""
        return abs(self.weight) * self.product.absolute().block(w, start, stop)


def plain(low: LowRank | Product, weight: float = 1.0) -> Added | Multiplied:
    """`weight` times what factors, or a product, say."""
    return Added(low, weight) if isinstance(low, LowRank) else Multiplied(low, weight)
