"""Numbers of one byte with scales beside them that multiply: one for all, one for each row or
column, or one for each block of a grid, whose last blocks may stand out beyond the edge.

Their names are those of fp8 checkpoints (`weight_scale_inv`, which multiplies all the same), of
compressed-tensors (`weight_scale`), ComfyUI (`scale_weight`), and of the first releases of Mistral
(`qscale_weight`) and DeepSeek (`scale`).

Law: a value is its number times its scale, in float32. New values keep the scales whose blocks
they still fit; another is the largest magnitude of its block by that of the numbers.

Sources: deepseek-ai/DeepSeek-V3, inference/kernel.py (weight_dequant_kernel);
huggingface/transformers v5.23, integrations/finegrained_fp8.py; vllm-project/compressed-tensors,
quantization/lifecycle/forward.py; comfyanonymous/ComfyUI, comfy/ops.py (scaled_fp8_ops).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import ml_dtypes
import numpy as np

from lorakit.errors import InputError
from lorakit.math.cast import narrow, storage, widen
from lorakit.quant.codec import Array, Single
from lorakit.quant.spanning import Codes, Extremes, as_stored, extremes, joined, on_grid, spanning
from lorakit.quant.stored.weight import OTHERS, whole
from lorakit.tensors import ONE_BYTE, Source, TensorInfo

SCALES = ("F32", "BF16", "F16", "F8_E8M0", "U8")  # a byte is the exponent that F8_E8M0 has
BLOCK = (128, 128)  # where no config says another
LIMITS = {
    "F8_E4M3": Codes(-448, 448, 16),
    "F8_E5M2": Codes(-57344, 57344, 4096),
    "F8_E4M3FNUZ": Codes(-240, 240, 8),
    "F8_E5M2FNUZ": Codes(-57344, 57344, 4096),
    "I8": Codes(-128, 127),
}
LARGE = 1 << 20  # elements of a block that are looked at part by part
# After the name of a weight, or in the place of `weight`.
ENDINGS = ("_scale_inv", "_scale", "_weight_scale_inv", "_weight_scale")
LEAVES = ("scale_weight", "qscale_weight", "scale")
# What else may lie beside, in the place of `weight`: scales of inputs, of no use to plain values.
INPUTS = (
    *("input_scale", "input_scale_inv", "activation_scale", "scale_input"),
    *("qscale_act", "act_scale"),
)


@dataclass(frozen=True)
class ScaledWeight:
    """A weight with a grid of scales, `blocks` elements to each in every dimension."""

    info: TensorInfo
    tensors: tuple[str, ...]
    blocks: tuple[int, ...]

    span = 0

    def values(self, source: Source, start: int, stop: int, out: Single) -> None:
        """As `Stored.values`."""
        codes, scales, *_ = self.tensors
        *height, width = self.info.shape
        raw = np.empty((stop - start, width), storage(source.infos[codes].dtype))
        source.read_rows(codes, start, stop, raw.view(np.uint8), leading=len(height))
        widen(raw, out)
        out *= self._spread(self._grid(source, scales), self._block_rows(start, stop))

    @property
    def remade(self) -> tuple[str, ...]:
        """As `Written.remade`."""
        return self.tensors[:2]

    @property
    def unit(self) -> int:
        """As `Written.unit`."""
        return 1 if self.coupled else self._height

    @property
    def coupled(self) -> bool:
        """As `Written.coupled`."""
        return self._height * self.info.shape[-1] > LARGE

    def survey(self, source: Source, w: Single, new: Single, start: int) -> Extremes:
        """As `Written.survey`."""
        blocks = self._block_rows(start, start + len(new))
        rows = np.flatnonzero(np.diff(blocks, prepend=-1))
        if (np.diff(blocks[rows]) != 1).any():
            raise InputError(
                "its scales are shared by parts of several matrices, so none is remade"
            )
        columns = np.arange(0, new.shape[1], self.blocks[-1])
        return extremes(w, new, rows, columns, int(blocks[0]))

    def settle(self, source: Source, start: int, seen: list[Extremes]) -> tuple[int, Single]:
        """As `Written.settle`: the first block of rows, and scales from there on."""
        codes, scales = (source.infos[name] for name in self.remade)
        found = joined(seen)
        old = self._grid(source, scales.name)[found.first :][: len(found.low)]
        return found.first, spanning(old, found, LIMITS[codes.dtype], scales.dtype)

    def encode(
        self, source: Source, new: Single, start: int, scales: Any, out: Array, at: int
    ) -> Single:
        """As `Written.encode`."""
        dtype, (first, each) = source.infos[self.tensors[0]].dtype, scales
        spread = self._spread(each, self._block_rows(start, start + len(new)) - first)
        values = on_grid(new, spread)
        codes = out[at * new.shape[1] :][: new.size].view(storage(dtype)).reshape(new.shape)
        if dtype == "I8":
            np.rint(values, out=values)
        np.clip(values, *LIMITS[dtype][:2], out=values)
        if dtype == "I8":
            np.copyto(codes, values, casting="unsafe")
        else:
            narrow(values, codes)
        widen(codes, values)
        values *= spread
        return values

    def beside(self, source: Source, name: str, scales: Any) -> Array:
        """As `Written.beside`."""
        return as_stored(scales[1], source.infos[name].dtype)

    @property
    def _height(self) -> int:
        """Rows of whole blocks."""
        *height, _ = self.info.shape
        *above, block = self.blocks[:-1]
        lone = all(b == 1 for b in above)
        return block if lone and (len(height) == 1 or height[-1] % block == 0) else prod(height)

    def _block_rows(self, start: int, stop: int) -> Array:
        """Which block of rows each row is in."""
        height = self.info.shape[:-1]
        places = np.unravel_index(np.arange(start, stop), height)
        blocks = tuple(p // b for p, b in zip(places, self.blocks[:-1], strict=True))
        return np.ravel_multi_index(blocks, _counts(height, self.blocks[:-1]))

    def _spread(self, grid: Single, rows: Array) -> Single:
        """The scale of every element of some rows."""
        found: Single = np.repeat(grid[rows], self.blocks[-1], axis=1)[:, : self.info.shape[-1]]
        return found

    def _grid(self, source: Source, name: str) -> Single:
        """The scales, (blocks of rows, blocks of columns)."""
        found: Array = whole(source, name)
        if found.dtype == np.uint8:
            found = found.view(ml_dtypes.float8_e8m0fnu)
        columns = -(-self.info.shape[-1] // self.blocks[-1])
        return found.astype(np.float32).reshape(-1, columns)


def find(source: Source, config: Mapping[str, Any]) -> Iterator[ScaledWeight]:
    """Every weight of one-byte numbers with scales beside it.

    Raises:
        InputError: there are not as many scales as the weight has blocks.
    """
    size = tuple(config.get("weight_block_size") or BLOCK)
    for name, info in source.infos.items():
        front = name.removesuffix("weight")
        scales = _scales(name, front, source.infos) if info.dtype in ONE_BYTE else None
        if scales and len(info.shape) > 1 and not any(front + o in source.infos for o in OTHERS):
            beside = (front + i for i in INPUTS if front + i in source.infos)
            names = (name, scales.name, *beside)
            yield ScaledWeight(info.but(dtype="", start=0), names, _blocks(info, scales, size))


def _scales(name: str, front: str, infos: Mapping[str, TensorInfo]) -> TensorInfo | None:
    """The tensor that scales a weight, if there is one."""
    names = (*(name + e for e in ENDINGS), *(front + leaf for leaf in LEAVES))
    found = next((infos[n] for n in names if n in infos), None)
    return found if found and found.dtype in SCALES else None


def _blocks(info: TensorInfo, scales: TensorInfo, size: tuple[int, ...]) -> tuple[int, ...]:
    """How many elements share a scale in each dimension, from the shapes; where that is neither
    one nor all, as the config says.
    """
    shape = info.shape
    grid = scales.shape + (1,) * (len(shape) - len(scales.shape))
    sizes = (1,) * (len(shape) - len(size)) + size
    blocks = tuple(
        1 if count == n else n if count == 1 else b
        for n, count, b in zip(shape, grid, sizes, strict=False)
    )
    if len(grid) != len(shape) or _counts(shape, blocks) != grid:
        raise InputError(
            f"has scales {list(scales.shape)} for {list(shape)} numbers.",
            hint="Look at weight_block_size in config.json.",
            tensor=info.name,
        )
    return blocks


def _counts(shape: tuple[int, ...], blocks: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(-(-n // b) for n, b in zip(shape, blocks, strict=True)) if prod(blocks) else ()
