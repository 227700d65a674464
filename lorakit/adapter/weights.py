"""An adapter weight by weight, in its own orientation: what every adapted weight gains, as low-rank
updates; and the same written back.

Law: `roles_of(form, adapted.lows(), dtype)` holds, up to rounding to `dtype`, the delta of the
adapter with a scaling of one; every tensor of the adapter is in one `Adapted`, in `Adapter.full`,
a module's token rows, or `Adapter.unused`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from lorakit.adapter.adapter import Adapter
from lorakit.adapter.factors import low_of
from lorakit.adapter.load import DIVERGED, read_array
from lorakit.adapter.pieces import Piece, pieces
from lorakit.errors import InputError
from lorakit.math.balance import balanced
from lorakit.math.cast import Array, narrow, storage
from lorakit.math.experts import packed, unpacked
from lorakit.math.lowrank import LowRank
from lorakit.tensors import TensorInfo

# How many times PEFT 0.21.2, which results are written for, applies an out_proj's update.
INNER = 2


@dataclass(frozen=True)
class Form:
    """Where an update lies in an adapter: the same for all adapters of one weight of one model.

    `inner` is the out_proj of a MultiheadAttention. `experts` is 0 but for a bare parameter that is
    a stack. The update of one expert, or of a plain weight, is (out, *span).
    """

    module: str
    parameter: str
    span: tuple[int, ...]  # (in,), with a kernel (in, k, ...)
    out: int
    layer: bool = True
    embedding: bool = False
    inner: bool = False
    experts: int = 0

    @property
    def name(self) -> str:
        """What a config calls it in patterns and targets."""
        if self.inner:
            return self.module.rpartition(".")[0]
        return self.module if self.layer else f"{self.module}.{self.parameter}"

    @property
    def names(self) -> tuple[str, str]:
        """What a pattern may mean it by: its module, or what a config calls it."""
        return self.module, self.name

    @property
    def key(self) -> str:
        """What no other weight of the adapter has: a MultiheadAttention is one name for two."""
        return f"{self.module}.{self.parameter}"

    @property
    def shape(self) -> tuple[int, int]:
        """The matrix that an update of one expert, or of a plain weight, makes."""
        return self.out, int(np.prod(self.span))


@dataclass(frozen=True)
class Adapted:
    """What an adapter does to one weight."""

    adapter: Adapter
    form: Form
    piece: Piece
    packing: str = "peft"

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """Its tensors by role; token rows are not among them."""
        assert self.piece.source is not None
        return {r: i for r, i in self.piece.source.roles.items() if r != "rows"}

    @property
    def rank(self) -> int:
        """The rank of one expert's update, or of a plain weight's."""
        groups = sum(map(bool, self.piece.spec.get("enabled") or [])) or 1
        one: int = self.piece.tensors[0].shape[0] // max(self.form.experts, 1)
        return one if groups == 1 else one // groups * groups

    @property
    def dora(self) -> bool:
        """Whether it has a magnitude, so that its delta depends on the base."""
        return "magnitude" in self.tensors

    @property
    def dtype(self) -> str:
        """The dtype of its factors; the wider where they differ."""
        return widest([t.dtype for t in self.piece.tensors[:2]])

    def lows(self, dtype: str = "float32") -> list[LowRank]:
        """The update of each expert, one for a plain weight; scaling, and how often an out_proj is
        updated, in their `scaling`. A magnitude is left out of account.
        """
        spec, count = self.piece.spec, self.form.experts

        def read(_: int, name: str) -> Array:
            return read_array(self.adapter.source, name, dtype)

        low = low_of(spec, read)
        scaling = low.scaling * spec["weight"]
        if not count:
            return [LowRank(low.a, low.b, scaling)]
        downs, ups = unpacked(low.a, low.b, count, self.packing)
        return [LowRank(a, b, scaling) for a, b in zip(downs, ups, strict=True)]

    @contextmanager
    def naming(self) -> Iterator[None]:
        """An error within about the values of its factors says which weight that is."""
        try:
            yield
        except InputError as error:
            raise InputError(
                f"{self.form.key!r}: {error.message}.",
                hint=DIVERGED,
                file=self.adapter.path,
                tensor=self.piece.tensors[0].name,
            ) from None

    def bias(self, dtype: str = "float32") -> Array | None:
        """What the bias of the layer gains, (out,), None where there is nothing."""
        if "bias" not in self.tensors:
            return None
        values = read_array(self.adapter.source, self.tensors["bias"].name, dtype).reshape(-1)
        gain: Array = values * values.dtype.type(self.piece.spec["scaling"])
        return gain

    def magnitude(self, dtype: str = "float32") -> Array | None:
        """The norms that DoRA gives the output units, None where it has none."""
        if not self.dora:
            return None
        return read_array(self.adapter.source, self.tensors["magnitude"].name, dtype)


def adapted(adapter: Adapter, *, packing: str = "peft") -> dict[str, Adapted]:
    """What an adapter does to each weight, by the key of its form.

    Raises:
        InputError: factors are stored in blocks (BD-LoRA), which only the base tells apart.
        MisfitError: see `lorakit.adapter.parameters`.
    """
    found = {}
    for piece in pieces(adapter, 0):
        if piece.action != "update" or piece.source is None:
            continue
        if adapter.config.raw.get("use_bdlora"):
            raise InputError(
                "is a BD-LoRA, whose factors are stored in blocks.",
                hint="Merge it into its base; it has no plain factors.",
                file=adapter.path,
            )
        form = _form(piece)
        found[form.key] = Adapted(adapter, form, piece, packing)
    return found


def roles_of(
    form: Form, lows: Sequence[LowRank], dtype: str, *, rank: int = 0, balance: bool = False
) -> dict[str, Array]:
    """The factors of a weight as a file holds them, by role, rounded once to `dtype` (a code).

    Scalings are multiplied into B, so that the scaling to read them with is 1. All experts of a
    stack get `rank`, or the largest of their ranks, filled up with zeros. With `balance` factors
    that float16 is too narrow for share their size.
    """
    applied, rank = INNER if form.inner else 1, max([rank, *(x.rank for x in lows)])
    pairs = [_filled(x, applied, rank) for x in lows]
    if balance and dtype == "F16":
        pairs = [balanced(a, b) for a, b in pairs]
    a, b = (np.stack(x) for x in zip(*pairs, strict=True))
    if form.experts:
        a, b = packed(a, b)
        return {"a": rounded(a, dtype), "b": rounded(b, dtype)}
    a, b = a[0], b[0]
    if form.embedding:
        return {"embedding_a": rounded(a, dtype), "embedding_b": rounded(b, dtype)}
    kernel = (1,) * (len(form.span) - 1)
    return {
        "a": rounded(a.reshape(-1, *form.span), dtype),
        "b": rounded(b.reshape(*b.shape, *kernel), dtype),
    }


def rounded(values: Array, dtype: str) -> Array:
    """The values in a storage dtype, rounded once to nearest even."""
    out = np.empty(values.shape, storage(dtype))
    if values.dtype == out.dtype:
        out[...] = values
    else:
        narrow(np.ascontiguousarray(values), out)
    return out


def widest(dtypes: Sequence[str]) -> str:
    """The one dtype of all, else one that holds each number of any."""
    if len(set(dtypes)) == 1:
        return dtypes[0]
    return "F64" if any(d == "F64" or not d.startswith(("F", "BF")) for d in dtypes) else "F32"


def computed(dtype: str) -> str:
    """The dtype for factors that are computed from some of this one: 8 bits would lose most of
    their digits, and are float16.
    """
    return dtype if dtype in ("F16", "BF16", "F32", "F64") else "F16"


def _filled(low: LowRank, applied: int, rank: int) -> tuple[Array, Array]:
    """Factors of a rank, with their scaling in B."""
    factor, more = low.scaling / applied, rank - low.rank
    b = low.b if factor == 1.0 else low.b * low.b.dtype.type(factor)
    if not more:
        return low.a, b
    return np.pad(low.a, ((0, more), (0, 0))), np.pad(b, ((0, 0), (0, more)))


def _form(piece: Piece) -> Form:
    module, spec = piece.source, piece.spec
    assert module is not None
    out = module.b.shape[0]
    if enabled := spec.get("enabled"):
        out = out // sum(map(bool, enabled)) * len(enabled)
    bare = "experts" in spec
    return Form(
        module.name,
        piece.parameters[0],
        tuple(module.a.shape[1:]),
        out,
        layer=not bare,
        embedding=module.embedding,
        inner=module.inner,
        experts=spec.get("experts", 0),
    )
