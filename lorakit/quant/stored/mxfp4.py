"""Four-bit floats of gpt-oss: experts in blocks of 32 along their inputs, with an exponent each,
stored the other way round than the parameter is.

Law: the values are those of `convert_moe_packed_tensors`, which bfloat16 holds exactly: each is a
float of two digits times a power of two. New values keep the exponents of blocks that they still
fit; another is the least with which they do, since that of the OCP's rule cuts the largest off.

Sources: OCP Microscaling Formats 1.0, 5.3; huggingface/transformers v5.23,
src/transformers/integrations/mxfp4.py (convert_moe_packed_tensors).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np

from lorakit.errors import InputError
from lorakit.quant import packing
from lorakit.quant.codec import Array, Single
from lorakit.quant.spanning import Codes, Extremes, as_stored, extremes, on_grid, spanning, stacked
from lorakit.quant.stored.weight import kept
from lorakit.tensors import Source, TensorInfo

LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
LIMITS = Codes(-6, 6, 1)
BLOCK = 32
CODES, SCALES = "_blocks", "_scales"  # after the name of a parameter


@dataclass(frozen=True)
class ExpertsOfFour:
    """A stack of experts, (experts, inputs, outputs); each lies as outputs by inputs."""

    info: TensorInfo
    tensors: tuple[str, ...]

    unit = BLOCK
    coupled = False

    def values(self, source: Source, start: int, stop: int, out: Single) -> None:
        """As `Stored.values`."""
        inputs, at = self.info.shape[1], start
        while at < stop:
            expert, first = divmod(at, inputs)
            last = min(inputs, first + stop - at)
            part = out[at - start : at - start + last - first]
            codes, scales = self._expert(source, expert)
            part[:] = _inputs(codes, scales, first, last).T
            at += last - first

    @property
    def remade(self) -> tuple[str, ...]:
        """As `Written.remade`."""
        return self.tensors

    @property
    def span(self) -> int:
        """As `Written.span`."""
        return self.info.shape[1]

    def survey(self, source: Source, w: Single, new: Single, start: int) -> Extremes:
        """As `Written.survey`: blocks are runs of rows, each of one column."""
        blocks = np.arange(0, len(new), BLOCK), np.arange(new.shape[1])
        return extremes(w, new, *blocks, start // BLOCK)

    def settle(self, source: Source, start: int, seen: list[Extremes]) -> tuple[int, Single]:
        """As `Written.settle`: the first block of rows, and scales from there on."""
        found, in_expert = stacked(seen), self.info.shape[1] // BLOCK
        first, last = found.first, found.first + len(found.low)
        parts = []
        for number in range(first // in_expert, -(-last // in_expert)):
            begin, end = (min(max(n - number * in_expert, 0), in_expert) for n in (first, last))
            parts.append(_powers(self._expert(source, number)[1][:, begin:end]).T)
        old = np.concatenate(parts)
        return found.first, spanning(old, found, LIMITS, "U8")

    def encode(
        self, source: Source, new: Single, start: int, scales: Any, out: Array, at: int
    ) -> Single:
        """As `Written.encode`."""
        first, each = scales
        spread = np.repeat(each[start // BLOCK - first :][: len(new) // BLOCK], BLOCK, axis=0)
        numbers = np.clip(on_grid(new, spread), *LIMITS[:2]).astype(ml_dtypes.float4_e2m1fn)
        codes = np.ascontiguousarray(numbers.view(np.uint8).T)
        bytewise = codes[:, ::2] | codes[:, 1::2] << np.uint8(4)
        expert, inside = divmod(at, self.info.shape[1])
        place = out.reshape(-1, self.info.shape[2], self.info.shape[1] // 2)[expert]
        place[:, inside // 2 :][:, : bytewise.shape[1]] = bytewise
        values: Single = numbers.astype(np.float32) * spread
        return values

    def beside(self, source: Source, name: str, scales: Any) -> Array:
        """As `Written.beside`: of whole experts."""
        outputs, groups = self.info.shape[2], self.info.shape[1] // BLOCK
        return as_stored(scales[1].reshape(-1, groups, outputs).transpose(0, 2, 1), "U8")

    def _expert(self, source: Source, number: int) -> list[Array]:
        """The bytes (outputs, inputs / 2) and exponents (outputs, inputs / 32) of one expert."""
        parts = (kept(source, name, number, number + 1) for name in self.tensors)
        return [part.reshape(self.info.shape[2], -1) for part in parts]


def find(source: Source, config: Mapping[str, Any]) -> Iterator[ExpertsOfFour]:
    """Every stack of experts in blocks of four bits.

    Raises:
        InputError: its exponents do not fit its blocks.
    """
    for codes in source.infos:
        name = codes.removesuffix(CODES)
        scales, shape = source.infos.get(name + SCALES), source.infos[codes].shape
        if name == codes or scales is None or len(shape) != 4:
            continue
        experts, outputs, groups, nbytes = shape
        if nbytes != BLOCK // 2 or scales.shape != shape[:3] or scales.dtype != "U8":
            raise InputError("its exponents do not fit its blocks", tensor=codes)
        info = TensorInfo(name, "", (experts, groups * BLOCK, outputs))
        yield ExpertsOfFour(info, (codes, scales.name))


def _inputs(codes: Array, scales: Array, first: int, last: int) -> Single:
    """The values of some inputs, (outputs, last - first)."""
    begin, end = first // BLOCK, -(-last // BLOCK)  # blocks
    packed = np.ascontiguousarray(codes[:, begin * BLOCK // 2 : end * BLOCK // 2])
    found = np.empty((len(packed), (end - begin) * BLOCK), np.float32)
    packing.values(packed.reshape(-1), _pairs(), found.reshape(-1))
    found *= np.repeat(_powers(scales[:, begin:end]), BLOCK, axis=1)
    return found[:, first - begin * BLOCK : last - begin * BLOCK]


def _powers(exponents: Array) -> Single:
    found: Single = exponents.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    return found


@cache
def _pairs() -> packing.Pairs:
    """For each byte, the values of its two codes, of which the first is in the lower half."""
    levels = np.array([*LEVELS, *(-x for x in LEVELS)], np.float32)
    byte = np.arange(256)
    found: packing.Pairs = packing.pairs(levels)[byte >> 4 | (byte & 15) << 4]
    return found
