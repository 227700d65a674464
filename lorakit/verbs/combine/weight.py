"""One weight of several adapters combined: what is read, which method it goes through, what is said
of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lorakit.adapter.weights import Form, computed, widest
from lorakit.errors import UsageError
from lorakit.math.cast import Array
from lorakit.math.combining.compat import compat
from lorakit.math.combining.methods import METHODS, combined, unknown
from lorakit.math.combining.setting import Combined, Setting
from lorakit.math.lowrank import LowRank, sent
from lorakit.math.namespace import Send, on_cpu
from lorakit.math.truncated import seed_of
from lorakit.tensors import CODES
from lorakit.verbs.gathering import Source
from lorakit.verbs.making import Made, Task


@dataclass(frozen=True)
class Wanted:
    """How adapters are combined; what is None is left to the method."""

    method: str = "linear"
    rank: int | None = None
    density: float | None = None
    majority: str | None = None
    gamma: float | None = None
    epsilon: float | None = None
    seed: int = 0
    exact: bool = False
    compat: str = ""
    dtype: str = "keep"

    def check(self) -> None:
        """Refuse what the method has no use for, and what it needs and was not told.

        Raises:
            UsageError: naming the option.
        """
        if self.method not in METHODS:
            raise unknown(self.method, METHODS)
        uses = METHODS[self.method].uses
        for name, value in self._told.items():
            if name not in uses:
                raise UsageError(f"{self.method} has no {name}; it was given {value}.")
        if "density" in uses and self.density is None:
            raise UsageError(
                f"{self.method} keeps a share of each delta: how much?",
                hint="Pass --density, such as 0.5; 1 keeps all of it.",
            )
        self.setting("")

    def setting(self, name: str) -> Setting:
        """What the method is told for one weight: its random numbers depend on its name."""
        return Setting(**self._told, seed=seed_of(name, self.seed), exact=self.exact)

    @property
    def _told(self) -> dict[str, Any]:
        names = ("rank", "density", "majority", "gamma", "epsilon")
        return {n: v for n in names if (v := getattr(self, n)) is not None}


@dataclass(frozen=True)
class Row:
    """What became of one weight. `retained` is the share of the combination's energy, the square of
    its Frobenius norm, that the result holds; `reduced` that of the deltas that are not low-rank
    (DoRA), before they were combined.
    """

    name: str
    ranks: tuple[int, ...]
    rank: int
    retained: float
    reduced: float = 1.0


def task_of(form: Form, sources: Sequence[Source], wanted: Wanted) -> Task[Row]:
    """The weight of the result at a form, from all adapters that have it."""
    dtype = computed(widest([s.one.dtype for s in sources]))
    dtype = CODES.get(wanted.dtype, dtype)
    beside = ("bias",) if any("bias" in s.one.tensors for s in sources) else ()

    def compute(send: Send) -> Made[Row]:
        return _made(form, sources, wanted, send, bias=bool(beside))

    return Task(form, dtype, compute, beside)


def memory_of(form: Form, sources: Sequence[Source], wanted: Wanted) -> int:
    """Bytes that combining a weight takes at most."""
    (out, inner), count = form.shape, max(form.experts, 1)
    ranks = sum(s.one.rank for s in sources)
    matrices = 3 if METHODS[wanted.method].dense or any(s.against for s in sources) else 0
    if wanted.compat and wanted.method.endswith("_svd"):
        matrices = len(sources) + 6  # peft's way has the deltas of all adapters at once
    return 4 * (matrices * out * inner + 8 * count * ranks * (out + inner))


def _made(
    form: Form, sources: Sequence[Source], wanted: Wanted, send: Send, *, bias: bool
) -> Made[Row]:
    wide = "float64" if any(s.one.dtype == "F64" for s in sources) else "float32"
    read = [s.lows(wide, wanted.rank or 0) for s in sources]
    weights = [s.weight for s in sources]
    done = [
        _combined([sent(lows[e], send) for lows, _ in read], weights, wanted, f"{form.key}.{e}")
        for e in range(max(form.experts, 1))
    ]
    row = Row(
        form.key,
        tuple(s.one.rank for s in sources),
        max(d.low.rank for d in done),
        min(d.retained for d in done),
        min(share for _, share in read),
    )
    beside = {"bias": _bias(form, sources, wide)} if bias else {}
    return Made([sent(d.low, on_cpu) for d in done], row, beside)


def _combined(
    parts: Sequence[LowRank], weights: Sequence[float], wanted: Wanted, name: str
) -> Combined:
    if wanted.compat:
        return compat(wanted.method, parts, weights, wanted.setting(name))
    return combined(wanted.method, parts, weights, wanted.setting(name))


def _bias(form: Form, sources: Sequence[Source], dtype: str) -> Array:
    """The weighted sum of what the bias of a layer gains."""
    total = np.zeros(form.out, dtype)
    for source in sources:
        if (gain := source.one.bias(dtype)) is not None:
            total += total.dtype.type(source.weight) * gain
    return total
