"""The tensors of a module made: their dtypes and shapes, and later their numbers.

Law: numbers are moved; only where scalings differ within a module is B multiplied, in float64, and
rounded once.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import numpy as np

from lorakit.adapter.load import read_stored
from lorakit.adapter.module import Module
from lorakit.adapter.weights import widest
from lorakit.errors import MisfitError
from lorakit.math.cast import Array, storage
from lorakit.math.experts import packed, scaled, supports, unpacked
from lorakit.store.equal import same_bytes
from lorakit.tensors import Source, TensorInfo
from lorakit.verbs.convert.assembly import Group, Made
from lorakit.verbs.convert.cutting import Cut
from lorakit.verbs.convert.goals import Span

KEPT = 2  # modules whose factors are in memory at a time
Shapes = dict[str, tuple[str, tuple[int, ...]]]  # role -> dtype, shape


def shapes_of(made: Made) -> Shapes:
    """The dtype and shape of each tensor of a module, by its role."""
    if made.taken:
        return {role: (i.dtype, i.shape) for role, i in made.taken.roles.items() if role != "rows"}
    (rows, cols), count = made.goal.shape, max(made.goal.experts, 1)
    wide, tall = (rows, cols) if made.goal.turned else (cols, rows)
    found: Shapes = {
        "a": (_dtype(made, "a"), (count * made.rank, wide)),
        "b": (_dtype(made, "b"), (tall, made.rank * count)),
    }
    for role in ("magnitude", "bias"):
        if there := [m.roles[role] for m in made.sources if role in m.roles]:
            found[role] = (widest([i.dtype for i in there]), (tall,))
    return found


def _dtype(made: Made, role: str) -> str:
    """The dtype of the factors of this role; turned ones change places."""
    other = {"a": "b", "b": "a"}[role]
    cuts = [b.cut for one in made.groups for g in one for b in g.blocks]
    return widest(
        [c.module.roles[other if c.turned != made.goal.turned else role].dtype for c in cuts]
    )


class Factory:
    """Reads the factors of an adapter and builds modules of them, a few sources in memory.

    `rounded` counts the numbers that a scaling of their own made the dtype round.
    """

    def __init__(self, source: Source, packing: str) -> None:
        self.source = source
        self.packing = packing
        self.rounded = 0
        self._kept: OrderedDict[str, tuple[Array, Array]] = OrderedDict()

    def supports(self, cut: Cut, spans: Sequence[Span], by_rows: bool) -> list[list[int]]:
        """The ranks of a module that matter to each of some rows (or columns) of its update."""
        a, b = self._factors(cut)
        if cut.turned:
            a, b = b.swapaxes(-1, -2), a.swapaxes(-1, -2)
        return supports(b if by_rows else a.swapaxes(-1, -2), spans)

    def same_a(self, one: Cut, other: Cut) -> bool:
        """Whether two modules have the very same A."""
        a, b = one.module.a, other.module.a
        return (a.dtype, a.shape) == (b.dtype, b.shape) and same_bytes(
            self.source, a, self.source, b
        )

    def build(self, made: Made) -> Mapping[str, Array]:
        """The tensors of a module that is not taken over, by role."""
        shapes, count = shapes_of(made), max(made.goal.experts, 1)
        down, up = shapes["a"], shapes["b"]
        a = np.zeros((count, made.rank, down[1][1]), storage(down[0]))
        b = np.zeros((count, up[1][0], made.rank), storage(up[0]))
        for expert, groups in enumerate(made.groups):
            begin = 0
            for group in groups:
                self._place(group, (a[expert], b[expert]), begin, turned=made.goal.turned)
                begin += len(group.ranks)
        found = dict(zip("ab", packed(a, b), strict=True))
        for role in shapes.keys() - {"a", "b"}:
            found[role] = self._rows_of(made, role, shapes[role])
        return found

    def read(self, info: TensorInfo) -> Array:
        """A tensor of the adapter, as it is."""
        return read_stored(self.source, info)

    def _place(self, group: Group, into: tuple[Array, Array], begin: int, *, turned: bool) -> None:
        ranks = list(group.ranks)
        span = slice(begin, begin + len(ranks))
        down, up = (into[1].T, into[0].T) if turned else into
        for block in group.blocks:
            a, b = self._of(block.cut)
            b = self._scaled(b[:, ranks], group.factor, block.cut.module)
            row, col = block.at
            rows, cols = slice(*block.rows), slice(*block.cols)
            down[span, col : col + cols.stop - cols.start] = a[ranks, cols]
            up[row : row + rows.stop - rows.start, span] = b[rows]

    def _scaled(self, b: Array, factor: float, module: Module) -> Array:
        b, lost = scaled(b, factor)
        self.rounded += lost
        if factor != 1.0 and not np.isfinite(b.astype(np.float64)).all():
            raise MisfitError(
                f"B of {module.name!r} does not fit {b.dtype.name} with the scaling of its stack.",
                hint="Save the adapter in float32 first.",
                tensor=module.b.name,
            )
        return b

    def _rows_of(self, made: Made, role: str, shape: tuple[str, tuple[int, ...]]) -> Array:
        """A vector along the output of a layer (a bias, a magnitude), from those of its parts."""
        out = np.zeros(shape[1], storage(shape[0]))
        for block, factor in ((b, g.factor) for g in made.groups[0] for b in g.blocks):
            if role in block.cut.module.roles:
                rows = self.read(block.cut.module.roles[role]).reshape(-1)[slice(*block.rows)]
                if role == "bias":
                    rows = self._scaled(rows, factor, block.cut.module)
                out[block.at[0] : block.at[0] + len(rows)] = rows
        return out

    def _of(self, cut: Cut) -> tuple[Array, Array]:
        """The factors of a cut's expert, B along the rows on disk."""
        a, b = (x[cut.expert or 0] for x in self._factors(cut))
        return (b.T, a.T) if cut.turned else (a, b)

    def _factors(self, cut: Cut) -> tuple[Array, Array]:
        """The factors of every expert of a module."""
        name = cut.module.a.name
        if name not in self._kept:
            while len(self._kept) >= KEPT:
                self._kept.popitem(last=False)
            a, b = self.read(cut.module.a), self.read(cut.module.b)
            self._kept[name] = unpacked(a, b, cut.experts or 1, self.packing)
        self._kept.move_to_end(name)
        return self._kept[name]
