"""Updates of LyCORIS that are made of the weight itself: IA3, GLoRA and diagonal OFT.

A weight is (rows, cols) here; of a convolution, the columns are the inputs times the kernel.

Sources: Liu et al. 2022 (IA3, arXiv 2205.05638); Chavan et al. 2023 (GLoRA, arXiv 2306.07967); Qiu
et al. 2023 (OFT, arXiv 2306.07280); what the files mean: KohakuBlueleaf/LyCORIS, lycoris/modules.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lorakit.math.lowrank import LowRank, absolute
from lorakit.math.namespace import Array, array_namespace
from lorakit.math.updates import Added


@dataclass(frozen=True)
class Rescaled:
    """IA3: `weight * factors * w`, a factor for each row (axis 0) or each input (axis 1)."""

    factors: Array  # (rows,) or (inputs,)
    axis: int
    weight: float
    surveys = False
    depth = 1

    def change(self, w: Array, start: int, stop: int) -> Array:
        """`weight * factors * w`."""
        xp = array_namespace(w)
        factors = xp.astype(self.factors, w.dtype)
        if self.axis == 0:
            return self.weight * factors[start:stop, None] * w
        inputs = xp.reshape(w, (w.shape[0], factors.shape[0], -1))
        return self.weight * xp.reshape(inputs * factors[None, :, None], w.shape)

    def terms(self, w: Array, start: int, stop: int) -> Array:
        """The absolute value of the change."""
        return array_namespace(w).abs(self.change(w, start, stop))


@dataclass(frozen=True)
class Generalised:
    """GLoRA: `weight * scaling * (w @ inner + b @ a)`, where `inner` is low-rank too."""

    low: LowRank
    inner: LowRank  # over the inputs; its scaling is 1
    weight: float
    surveys = False

    @property
    def depth(self) -> int:
        """The inputs and the ranks."""
        return self.inner.shape[1] + self.low.rank + self.inner.rank

    def change(self, w: Array, start: int, stop: int) -> Array:
        """`weight * scaling * (w @ inner + b @ a)` for these rows."""
        plain = Added(self.low, self.weight).change(w, start, stop)
        return plain + self.weight * self.low.scaling * self._through(w, self.inner)

    def terms(self, w: Array, start: int, stop: int) -> Array:
        """The same of absolute values."""
        xp = array_namespace(w)
        inner = self._through(xp.abs(w), absolute(self.inner))
        through = abs(self.weight * self.low.scaling) * inner
        return through + Added(self.low, self.weight).terms(w, start, stop)

    def _through(self, w: Array, inner: LowRank) -> Array:
        """`w @ b @ a` over the inputs of a weight, for each place of its kernel."""
        xp = array_namespace(w)
        a, b = xp.astype(inner.a, w.dtype), xp.astype(inner.b, w.dtype)
        by_input = xp.reshape(w, (w.shape[0], b.shape[0], -1))
        turned = xp.permute_dims(by_input, (0, 2, 1)) @ b @ a
        return xp.reshape(xp.permute_dims(turned, (0, 2, 1)), w.shape)


@dataclass(frozen=True)
class Rotated:
    """Diagonal OFT: blocks of rows are rotated, and each row scaled after that.

    The result is `rescale * ((weight * R + (1 - weight) * 1).T @ w)` for each block R. The rows of
    a block may be read apart, so the weight is surveyed.
    """

    blocks: Array  # (count, size, size), rotations
    rescale: Array  # (rows,), or None
    weight: float
    rows: Array = None  # the whole weight, once settled

    @property
    def depth(self) -> int:
        """The rows of a block."""
        return int(self.blocks.shape[1]) + 2

    @property
    def surveys(self) -> bool:
        """Whether the rows are still to be seen."""
        return self.rows is None

    def survey(self, w: Array, start: int, stop: int) -> Array:
        """These rows."""
        return array_namespace(w).asarray(w, copy=True)

    def settle(self, seen: Sequence[Array]) -> "Rotated":
        """The update that has all rows."""
        return replace(self, rows=array_namespace(seen[0]).concat(list(seen), axis=0))

    def change(self, w: Array, start: int, stop: int) -> Array:
        """What becomes of these rows, less what they are."""
        return self._turned(w, start, stop, absolute=False) - w

    def terms(self, w: Array, start: int, stop: int) -> Array:
        """The same of absolute values, added up."""
        return self._turned(w, start, stop, absolute=True) + array_namespace(w).abs(w)

    def _turned(self, w: Array, start: int, stop: int, *, absolute: bool) -> Array:
        xp = array_namespace(w)
        size = self.blocks.shape[1]
        first, last = start // size, -(-stop // size)
        some = xp.astype(self.blocks[first:last, ...], w.dtype)
        turn = self.weight * some + (1 - self.weight) * xp.eye(size, dtype=w.dtype, device=w.device)
        rows = xp.astype(self.rows[first * size : last * size, :], w.dtype)
        if absolute:
            turn, rows = xp.abs(turn), xp.abs(rows)
        by_block = xp.reshape(rows, (last - first, size, -1))
        found = xp.reshape(xp.permute_dims(turn, (0, 2, 1)) @ by_block, rows.shape)
        found = found[start - first * size : stop - first * size, :]
        if self.rescale is None:
            return found
        factors = xp.astype(self.rescale[start:stop], w.dtype)[:, None]
        return (xp.abs(factors) if absolute else factors) * found


def rotations(blocks: Array, constraint: float) -> Array:
    """The rotations (count, size, size) that OFT's blocks stand for, in float64: the Cayley
    transform of their skew-symmetric parts, which have at most the norm `constraint`; 0: any.
    """
    import numpy as np

    wide = np.asarray(blocks, np.float64)
    skew = wide - wide.transpose(0, 2, 1)
    norm = float(np.linalg.norm(skew)) + 1e-8
    if 0 < constraint < norm:
        skew = skew * (constraint / norm)
    one = np.eye(wide.shape[1])
    # (1 + Q) times the inverse of (1 - Q); the two commute.
    return np.linalg.solve(one - skew, one + skew)
