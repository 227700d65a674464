"""The tensors in which transformers and bitsandbytes store a weight of four bits.

Law: names, dtypes, shapes and bytes are what `save_pretrained` writes of the same arrays. With
double quantisation the JSON holds a number whose length is known only when the weight is; it may
be padded with spaces, which JSON permits, so that headers can be written first.

Source: bitsandbytes 0.50, bitsandbytes/functional.py (QuantState.as_dict, from_dict).
"""

import json
from math import isfinite, prod
from typing import TYPE_CHECKING, Any

import numpy as np

from lorakit.errors import InputError
from lorakit.quant.codec import Array, Quantised
from lorakit.quant.nested import BLOCK as NESTED
from lorakit.tensors import TensorInfo

if TYPE_CHECKING:
    from lorakit.quant.fourbit import FourBit

STATE = ".quant_state.bitsandbytes__"  # between the name of a weight and the kind of its codes
_LONGEST = len(repr(-1.1754943508222875e-38))  # of the numbers of float32


def tensors(
    name: str, q: Quantised, codec: "FourBit", dtype: str, *, padded: bool = False
) -> dict[str, Array]:
    """The tensors of a weight in a model of `dtype`, in the order in which bitsandbytes gives
    them.
    """
    found = {
        name: q.arrays["packed"][:, None],
        f"{name}.absmax": q.arrays["absmax"],
        f"{name}.quant_map": np.array(codec.levels, np.float32),
    }
    if codec.double:
        for part in ("nested_absmax", "nested_quant_map"):
            found[f"{name}.{part}"] = q.arrays[part]
    state = _state(q.shape, codec, dtype, q.meta.get("offset", 0.0))
    if padded:
        state = state.ljust(_length(q.shape, codec, dtype))
    found[name + STATE + codec.name] = np.frombuffer(state, np.uint8)
    return found


def infos(name: str, shape: tuple[int, ...], codec: "FourBit", dtype: str) -> list[TensorInfo]:
    """What `tensors` will give for a weight of this shape, padded, in its order."""
    blocks = -(-prod(shape) // codec.block)
    rows = [
        (name, "U8", (-(-prod(shape) // 2), 1)),
        (f"{name}.absmax", "U8" if codec.double else "F32", (blocks,)),
        (f"{name}.quant_map", "F32", (len(codec.levels),)),
    ]
    if codec.double:
        rows.append((f"{name}.nested_absmax", "F32", (-(-blocks // NESTED),)))
        rows.append((f"{name}.nested_quant_map", "F32", (256,)))
    rows.append((name + STATE + codec.name, "U8", (_length(shape, codec, dtype),)))
    return [TensorInfo(*row) for row in rows]


def _state(shape: tuple[int, ...], codec: "FourBit", dtype: str, offset: float) -> bytes:
    """The JSON of what is no tensor, its keys in the order of bitsandbytes."""
    facts: dict[str, Any] = {
        "quant_type": codec.name,
        "blocksize": codec.block,
        "dtype": dtype,
        "shape": list(shape),
    }
    if codec.double:
        nested = {"nested_blocksize": NESTED, "nested_dtype": "float32", "nested_offset": offset}
        facts |= nested
    return json.dumps(facts).encode()


def _length(shape: tuple[int, ...], codec: "FourBit", dtype: str) -> int:
    """How long the JSON can be."""
    shortest = len(_state(shape, codec, dtype, 0.0))
    return shortest - len("0.0") + _LONGEST if codec.double else shortest


def read_state(name: str, raw: Array) -> dict[str, Any]:
    """What is no tensor of a weight: `shape`, `blocksize`, `dtype` of the model, and with double
    quantisation `nested_offset`.

    Raises:
        InputError: the bytes are no such JSON, or it makes no sense.
    """
    try:
        state = json.loads(raw.tobytes())
        numbers = [state["blocksize"], *state["shape"]]
        sane = all(isinstance(n, int) and 0 < n < 2**40 for n in numbers)
        sane = sane and isfinite(state.get("nested_offset", 0.0))
        sane = sane and state.get("nested_blocksize", NESTED) == NESTED
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError("its quantisation state is no such JSON", tensor=name) from error
    if not sane:
        raise InputError("its quantisation state makes no sense", tensor=name)
    found: dict[str, Any] = {"dtype": "float32", **state}
    return found
