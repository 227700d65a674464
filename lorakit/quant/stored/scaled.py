"""Numbers of one byte with scales beside them that multiply: one for all, one for each row or
column, or one for each block of a grid, whose last blocks may stand out beyond the edge.

Their names are those of fp8 checkpoints (`weight_scale_inv`, which multiplies all the same), of
compressed-tensors (`weight_scale`), ComfyUI (`scale_weight`), and of the first releases of Mistral
(`qscale_weight`) and DeepSeek (`scale`).

Law: a value is its number times its scale, in float32.

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
from lorakit.math.cast import storage, widen
from lorakit.quant.codec import Array, Single
from lorakit.quant.stored.weight import OTHERS, whole
from lorakit.tensors import Source, TensorInfo

CODES = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8")
SCALES = ("F32", "BF16", "F16", "F8_E8M0", "U8")  # a byte is the exponent that F8_E8M0 has
BLOCK = (128, 128)  # where no config says another
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

    def values(self, source: Source, start: int, stop: int, out: Single) -> None:
        """As `Stored.values`."""
        codes, scales, *_ = self.tensors
        *height, width = self.info.shape
        raw = np.empty((stop - start, width), storage(source.infos[codes].dtype))
        source.read_rows(codes, start, stop, raw.view(np.uint8), leading=len(height))
        widen(raw, out)
        places = np.unravel_index(np.arange(start, stop), height)
        blocks = [place // b for place, b in zip(places, self.blocks[:-1], strict=True)]
        rows = self._grid(source, scales)[tuple(blocks)]
        out *= np.repeat(rows, self.blocks[-1], axis=1)[:, :width]

    def _grid(self, source: Source, name: str) -> Single:
        found: Array = whole(source, name)
        if found.dtype == np.uint8:
            found = found.view(ml_dtypes.float8_e8m0fnu)
        return found.astype(np.float32).reshape(_counts(self.info.shape, self.blocks))


def find(source: Source, config: Mapping[str, Any]) -> Iterator[ScaledWeight]:
    """Every weight of one-byte numbers with scales beside it.

    Raises:
        InputError: there are not as many scales as the weight has blocks.
    """
    size = tuple(config.get("weight_block_size") or BLOCK)
    for name, info in source.infos.items():
        front = name.removesuffix("weight")
        scales = _scales(name, front, source.infos) if info.dtype in CODES else None
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
