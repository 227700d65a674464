"""What LoftQ makes of one weight: which tensors, in which file, and how they are computed."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lorakit.adapter.weight_file import PEFT
from lorakit.adapter.weights import roles_of, rounded
from lorakit.engine.layout import Output, lay_out
from lorakit.engine.plan import OutputFile
from lorakit.errors import InputError, UsageError
from lorakit.formats.peft import factor_key
from lorakit.math.cast import Array
from lorakit.math.loftq import Setting, Split, split
from lorakit.math.lowrank import LowRank
from lorakit.math.namespace import Send, here
from lorakit.math.truncated import seed_of
from lorakit.quant.codec import Codec, Packed
from lorakit.quant.table import CODECS, codec
from lorakit.store.checkpoint import Checkpoint
from lorakit.tensors import CODES, TensorInfo
from lorakit.verbs.base.planning import Result, files
from lorakit.verbs.base.sources import base_key
from lorakit.verbs.base.weights import Weight
from lorakit.verbs.init.statistics import Statistics
from lorakit.verbs.init.weight import Wanted, matrix
from lorakit.verbs.loftq.filling import MADE_OF

SAVES = ("quantized", "dequantized", "adapter-only")
ABSMAX = ("plain", "search")
MODEL = {code: name for name, code in CODES.items()}  # what a loader computes in
ITERATIONS = 5


@dataclass(frozen=True)
class Quant:
    """How weights are quantised, how often, and as what the base is written.

    quant: a key of `lorakit.quant.table.CODECS`, with `bits`, a `block` of elements a scale, and
    `absmax` "search" for scales of least error. iters: how often each weight is quantised; None for
    5, or 1 where the base is not written. start: "quant", or "lowrank" to take the leading part of
    a weight out first. save: "quantized" (what bitsandbytes loads), "dequantized" (its values in
    the dtype of the base), or "adapter-only". exact: full decompositions.

    Raises:
        UsageError: it makes no sense.
    """

    quant: str = "nf4"
    bits: int | None = None
    iters: int | None = None
    start: str = "quant"
    absmax: str = "plain"
    double_quant: bool = False
    block: int | None = None
    save: str = "quantized"
    exact: bool = False

    def __post_init__(self) -> None:
        _ = self.codec  # refuses what there is not
        packed = CODECS[self.quant].packed
        if self.iterations < 1:
            raise UsageError(f"iters is {self.iters}: a weight is quantised once or more.")
        if self.save != "dequantized" and not packed:
            raise UsageError(
                f"nothing loads {self.quant} as it is packed.",
                hint="Pass --save dequantized, or --quant nf4, fp4 or int8.",
            )
        if self.save == "adapter-only" and not (self.iterations == 1 and self._as_loaded):
            raise UsageError(
                "an adapter alone is right on a base that is quantised as it is loaded: after one "
                "iteration, from plain quantisation.",
                hint="Leave --iters, --start, --absmax, --block and --double-quant out, or "
                "--save adapter-only.",
            )

    @property
    def iterations(self) -> int:
        """How often a weight is quantised."""
        default = 1 if self.save == "adapter-only" else ITERATIONS
        return default if self.iters is None else self.iters

    @property
    def _as_loaded(self) -> bool:
        plain = (self.start, self.absmax, self.block) == ("quant", "plain", None)
        return plain and not self.double_quant

    @cached_property
    def codec(self) -> Codec:
        """The codec."""
        return codec(
            self.quant,
            bits=self.bits,
            block=self.block,
            double=self.double_quant,
            search=self.absmax == "search",
        )

    @property
    def packed(self) -> Packed:
        """The codec, of a base that is written as it loads."""
        assert isinstance(self.codec, Packed)
        return self.codec


@dataclass(frozen=True)
class Row:
    """A weight that was split: the norms (weighted, where statistics were given) of what plain
    quantisation leaves of it and of what both parts leave, and which of the iterations was kept.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    plain: float
    norm: float
    kept: int

    @property
    def ratio(self) -> float:
        """What is left, as a share of what plain quantisation leaves."""
        return self.norm / self.plain if self.plain else 1.0


@dataclass(frozen=True)
class Splitter:
    """What turns weights into tensors."""

    base: Checkpoint
    wanted: Wanted
    quant: Quant
    weights: Mapping[str, Weight]
    statistics: Statistics | None = None
    send: Send = here  # brings matrices to where they are decomposed

    @property
    def stats(self) -> list[Path]:
        """The file of statistics, if there is one."""
        return [self.statistics.path] if self.statistics else []

    def base_infos(self, weight: Weight) -> list[TensorInfo]:
        """The tensors of the base that a weight becomes."""
        info = self.base.infos[weight.tensor]
        if self.quant.save == "dequantized":
            return [TensorInfo(info.name, info.dtype, info.shape)]
        dtype = MODEL.get(info.dtype, "float32")
        return self.quant.packed.infos(info.name, weight.form.shape, dtype=dtype)

    def factor_infos(self, weight: Weight) -> list[TensorInfo]:
        """The tensors of the adapter that a weight has."""
        (out, inner), rank = weight.form.shape, self.wanted.rank_of(weight.form.module)
        dtype = CODES[self.wanted.dtype]
        return [
            TensorInfo(factor_key(weight.form.module, "a"), dtype, (rank, inner)),
            TensorInfo(factor_key(weight.form.module, "b"), dtype, (out, rank)),
        ]

    def make(self, key: str) -> tuple[dict[str, Any], dict[str, Array]]:
        """The figures of a weight as plain data, and its tensors by name.

        Raises:
            InputError: the weight, or its statistics, hold NaN or Inf.
        """
        weight = self.weights[key]
        module, info = weight.form.module, self.base.infos[weight.tensor]
        dtype = MODEL.get(info.dtype, "float32")
        setting = Setting(
            self.wanted.rank_of(module),
            self.wanted.scaling_of(module),
            self.quant.iterations,
            self.quant.start,
            dtype,
            seed_of(key, self.wanted.seed),
            self.quant.exact,
            self.send,
        )
        try:
            moments = self.statistics.of(module) if self.statistics else None
            w = np.ascontiguousarray(matrix(self.base, weight))
            found = split(w, self.quant.codec, setting, moments=moments)
        except InputError as error:
            raise InputError(
                f"{weight.tensor!r}: {error.message.rstrip('.')}.",
                hint="Fetch the file again, or leave it out with --skip.",
                file=self.base.located.path,
                tensor=weight.tensor,
            ) from error
        low = LowRank(found.low.a, found.low.b)
        roles = roles_of(weight.form, [low], CODES[self.wanted.dtype])
        norm = found.norm_with(roles["a"], roles["b"])
        row = Row(key, weight.form.shape, setting.rank, found.plain, norm, found.best + 1)
        factors = {factor_key(module, role): values for role, values in roles.items()}
        return asdict(row), {**factors, **dict(self._codes(weight, found, dtype))}

    def _codes(self, weight: Weight, found: Split, dtype: str) -> Iterator[tuple[str, Array]]:
        """What the weight becomes in the base, by name."""
        if self.quant.save == "quantized":
            yield from self.quant.packed.tensors(
                weight.tensor, found.quantised, dtype=dtype, padded=True
            ).items()
        elif self.quant.save == "dequantized":
            values = self.quant.codec.dequantise(found.quantised, dtype)
            turned = values.T if weight.turned else values
            yield weight.tensor, rounded(turned, self.base.infos[weight.tensor].dtype)

    def memory(self, weight: Weight) -> int:
        """Bytes that splitting a weight takes at most: it, what is left of it, both codes, the
        subspace that is searched; weighted, a copy; a whole decomposition, several.
        """
        (out, inner), rank = weight.form.shape, self.wanted.rank_of(weight.form.module)
        copies = 2 + (self.statistics is not None) + 6 * self.quant.exact
        return out * inner * (4 * copies + 2) + 4 * 4 * max(rank, 16) * 8 * (out + inner) // 4


def files_of(splitter: Splitter) -> Iterator[OutputFile]:
    """The adapter's weight file, and those of the base with what weights become in it."""
    paired = splitter.quant.save != "adapter-only"
    factors = [
        Output(i, base_key(splitter.base.home(w.tensor)), i, {MADE_OF: key})
        for key, w in splitter.weights.items()
        for i in splitter.factor_infos(w)
    ]
    yield lay_out(f"adapter/{PEFT}" if paired else PEFT, factors, None, link=False)
    if paired:
        named = files(splitter.base, _outputs(splitter), Result())
        yield from (replace(f, name=f"base/{f.name}") for f in named)


def _outputs(splitter: Splitter) -> dict[str, list[Output]]:
    """What becomes of every tensor of the base, by its file."""
    found: dict[str, list[Output]] = {}
    by_tensor: Mapping[str, tuple[str, Weight]] = {
        w.tensor: (key, w) for key, w in splitter.weights.items()
    }
    for part in splitter.base.parts:
        source, there = base_key(part), found.setdefault(part.name, [])
        for name, info in part.infos.items():
            if name not in by_tensor:
                there.append(Output(info, source, info))
                continue
            key, weight = by_tensor[name]
            recipe = {MADE_OF: key}
            infos = splitter.base_infos(weight)
            there += [Output(i, source, info, recipe) for i in infos]
    return found
